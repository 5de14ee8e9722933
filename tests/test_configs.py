"""Every YAML is accepted by axolotl's schema as on an H100, and no key of it is ignored."""

import importlib

import pytest
import yaml
from axolotl.utils.config import validate_config
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from conftest import ROOT, one_error_line, run_stage

from data_prep.records import appending

CONFIGS = sorted((ROOT / "axolotl_configs").glob("*.yaml"))
H100 = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "compute_capability": "sm_90"}


def load(path) -> dict:
    return yaml.safe_load(path.read_text())


def unknown_keys(config: dict) -> set[str]:
    known = set()
    for name, field in AxolotlInputConfig.model_fields.items():
        known |= {name, field.alias} - {None}
        choices = getattr(field.validation_alias, "choices", None) or [field.validation_alias]
        known |= {choice for choice in choices if isinstance(choice, str)}
    return set(config) - known


def validated(config: dict) -> DictDefault:
    return validate_config(
        DictDefault(config), capabilities=H100, env_capabilities={"torch_version": "2.13.0"}
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_schema_accepts_every_key(path):
    config = load(path)
    assert not unknown_keys(config)
    accepted = validated(config)
    for key, value in config.items():
        if key != "datasets":
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
    module, _, function = config["datasets"][0]["type"].rpartition(".")
    strategy = importlib.import_module(f"axolotl.prompt_strategies.dpo.{module}")
    assert callable(getattr(strategy, function))


def test_a_key_that_axolotl_would_ignore_is_found():
    config = load(CONFIGS[0])
    assert unknown_keys({**config, "rl_adapter_ref_model": True}) == {"rl_adapter_ref_model"}


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


def test_the_two_large_recipes_differ_only_where_they_should():
    plain, with_sft = (
        load(ROOT / f"axolotl_configs/qwen2-1.5b-dpo{s}-qlora.yaml") for s in ("", "-sft")
    )
    changed = {k for k in plain.keys() | with_sft.keys() if plain.get(k) != with_sft.get(k)}
    assert changed == {
        "dpo_loss_type",
        "dpo_loss_weights",
        "sequence_len",
        "excess_length_strategy",
        "dataset_prepared_path",
        "output_dir",
    }


TRAIN = "axolotl_configs.train_adapter"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": "models/nowhere"}, "models/nowhere is not a model folder"),
        ({"base_model": "tests"}, "tests is not a model folder"),
        ({"datasets": [{"path": "data/nowhere"}]}, "data/nowhere is not there"),
        ({"output_dir": None}, "must name base_model, datasets and output_dir"),
    ],
)
def test_a_config_that_names_what_is_missing(tmp_path, changes, said):
    config = tmp_path / "config.yaml"
    base = {
        "base_model": str(tmp_path),
        "datasets": [{"path": str(tmp_path)}],
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "config.json").write_text("{}")
    config.write_text(yaml.safe_dump({**base, **changes}))
    assert said in one_error_line(run_stage(TRAIN, config, code=1))


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), ("a: [", "is not YAML"), ("words", "not a training config")],
)
def test_a_config_that_cannot_be_read(tmp_path, content, said):
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    assert said in one_error_line(run_stage(TRAIN, config, code=1))


def test_a_training_that_still_runs_is_not_started_twice(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = tmp_path / "run.yaml"
    settings = {
        "base_model": str(tmp_path),
        "datasets": [{"path": str(tmp_path / "run.yaml")}],
        "output_dir": str(tmp_path / "out"),
    }
    config.write_text(yaml.safe_dump(settings))
    with appending(tmp_path / "out.lock"):
        line = one_error_line(run_stage(TRAIN, config, code=1))
    assert "out.lock is being written by another run" in line
    assert not (tmp_path / "out").exists()
