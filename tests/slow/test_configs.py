"""Every YAML is accepted by axolotl's schema as on real GPUs, and no key of it is ignored."""

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from axolotl.integrations.base import BasePlugin
from axolotl.loaders import ModelLoader
from axolotl.prompt_strategies.dpo import load as load_dpo
from axolotl.prompt_strategies.orpo import load as load_orpo
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault
from conftest import ROOT

from common.cli import UserError
from inference.weights import NF4
from training import config as training_config
from training.config import LAUNCHES, check_keys, load_methods, with_method

pytestmark = pytest.mark.slow

BOOK = ROOT / "axolotl_configs"
CONFIGS = sorted(BOOK.glob("*-*.yaml"))
AMPERE = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "compute_capability": "sm_80"}
HOPPER = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}
MACHINES = {"Ampere": AMPERE, "Hopper": HOPPER, "two GPUs": {**HOPPER, "n_gpu": 2}}


def load(path) -> dict:
    return yaml.safe_load(path.read_text())


def unknown_keys(config: dict) -> set[str]:
    return training_config.unknown_keys(set(config), config.get("plugins", []))


def validated(config: dict, capabilities: dict = HOPPER) -> DictDefault:
    prepare_plugins(DictDefault(config))
    return validate_config(
        DictDefault(config), capabilities=capabilities, env_capabilities={"torch_version": "2.13.0"}
    )


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_schema_accepts_every_key(path, machine):
    config = load(path)
    assert not unknown_keys(config)
    accepted = validated(config, MACHINES[machine])
    for key, value in config.items():
        if isinstance(value, dict):  # the schema adds defaults
            assert accepted[key].to_dict().items() >= value.items(), key
        elif key != "datasets":
            assert accepted[key] == value, key
    assert accepted.datasets[0].to_dict().items() >= config["datasets"][0].items()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_names_and_house_rules(path):
    config = load(path)
    assert config["output_dir"] == f"outputs/{path.stem}"
    assert config["dataset_prepared_path"].startswith(config["output_dir"])
    assert not config.get("trust_remote_code")
    assert None not in config.values()
    assert config["auto_resume_from_checkpoints"] and config["save_total_limit"]
    if not config["base_model"].startswith("models/"):
        assert len(config["revision_of_model"]) == 40
    if config["excess_length_strategy"] != "raise":
        assert "published" in path.read_text().splitlines()[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_dataset_type_and_the_plugins_are_there(path):
    config = load(path)
    kind = config["datasets"][0]["type"]
    if "rl" in config:
        find = load_orpo if config["rl"] == "orpo" else load_dpo
        assert find(kind, DictDefault(config), dataset_idx=0) is not None
    else:
        assert importlib.import_module(f"axolotl.prompt_strategies.{kind}").load
    for plugin in config.get("plugins", []):
        module, _, name = plugin.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), name), BasePlugin)
    if first := config.get("lora_model_dir"):
        assert (BOOK / f"{Path(first).name}.yaml").is_file()  # with_suffix would cut at "1.5b"


# What a complete config of a method may set otherwise than `--method` does on the default one.
OWN = {"learning_rate", "num_epochs", "output_dir", "dataset_prepared_path", "warmup_steps"}
PUBLISHED = {"sequence_len", "excess_length_strategy", "plugins"}
COMPLETE = {  # the config's name -> its method, and what is its own besides
    "dpo": ("dpo", PUBLISHED),
    "sft": ("sft", {"plugins"}),  # axolotl's own trainer casts no adapter
    "sft-then-dpo": ("sft-then-dpo-sft", {"lora_model_dir", "plugins"}),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_config_is_the_default_one_with_its_method(name):
    method, own = COMPLETE[name]
    derived = with_method(load(BOOK / "qwen2-1.5b-dpo-sft-qlora.yaml"), method)
    ours = load(BOOK / f"qwen2-1.5b-{name}-qlora.yaml")
    changed = {k for k in ours.keys() | derived.keys() if ours.get(k) != derived.get(k)}
    assert changed <= OWN | own


@pytest.mark.parametrize("method", load_methods())
@pytest.mark.parametrize("stem", ["qwen2-1.5b-dpo-sft-qlora", "smollm2-135m-dpo-sft-lora"])
def test_every_method_on_every_student_is_one_the_schema_knows(stem, method):
    derived = with_method(load(BOOK / f"{stem}.yaml"), method)
    assert not unknown_keys(derived) and None not in derived.values()
    accepted = validated(derived)
    assert (accepted.rl or "sft") in method
    kind = derived["datasets"][0]["type"]
    if "rl" in derived:
        find = load_orpo if derived["rl"] == "orpo" else load_dpo
        assert find(kind, DictDefault(derived), dataset_idx=0) is not None


@pytest.mark.parametrize("launch", LAUNCHES)
def test_every_launch_is_accepted_on_two_gpus(launch):
    config = load(BOOK / "qwen2-1.5b-dpo-sft-qlora.yaml") | load(BOOK / f"launch/{launch}.yaml")
    if launch == "fsdp2":
        with pytest.raises(ValueError, match="FSDP2"):
            validated(config, MACHINES["two GPUs"])
        config |= {"adapter": "lora", "load_in_4bit": False}
    assert not unknown_keys(config)
    validated(config, MACHINES["two GPUs"])


def test_the_merge_rounds_to_4_bits_as_axolotl_does():
    loader = ModelLoader.__new__(ModelLoader)
    loader.cfg = DictDefault(adapter="qlora", load_in_4bit=True, torch_dtype=torch.bfloat16)
    loader.model_config, loader.model_kwargs = SimpleNamespace(), {}
    loader._set_quantization_config()
    assert loader.model_kwargs["quantization_config"].to_dict().items() >= NF4.items()


def test_a_key_that_axolotl_would_ignore_is_found():
    config = load(CONFIGS[0])
    odd = {**config, "rl_adapter_ref_model": True, "debug": None}
    assert unknown_keys(odd) == {"rl_adapter_ref_model", "debug"}
    with pytest.raises(UserError, match=r"a\.yaml: axolotl knows no key rl_adapter_ref_model, and"):
        check_keys(odd, Path("a.yaml"))


def test_keys_of_a_plugin_are_known_where_it_is_named():
    config = {**load(CONFIGS[0]), "cut_cross_entropy": True}
    assert unknown_keys(config) == {"cut_cross_entropy"}
    config["plugins"] = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]
    assert not unknown_keys(config)
    with pytest.raises(UserError, match=r"plugins: no\.such\.Plugin cannot be loaded"):
        unknown_keys({**config, "plugins": ["no.such.Plugin"]})


def test_the_published_recipe():
    config = load(ROOT / "axolotl_configs/qwen2-1.5b-dpo-qlora.yaml")
    expected = {
        "base_model": "Qwen/Qwen2-1.5B-Instruct",
        "rl": "dpo",
        "adapter": "qlora",
        "load_in_4bit": True,
        "lora_r": 32,
        "lora_alpha": 64,
        "rl_beta": 0.1,
        "num_epochs": 2,
        "learning_rate": 5e-5,
        "sequence_len": 2048,
        "lr_scheduler": "cosine",
        "gradient_accumulation_steps": 4,
        "attn_implementation": "flash_attention_2",
    }
    assert config.items() >= expected.items()
