"""What `just train` makes of a config, a method, keys and a launch, before axolotl sees it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import one_error_line, run_stage

from common.cli import UserError
from prompts import load_task
from training import train_adapter
from training.resolve_config import resolve_config, with_key, with_method
from training.run_config import load_run_config

TRAIN = "training.train_adapter"
DEFAULT = "qwen2-1.5b-dpo-sft-qlora"


def resolve(name=DEFAULT, method=None, keys=(), launch=None, run=None):
    return resolve_config(name, method, list(keys), launch, run)


def test_a_config_alone_is_trained_as_it_stands():
    assert resolve().settings == load_run_config(DEFAULT, trained=False).settings


def test_a_method_takes_the_place_of_another_and_names_the_run():
    config = resolve(method="simpo")
    assert config.settings["rl"] == "simpo" and config.settings["simpo_gamma"] == 1.0
    assert "dpo_loss_type" not in config.settings and "warmup_ratio" not in config.settings
    assert config.settings["learning_rate"] == pytest.approx(1e-5)
    assert config.name == f"{DEFAULT}-simpo"
    assert config.settings["dataset_prepared_path"] == f"outputs/{DEFAULT}-simpo/prepared"
    sft = resolve(method="sft").settings
    assert "rl" not in sft and sft["datasets"][0]["name"] == "sft"
    assert (
        sft["datasets"][0]["path"] == "data/summarize/hub"
        and "field_chosen" not in sft["datasets"][0]
    )


def test_a_task_has_its_own_data_and_its_own_run(tmp_path):
    config = resolve_config(DEFAULT, "sft", ["seed=7"], task=load_task("title"))
    assert config.dataset == "data/title/hub" and config.name == f"title-{DEFAULT}-sft"
    assert resolve_config(DEFAULT, task=load_task("title"), data=tmp_path).dataset == (
        f"{tmp_path}/title/hub"
    )
    own = resolve_config(DEFAULT, None, ["datasets.0.path=me/x"], None, "mine", load_task("title"))
    assert own.dataset == "me/x" and own.name == "mine"


def test_bf16_on_a_cpu_follows_its_flags(tmp_path):
    for flags, wanted in (("fpu avx2", False), ("avx512_bf16 avx2", True), ("amx_bf16", True)):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        assert train_adapter.computes_bf16(tmp_path / "cpuinfo") is wanted


def test_a_warm_up_of_the_configs_own_outlives_its_method():
    settings = with_method(resolve("qwen2-1.5b-simpo-qlora").settings, "dpo")
    assert settings["warmup_steps"] == 100 and "simpo_gamma" not in settings


def test_going_on_from_an_adapter_says_how_to_name_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    keys = [f"base_model={tmp_path}", f"datasets.0.path={tmp_path}"]
    line = one_error_line(
        run_stage(TRAIN, DEFAULT, "--method", "sft-then-dpo", "--set", *keys, code=1)
    )
    assert "which holds no adapter" in line and "--set lora_model_dir=FOLDER" in line


def test_keys_are_yaml_and_reach_inside():
    keys = ["learning_rate=1e-5", "bf16=false", "datasets.0.path=me/x", "dpo_loss_type=[a, b]"]
    settings = resolve(keys=keys, run="mine").settings
    assert settings["learning_rate"] == 1e-5 and settings["bf16"] is False
    assert settings["datasets"][0]["path"] == "me/x"
    assert settings["dpo_loss_type"] == ["a", "b"]
    assert settings["output_dir"] == "outputs/mine"


@pytest.mark.parametrize("assignment", ["learning_rate", "datasets.7.path=x", "rl.x=1", "seed=[1"])
def test_a_key_that_cannot_be_set_is_one_line(assignment):
    with pytest.raises(UserError, match="give it as key=value"):
        with_key({"datasets": [{}], "rl": "dpo"}, assignment)


def test_a_key_that_axolotl_would_ignore_is_refused():
    line = one_error_line(run_stage(TRAIN, DEFAULT, "--set", "rl_adapter_ref_model=true", code=1))
    assert "axolotl knows no key rl_adapter_ref_model" in line


def test_several_gpus_by_a_launch():
    path = Path(resolve(launch="zero2").settings["deepspeed"])
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 2
    bf16 = ["adapter=lora", "load_in_4bit=false"]
    assert resolve(launch="fsdp2", keys=bf16).settings["fsdp_version"] == 2
    with pytest.raises(UserError, match="FSDP2 cannot split 4-bit weights"):
        resolve(launch="fsdp2")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((DEFAULT, "--method", "magic"), "no method magic; methods.yaml has dpo, sft"),
        (("nowhere",), "no config named nowhere; there are the configs qwen2-1.5b-dpo-qlora"),
    ],
)
def test_a_name_that_is_not_there_is_one_line(options, reason):
    assert reason in one_error_line(run_stage(TRAIN, *options, code=1))


def test_training_starts_from_the_config_and_the_other_stages_from_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, seed in (("axolotl_configs/a.yaml", 1), ("outputs/a/config.yaml", 2)):
        settings = {"base_model": "m", "datasets": [{"path": "d"}], "output_dir": "outputs/a"}
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(yaml.safe_dump(settings | {"seed": seed}))
    assert load_run_config("a", trained=False).settings["seed"] == 1
    assert load_run_config("a").settings["seed"] == 2


def test_a_dataset_on_the_hub_is_told_by_its_revision(monkeypatch, capsys):
    class Hub:
        def dataset_info(self, repo):
            if state["sha"] is None:
                raise OSError("offline")
            return type("Info", (), {"sha": state["sha"]})

    state = {"sha": "one"}
    monkeypatch.setattr(train_adapter, "HfApi", Hub)
    config = resolve(keys=["datasets.0.path=me/x"])
    before = train_adapter.inputs_of(config)
    state["sha"] = "two"
    assert train_adapter.inputs_of(config) != before
    state["sha"] = None
    assert train_adapter.inputs_of(config)["dataset"] == ["me/x"]
    assert "me/x is not pinned" in capsys.readouterr().err


@pytest.mark.slow
def test_the_plugins_are_found_from_any_folder(tmp_path):
    """Set-up installs this project, so axolotl and Ray's workers need no folder for them."""
    script = "from axolotl.integrations.base import PluginManager as P\n"
    script += "P.get_instance().register('training.plugins.Fp32Adapter')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
