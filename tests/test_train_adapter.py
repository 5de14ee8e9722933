"""What `just train` makes of config, task, method, keys and launch, and of what axolotl says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import one_error_line, run_stage

from common.cli import UserError
from common.files import appending, mark_made
from inference.weights import precision
from prompts.task import load_task
from training import config as resolving
from training import train_adapter
from training.config import (
    Overlay,
    RunConfig,
    fingerprint,
    is_unfinished,
    load_run_config,
    resolve_config,
    set_key,
    weights_fingerprint,
    with_method,
)

TRAIN = "training.train_adapter"
DEFAULT = "qwen2-1.5b-dpo-sft-qlora"
DEMO = "smollm2-135m-dpo-sft-lora"


def write_yaml(path: Path, **settings: object) -> Path:
    """A config whose base is the folder itself."""
    (path.parent / "config.json").write_text("{}")
    base = {"base_model": str(path.parent), "datasets": [{"path": str(path)}]}
    path.write_text(yaml.safe_dump(base | {"output_dir": str(path.parent / "out")} | settings))
    return path


def test_a_config_alone_is_trained_as_it_stands():
    assert resolve_config(DEFAULT).settings == load_run_config(DEFAULT, trained=False).settings


def test_a_method_takes_the_place_of_another_and_names_the_run():
    config = resolve_config(DEFAULT, Overlay(method="simpo"))
    assert config.settings["rl"] == "simpo" and config.settings["simpo_gamma"] == 1.0
    assert "dpo_loss_type" not in config.settings and "warmup_ratio" not in config.settings
    assert config.settings["learning_rate"] == pytest.approx(1e-5)
    assert config.name == f"{DEFAULT}-simpo"
    assert config.settings["dataset_prepared_path"] == f"outputs/{DEFAULT}-simpo/prepared"
    sft = resolve_config(DEFAULT, Overlay(method="sft"))
    assert "rl" not in sft.settings and sft.settings["datasets"][0]["name"] == "sft"
    assert sft.dataset == "data/summarize/hub" and "field_chosen" not in sft.settings["datasets"][0]


def test_a_warm_up_of_the_configs_own_outlives_its_method():
    simpo = resolve_config(DEFAULT, Overlay(method="simpo")).settings
    settings = with_method(simpo | {"warmup_steps": 100}, "dpo")
    assert settings["warmup_steps"] == 100 and "simpo_gamma" not in settings


def test_a_task_has_its_own_data_and_its_own_run(tmp_path):
    title = load_task("title")
    config = resolve_config(DEFAULT, Overlay(method="sft", task=title))
    assert config.dataset == "data/title/hub" and config.name == f"title-{DEFAULT}-sft"
    assert config.task is title
    assert resolve_config(DEMO, Overlay(task=title)).dataset == "data/demo/title/hub"
    assert resolve_config(DEMO, Overlay(data=tmp_path)).dataset == f"{tmp_path}/summarize/hub"
    assert resolve_config(DEFAULT, Overlay(run="mine", task=title)).name == "mine"


@pytest.mark.parametrize("path", ["me/data", "my/texts", "data/other/hub-student"])
def test_a_dataset_of_ones_own_stays(tmp_path, path):
    config = write_yaml(tmp_path / "run.yaml", datasets=[{"path": path}])
    elsewhere = Overlay(task=load_task("title"), data=Path("elsewhere"))
    assert resolve_config(config, elsewhere).dataset == path


def test_the_task_of_a_run_stands_in_its_folder(tmp_path):
    (tmp_path / "tasks/mine").mkdir(parents=True)
    (tmp_path / "tasks/mine/task.yaml").write_text("{label: X, answers: 1, hub: {}}")
    mine = load_task("mine", tmp_path / "tasks")
    config = write_yaml(tmp_path / "run.yaml")
    inputs = train_adapter.inputs_of(resolve_config(config, Overlay(task=mine)))
    assert (inputs["task"], inputs["prompts_dir"]) == ("mine", str(tmp_path / "tasks"))
    run = load_run_config(config)
    assert run.task.name == "summarize" and train_adapter.inputs_of(run)["prompts_dir"] is None
    (tmp_path / "out/inputs").mkdir(parents=True)
    (tmp_path / "out/inputs/made.json").write_text(json.dumps(inputs))
    assert run.task.folder == mine.folder


@pytest.mark.parametrize(
    ("flags", "isa", "keys", "bf16"),
    [
        ("fpu avx2", "", [], False),
        ("avx512_bf16 avx2", "", [], True),
        ("amx_bf16", "", [], True),
        ("amx_bf16", "AVX2", [], False),
        ("amx_bf16", "", ["bf16=false"], False),
    ],
)
def test_bf16_on_a_cpu_follows_its_flags(tmp_path, monkeypatch, capsys, flags, isa, keys, bf16):
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(resolving, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    monkeypatch.setattr(resolving, "set_key", lambda *_: None)  # which would load axolotl
    overlay = Overlay(keys=tuple(keys), cpu=True)
    settings = resolve_config(DEMO, overlay).settings
    assert settings["bf16"] is bf16 and (resolving.CPU_BF16 in settings["plugins"]) is bf16
    assert precision() == ("bfloat16" if bf16 or keys else "float32")  # of answers too
    assert ("this CPU computes in bf16" in capsys.readouterr().out) is bf16
    assert resolve_config(DEMO).settings["bf16"] is False
    again = tmp_path / "config.yaml"  # a resolved config is trained as it stands
    again.write_text(yaml.safe_dump(settings))
    assert resolve_config(again, overlay).settings == settings


@pytest.mark.slow
def test_keys_are_yaml_reach_inside_and_win_over_all():
    keys = ("learning_rate=1e-5", "bf16=false", "datasets.0.path=me/x", "dpo_loss_type=[a, b]")
    keys += ("deepspeed=mine.json", "output_dir=outputs/own")
    overlay = Overlay(method="ipo", keys=keys, launch="zero2", run="mine", cpu=True)
    settings = resolve_config(DEFAULT, overlay).settings
    assert settings["learning_rate"] == 1e-5 and settings["bf16"] is False
    assert settings["tf32"] is False and resolve_config(DEFAULT).settings["tf32"] is True
    assert settings["datasets"][0]["path"] == "me/x"
    assert settings["dpo_loss_type"] == ["a", "b"]
    assert (settings["deepspeed"], settings["output_dir"]) == ("mine.json", "outputs/own")


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ["learning_rate", "datasets.7.path=x", "rl.x=1", "seed=[1"])
def test_a_key_that_cannot_be_set_is_one_line(assignment):
    with pytest.raises(UserError, match="give it as key=value"):
        set_key({"datasets": [{}], "rl": "dpo"}, assignment)


@pytest.mark.slow
def test_a_key_that_axolotl_would_ignore_is_refused():
    line = one_error_line(run_stage(TRAIN, DEFAULT, "--set", "rl_adapter_ref_model=true", code=1))
    assert "axolotl knows no key rl_adapter_ref_model" in line


def test_several_gpus_by_a_launch():
    path = Path(resolve_config(DEFAULT, Overlay(launch="zero2")).settings["deepspeed"])
    assert json.loads(path.read_text())["zero_optimization"]["stage"] == 2
    assert resolve_config(DEFAULT, Overlay(launch="fsdp2")).settings["fsdp_version"] == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((DEFAULT, "--method", "magic"), "no method magic; methods.yaml has dpo, sft"),
        (("nowhere",), "no config named nowhere; there are the configs qwen2-1.5b-dpo-qlora"),
        (("qwen2-1.5b-orpo-qlora",), "and for --method dpo, sft, dpo-sft, sft-then-dpo"),
        ((DEFAULT, "--task", "titel"), "no task titel"),
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


def test_a_dataset_on_the_hub_is_told_by_its_revision(monkeypatch, capsys, tmp_path):
    class Hub:
        def dataset_info(self, repo):
            if state["sha"] is None:
                raise OSError("offline")
            return SimpleNamespace(sha=state["sha"])

    state = {"sha": "one"}
    monkeypatch.setattr(train_adapter, "HfApi", Hub)
    config = resolve_config(write_yaml(tmp_path / "run.yaml", datasets=[{"path": "me/x"}]))
    before = train_adapter.inputs_of(config)
    state["sha"] = "two"
    assert train_adapter.inputs_of(config) != before
    state["sha"] = None
    assert train_adapter.inputs_of(config)["dataset"] == ["me/x"]
    assert "me/x is not pinned" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for torch, so that no test takes long to load it."""
    gpu = SimpleNamespace(here=False, capability=(9, 0))
    cuda = SimpleNamespace(
        is_available=lambda: gpu.here, get_device_capability=lambda: gpu.capability
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    return gpu


def refused(config: Path, **settings: object) -> str:
    """Why the machine cannot train the config with these settings; "" if it can."""
    settings = yaml.safe_load(config.read_text()) | settings
    try:
        train_adapter.check_machine(RunConfig(config, settings), settings.pop("cpu", False))
    except UserError as error:
        return str(error)
    return ""


def test_what_a_machine_lacks_is_said_before_anything_is_loaded(tmp_path, gpu, monkeypatch):
    config = write_yaml(tmp_path / "run.yaml")
    flash, plugin = {"attn_implementation": "flash_attention_2"}, resolving.CPU_BF16
    assert refused(config) == ""
    assert "asks for bf16, and no GPU is in use" in refused(config, bf16=True)
    assert refused(config, bf16=True, plugins=[plugin]) == ""
    assert "asks for flash attention" in refused(config, bf16=True, **flash)
    assert "no adapter in data/sft to go on from" in refused(config, lora_model_dir="data/sft")
    gpu.here = True
    assert refused(config, bf16=True, **flash) == ""
    assert "asks for flash attention" in refused(config, cpu=True, **flash)
    gpu.capability = (7, 5)
    assert "needs an Ampere GPU" in refused(config, **flash)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2**29))
    assert "less than 1 GiB free" in refused(config)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base_model": "models/nowhere"}, "models/nowhere is not a model folder"),
        ({"base_model": "tests"}, "tests is not a model folder"),
        ({"output_dir": None}, "must name base_model, datasets and output_dir"),
        ({"datasets": []}, "must name base_model, datasets and output_dir"),
    ],
)
def test_a_config_that_names_what_is_missing(tmp_path, gpu, changes, said):
    config = write_yaml(tmp_path / "run.yaml", **changes)
    assert said in one_error_line(run_stage(TRAIN, config, code=1))


@pytest.mark.slow
def test_a_dataset_that_is_missing(tmp_path):
    config = write_yaml(tmp_path / "run.yaml", datasets=[{"path": "data/nowhere"}], sequence_len=9)
    (tmp_path / "config.json").write_text("{}")
    said = one_error_line(run_stage(TRAIN, config, "--set", "seed=2", code=1))
    assert "no dataset data/nowhere; make it with `just dataset`" in said


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no config named"), ("a: [", "is not YAML"), ("words", "must name base_model")],
)
def test_a_config_that_cannot_be_read(tmp_path, content, said):
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    assert said in one_error_line(run_stage(TRAIN, config, code=1))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "must name base_model, datasets and output_dir, as"),
        ("base_model: m\noutput_dir: o\ndatasets:", "datasets is missing or empty"),
        ("base_model: m\ndatasets: [{path: d}]", "output_dir is missing or empty"),
        ("base_model: m\noutput_dir: o\ndatasets: d", "datasets must be a list, and is 'd'"),
        ("base_model: m\noutput_dir: o\ndatasets: [d]", "datasets.0 must have a path"),
        ("base_model: m\noutput_dir: 5\ndatasets: [{path: d}]", "output_dir must be a folder"),
        ("base_model: [m]\noutput_dir: o\ndatasets: [{path: d}]", "base_model must be a folder"),
        (
            "base_model: m\noutput_dir: o\ndatasets: [{path: d}]\nlearning_rate: fast",
            "learning_rate must be a number, and is 'fast'",
        ),
        (
            "base_model: m\noutput_dir: o\ndatasets: [{path: d}]\nplugins: demo",
            "plugins must be a list, and is 'demo'",
        ),
        (
            "base_model: m\noutput_dir: o\ndatasets: [{path: d}]\nsequence_len: true",
            "sequence_len must be a whole number, and is True",
        ),
        ("base_model: caf\u00e9".encode("latin-1"), "is not UTF-8 text"),
        ("a: &a [*a", "is not YAML"),
    ],
)
def test_a_faulty_config_is_one_line_with_file_and_key(tmp_path, content, said):
    config = tmp_path / "config.yaml"
    config.write_bytes(content if isinstance(content, bytes) else content.encode())
    for options in ((), ("--method", "simpo")):
        line = one_error_line(run_stage(TRAIN, config, *options, code=1))
        assert str(config) in line and said in line


def test_an_output_folder_that_is_no_run_is_not_written_to(tmp_path, monkeypatch):
    (tmp_path / "thesis/chapters").mkdir(parents=True)
    for output in (".", "..", "thesis", "run.yaml"):
        monkeypatch.chdir(tmp_path)
        config = write_yaml(tmp_path / "run.yaml", output_dir=output)
        line = one_error_line(run_stage(TRAIN, config, cwd=tmp_path, code=1))
        assert f"run.yaml: output_dir {output}" in line
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapters"]


@pytest.mark.parametrize(("text", "rate"), [("2e-5", 2e-5), ("1E-4", 1e-4), ("0.5e-3", 5e-4)])
def test_a_rate_is_a_number_in_every_form(tmp_path, text, rate):
    config = write_yaml(tmp_path / "run.yaml")
    config.write_text(f"{config.read_text()}learning_rate: {text}\nwandb_name: 2026-01-01\n")
    settings = resolve_config(config).settings
    simpo = Overlay(method="simpo")
    assert settings["learning_rate"] == rate and settings["wandb_name"] == "2026-01-01"
    assert resolve_config(config, simpo).settings["learning_rate"] == pytest.approx(rate / 5)
    assert yaml.safe_load(yaml.safe_dump(settings)) == settings  # as axolotl reads it


def test_a_method_that_multiplies_a_rate_needs_one(tmp_path):
    line = one_error_line(
        run_stage(TRAIN, write_yaml(tmp_path / "a.yaml"), "--method", "simpo", code=1)
    )
    assert "learning_rate, which is missing" in line


def test_a_method_shapes_every_dataset(tmp_path):
    config = write_yaml(
        tmp_path / "a.yaml", datasets=[{"path": "d1"}, {"path": "d2", "split": "x"}]
    )
    entries = resolve_config(config, Overlay(method="sft")).settings["datasets"]
    assert [(entry["path"], entry["type"]) for entry in entries] == [
        ("d1", "chat_template"),
        ("d2", "chat_template"),
    ]


@pytest.fixture
def run_of_all_inputs(tmp_path):
    """(config, task's folder): a run of a task with a template of its own, on two datasets."""
    task = tmp_path / "tasks/mine"
    task.mkdir(parents=True)
    (task / "task.yaml").write_text("{label: X, answers: 1, hub: {}}")
    (task / "student.jinja").write_text("In short: {{ text }}")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("{}\n")
    entries = [{"path": str(tmp_path / "a")}, {"path": "json", "revision": "1"}]
    entries[1]["data_files"] = [str(tmp_path / "b/train.jsonl")]
    config = write_yaml(tmp_path / "run.yaml", datasets=entries, learning_rate=2e-5)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "model.safetensors").write_text("weights")
    resolved = resolve_config(config, Overlay(task=load_task("mine", tmp_path / "tasks")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/adapter_model.safetensors").touch()
    return resolved, task


CHANGES = {
    "tasks/mine/student.jinja": "Shorter: {{ text }}",
    "a/train.jsonl": '{"id": 1}\n',
    "b/train.jsonl": '{"id": 1}\n',
    "chat_template.jinja": "{{ messages[0] }}",
    "model.safetensors": "other weights",
    "config.json": '{"rope_theta": 1}',
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_is_told_by_all_that_it_depends_on(run_of_all_inputs, tmp_path, changed):
    config, _ = run_of_all_inputs
    inputs = train_adapter.inputs_of(config)
    mark_made(tmp_path / "out", inputs)
    assert train_adapter.is_trained(tmp_path / "out", train_adapter.inputs_of(config))
    (tmp_path / changed).write_text(CHANGES[changed])
    as_loaded_anew = load_task.__wrapped__("mine", tmp_path / "tasks")
    config = replace(config, asked_task=as_loaded_anew)
    assert not train_adapter.is_trained(tmp_path / "out", train_adapter.inputs_of(config))


def test_a_run_of_0_3_7_is_compared_by_what_it_recorded(run_of_all_inputs, tmp_path):
    config, _ = run_of_all_inputs
    inputs = train_adapter.inputs_of(config)
    of_0_3_7 = {key: inputs[key] for key in train_adapter.INPUTS_OF_0_3_7}
    of_0_3_7["config"] = {**config.settings, "learning_rate": "2e-5"}  # as it read such a number
    mark_made(tmp_path / "out", of_0_3_7)
    assert train_adapter.is_trained(tmp_path / "out", inputs)
    (tmp_path / "a/train.jsonl").write_text('{"id": 1}\n')
    assert not train_adapter.is_trained(tmp_path / "out", train_adapter.inputs_of(config))
    mark_made(tmp_path / "out", {"task": "mine"})
    assert not train_adapter.is_trained(tmp_path / "out", inputs)


@pytest.mark.parametrize("version", ["0.4.0", "0.3.7"])
def test_a_plugin_that_moved_does_not_make_another_run(run_of_all_inputs, tmp_path, version):
    """A finished run is not trained again, and its config.yaml trains and loads as it stands."""
    config, _ = run_of_all_inputs
    plugins = {"plugins": ["training.plugins.AnswerLogits", resolving.CPU_BF16]}
    inputs = train_adapter.inputs_of(replace(config, settings=config.settings | plugins))
    old_plugins = {"plugins": ["demo.answer_logits.AnswerLogits", resolving.CPU_BF16]}
    old_settings = config.settings | old_plugins
    old_inputs = inputs | {"config": old_settings}
    if version == "0.3.7":
        old_inputs = {key: old_inputs[key] for key in train_adapter.INPUTS_OF_0_3_7}
    mark_made(tmp_path / "out", old_inputs)
    assert train_adapter.is_trained(tmp_path / "out", inputs)
    old_config = tmp_path / "out/config.yaml"
    old_config.write_text(yaml.safe_dump(old_settings))
    assert load_run_config(old_config).settings["plugins"] == plugins["plugins"]
    again = resolve_config(old_config, Overlay(run=config.name, task=config.task))
    assert again.output_dir == config.output_dir
    assert train_adapter.is_trained(tmp_path / "out", train_adapter.inputs_of(again))


def test_a_model_is_told_by_more_than_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_text("weights")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    model = str(tmp_path)
    weights = weights_fingerprint(model)
    prints = {fingerprint(model)}
    for name in ("adapter_config.json", "chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).write_text('{"changed": 1}')
        prints.add(fingerprint(model))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "train.log").write_text("of no matter")
    prints.add(fingerprint(model))
    assert len(prints) == 5 and weights_fingerprint(model) == weights
    (tmp_path / "model.safetensors").write_text("others")
    assert weights_fingerprint(model) != weights and fingerprint(model) not in prints


def test_a_half_trained_adapter_is_not_gone_on_from(tmp_path, gpu):
    first = tmp_path / "first"
    mark_made(first / "inputs", {})
    (first / "adapter_model.safetensors").touch()
    config = write_yaml(tmp_path / "run.yaml")
    assert "has not ended" in refused(config, lora_model_dir=str(first))
    mark_made(first, {})
    assert refused(config, lora_model_dir=str(first)) == ""


def test_a_training_that_still_runs_is_not_started_twice(tmp_path):
    config = write_yaml(tmp_path / "run.yaml")
    with appending(tmp_path / "out.lock"):
        line = one_error_line(run_stage(TRAIN, config, code=1))
    assert "out.lock is being written by another run" in line
    assert not (tmp_path / "out").exists()


SAID = """
[2026-11-29 22:43:03,717] [WARNING] [axolotl.utils.schemas.config] bf16 requested, but AMP is not
[2026-11-29 22:43:04,001] [WARNING] [axolotl.prompt_strategies.chat_template] it won't be trained
[2026-11-29 22:43:04,002] [WARNING] [axolotl.prompt_strategies.chat_template] it won't be trained
[2026-11-29 22:43:04,003] [INFO] [axolotl.utils.data.utils] Dropped 3 short sequences (<2 tokens)
[2026-11-29 22:43:04,004] [WARNING] [bitsandbytes] no GPU
  0%|          | 0/2 [00:00<?, ?it/s]
{'loss': '1.7', 'rewards/margins': '0.5', 'epoch': '0.5'}
 50%|#####     | 1/2 [00:05<00:05, 5.0s/it]
pydantic_core._pydantic_core.ValidationError: 1 validation error for AxolotlInputConfig
  Value error, FSDP2 does not support load_in_4bit with DPO
subprocess.CalledProcessError: Command returned non-zero exit status 1.
"""
DONE = "\n[INFO] [axolotl.train] Training completed! Saving trained model to out.\n"


def axolotl_says(folder: Path, monkeypatch, said: str, code: int) -> RunConfig:
    """A run of `folder` for which a program that says so stands in for accelerate and axolotl."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\ncat <<'END'{said}END\nexit {code}\n")
    python.chmod(0o700)
    monkeypatch.setattr(train_adapter.sys, "executable", str(python))
    config = load_run_config(write_yaml(folder / "run.yaml"))
    config.output_dir.mkdir(exist_ok=True)
    return config


def train_once(config: RunConfig) -> None:
    train_adapter.train(train_adapter.Training(config, {"seed": 1}, ("--cpu",)), 0)


def test_progress_and_warnings_are_lines_and_so_is_the_error(tmp_path, monkeypatch, capsys):
    config = axolotl_says(tmp_path, monkeypatch, SAID, 3)
    with pytest.raises(UserError, match="code 3: Value error, FSDP2 does not support load_in_4bit"):
        train_once(config)
    assert (tmp_path / "out/train.log").read_text().strip() == SAID.strip()
    out, err = capsys.readouterr()
    launched = f"accelerate launch --cpu -m axolotl.cli.train {tmp_path}/out/config.yaml"
    assert f"{launched} --dataset_prepared_path={tmp_path}/out/prepared-" in out
    assert "\r1/2 [00:05<00:05, 5.0s/it] loss 1.7, margins 0.5\x1b[K" in err
    assert err.count("axolotl: it won't be trained") == 1
    assert "axolotl: Dropped 3 short sequences" in err
    assert "AMP" not in err and "no GPU" not in err


@pytest.mark.parametrize(("said", "finished"), [("\n", False), (DONE, True)])
def test_a_run_is_finished_when_training_said_so(tmp_path, monkeypatch, said, finished):
    """axolotl saves its adapter and exits with 0 when it is interrupted."""
    config = axolotl_says(tmp_path, monkeypatch, said, 0)
    (config.output_dir / "adapter_model.safetensors").touch()
    (config.output_dir / "made.json").write_text("{}")  # of no matter: it is being trained again
    if finished:
        train_once(config)
    else:
        with pytest.raises(UserError, match=r"was stopped before its end.* no checkpoint"):
            train_once(config)
    assert is_unfinished(config.output_dir) is not finished
    assert train_adapter.made_of(config.output_dir / "inputs", {"seed": 1}) is False  # not 0.3.7's


def test_what_a_kill_tore_is_cleared_and_what_is_whole_kept(tmp_path):
    for name, state in (("checkpoint-8", '{"global_step": 8}'), ("checkpoint-16", '{"glo')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-24").mkdir()
    (tmp_path / "prepared-1/whole").mkdir(parents=True)
    (tmp_path / "prepared-1/whole/dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "prepared-1/torn").mkdir()
    train_adapter.clear_torn(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/"))
    assert left == ["checkpoint-8", "prepared-1"]
    assert [path.name for path in (tmp_path / "prepared-1").iterdir()] == ["whole"]


def test_a_machine_that_does_not_lead_takes_no_lock_and_writes_beside(tmp_path, monkeypatch):
    config = axolotl_says(tmp_path, monkeypatch, "\n", 0)
    options = ("--num_machines", "2", "--machine_rank=1")
    assert train_adapter.machine_rank(options) == 1 and train_adapter.machine_rank(()) == 0
    with appending(tmp_path / "out.lock"):
        train_adapter.train_beside(train_adapter.Training(config, {}, options))
    settings = yaml.safe_load((tmp_path / "out.rank1.yaml").read_text())
    assert settings == config.settings and not any(config.output_dir.iterdir())
    assert (tmp_path / "out.rank1.log").is_file()


def test_ray_starts_its_workers_itself(tmp_path):
    config = write_yaml(tmp_path / "run.yaml")
    settings = resolve_config(config, Overlay(launch="ray")).settings
    assert settings["use_ray"] and settings["resources_per_worker"] == {"GPU": 1}
    launch = train_adapter.Launch(Path("a.yaml"), Path("rows"), (), Path("log"), by_ray=True)
    trainer = ["-m", "axolotl.cli.train", "a.yaml", "--dataset_prepared_path=rows"]
    assert launch.command() == [sys.executable, *trainer]
    by_accelerate = replace(launch, by_ray=False, options=("--cpu",)).command()
    assert by_accelerate == [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *trainer]
    line = one_error_line(run_stage(TRAIN, config, "--launch", "ray", "--multi_gpu", code=1))
    assert "reads no options of accelerate (--multi_gpu); --set ray_num_workers=8" in line


@pytest.mark.slow
def test_the_plugins_are_found_from_any_folder(tmp_path):
    """Set-up installs this project, so axolotl and Ray's workers need no folder for them."""
    script = "from axolotl.integrations.base import PluginManager as P\n"
    for plugin in ("training.plugins.Fp32Adapter", "training.plugins.AnswerLogits"):
        script += f"P.get_instance().register({plugin!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_new_training_keeps_the_answers_of_the_untrained_base(tmp_path):
    run = tmp_path / "run"
    mark_made(run / "inputs", {"rate": 1})
    (run / "eval/answers").mkdir(parents=True)
    for system in ("base", "instructed", "tuned"):
        (run / f"eval/answers/{system}.jsonl").write_text("{}\n")
    train_adapter.set_aside(run, {"rate": 2})
    assert (tmp_path / "run.1/eval/answers/tuned.jsonl").is_file()
    kept = sorted(path.name for path in run.rglob("*.jsonl"))
    assert kept == ["base.jsonl", "instructed.jsonl"]


@pytest.mark.parametrize("history", [[], [{"step": 3, "train_runtime": 9.0}]])
def test_a_training_without_logged_steps_has_no_curves(tmp_path, capsys, history):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/trainer_state.json").write_text(json.dumps({"log_history": history}))
    train_adapter.plot_curves(tmp_path)
    assert "no step was logged" in capsys.readouterr().out
    assert not (tmp_path / "curves.png").exists()
