"""Every method of the book really trains: axolotl on a tiny random Qwen2, all rows, on a CPU.

The configs of the small student are the same methods; `just compare` trains those in earnest.
"""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import ROOT, clean_environment, run_stage
from datasets import Dataset
from safetensors.torch import load_file

from common.cli import UserError
from data_prep.build_dataset import to_row, to_sft_row
from inference.weights import NF4
from prompts.task import load_task
from training.check_rows import check_rows
from training.config import RunConfig, load_methods, with_method
from training.student import load_student_tokenizer

pytestmark = pytest.mark.slow

BOOK = ROOT / "axolotl_configs"
DEFAULT = "qwen2-1.5b-dpo-sft-qlora"
PUBLISHED = "qwen2-1.5b-dpo-qlora"  # the one config whose adapter TRL casts to bf16
METHODS = dict.fromkeys(load_methods(), DEFAULT) | {"published": PUBLISHED}
# One of them again, computing less (training.plugins.AnswerLogits), the reference's part first.
COMPUTES_LESS = "sft-then-dpo-sft-less"
N_ROWS = 4
ON_CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "gradient_checkpointing": False,
    "num_epochs": 1,
    "gradient_accumulation_steps": 2,
    "save_steps": 100,
    "dataset_num_proc": 1,
    **{f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")},
}
GPU_ONLY = ("attn_implementation", "gradient_checkpointing_kwargs", "revision_of_model")


def pair(number: int) -> dict:
    return {
        "id": f"row{number}",
        "source": "s",
        "url": "u",
        "prompt": f"Text {number}.\n\nThe harbour protects the market square. " * 3,
        "chosen": f"Summary: the harbour protects square {number}.",
        "rejected": f"Another thing is said of {number}, and at some length.",
        "rejected_by": "teacher",
        "chosen_position": 1,
        "ratings": [9, 5],
        "teacher": "t",
        "prompt_sha": "p",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A staged dataset of N_ROWS rows, with the `sft` config beside the preference pairs."""
    folder = tmp_path_factory.mktemp("methods")
    pairs = [pair(i) for i in range(N_ROWS)]
    for name, rows in (
        ("default", [to_row(p, "train") for p in pairs]),
        ("sft", [to_sft_row(p) for p in pairs]),
    ):
        (folder / "hub" / name).mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(folder / f"hub/{name}/train.parquet")
    configs = [
        {"config_name": name, "data_files": f"{name}/train.parquet", "default": name == "default"}
        for name in ("default", "sft")
    ]
    (folder / "hub/README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return folder


def recipe(method: str) -> dict:
    """The method laid over the default config; the published config as it stands."""
    settings = yaml.safe_load((BOOK / f"{METHODS[method]}.yaml").read_text())
    return settings if method == "published" else with_method(settings, method)


def shrink(method: str, folder, model) -> dict:
    """The recipe for the tiny model: one epoch over all rows on a CPU."""
    config = {k: v for k, v in recipe(method).items() if k not in GPU_ONLY}
    entry = config["datasets"][0] | {"path": str(folder / "hub"), "split": "train"}
    config |= ON_CPU | {
        "base_model": str(model),
        "datasets": [entry],
        "sequence_len": 512,
        "output_dir": str(folder / method),
        "dataset_prepared_path": str(folder / method / "prepared"),
        "learning_rate": 0.01,
    }
    if "warmup_steps" in config:
        config["warmup_steps"] = 1
    if "lora_model_dir" in config:
        config["lora_model_dir"] = str(folder / "sft")
        config["plugins"] = [*config["plugins"], "training.plugins.FirstAdapter"]
    return config


@pytest.fixture(scope="module")
def runs(folder, tiny_qwen2):
    """Train every config, and one of them again as if killed, in one process for its start-up time.

    SFT comes before what goes on from it; those without a plugin come first, since axolotl keeps a
    process's plugins.
    """
    configs = {method: shrink(method, folder, tiny_qwen2) for method in METHODS}
    order = sorted(METHODS, key=lambda method: ("plugins" in configs[method], "then" in method))
    configs[COMPUTES_LESS] = configs["sft-then-dpo-sft"] | {
        "output_dir": str(folder / COMPUTES_LESS),
        "plugins": ["training.plugins.AnswerLogits", *configs["sft-then-dpo-sft"]["plugins"]],
        "precompute_ref_log_probs": True,
    }
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    train(folder, [*order, "sft-then-dpo", COMPUTES_LESS])
    return folder


# A training whose adapter is there is one that was killed just before its end.
TRAIN_ALL = """
import sys
from pathlib import Path
from axolotl.cli.train import do_cli

for config in map(Path, sys.argv[1:]):
    adapter = config.with_suffix("") / "adapter_model.safetensors"
    if adapter.exists():
        adapter.rename(adapter.with_name("before.safetensors"))
    do_cli(str(config))
"""


def train(folder, names: list[str]) -> None:
    environment = clean_environment(
        ACCELERATE_USE_CPU="true", AXOLOTL_DO_NOT_TRACK="1", OMP_NUM_THREADS="1"
    )
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ALL, *(str(folder / f"{name}.yaml") for name in names)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def check_rows_fit(config: RunConfig) -> list[int]:
    return check_rows(config, load_student_tokenizer(config.settings))


@pytest.mark.parametrize("method", ["dpo-sft", "sft"])
def test_rows_that_do_not_fit_are_named_before_training(folder, tiny_qwen2, method, capsys):
    settings = shrink(method, folder, tiny_qwen2)
    config = RunConfig(folder / "run.yaml", settings)
    assert [length > 0 for length in check_rows_fit(config)] == [True] * N_ROWS
    settings["sequence_len"] = 60
    with pytest.raises(UserError, match="4 of 4 rows are longer than sequence_len 60"):
        check_rows_fit(config)
    settings["excess_length_strategy"] = "drop"
    assert check_rows_fit(config) == []  # they are not trained
    assert "row3; the config leaves them out" in capsys.readouterr().err


def history(runs, method: str) -> dict:
    (state,) = (runs / method).glob("checkpoint-*/trainer_state.json")
    return json.loads(state.read_text())


def steps_of(runs, method: str) -> list[dict]:
    """What was logged of each step."""
    return [entry for entry in history(runs, method)["log_history"] if "loss" in entry]


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_every_row_and_saves_an_adapter_that_moved(runs, method):
    state = history(runs, method)
    steps = steps_of(runs, method)
    assert state["global_step"] == len(steps) == N_ROWS // 2
    assert all(math.isfinite(entry["loss"]) for entry in steps)
    weights = load_file(runs / method / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    moved = [
        name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().sum() > 0
    ]
    assert len(moved) == 14 == len([name for name in weights if "lora_B" in name])


# The first logged loss, before the first update, where policy and reference must be the same.
AT_START = {"dpo": math.log(2), "ipo": 25.0}  # ipo: (1 / (2 beta)) squared


@pytest.mark.parametrize(
    "method", [s for s in METHODS if "dpo" in s or "ipo" in s or s == "published"]
)
def test_the_reference_is_the_model_as_training_found_it(runs, method):
    """The base with the adapter off, or the SFT adapter where training goes on from one."""
    first = history(runs, method)["log_history"][0]
    assert first["rewards/margins"] == 0
    config = recipe(method)
    if "dpo_loss_type" not in config:
        assert first["loss"] == pytest.approx(AT_START[config["rl"]], rel=1e-3)


@pytest.mark.parametrize("method", [name for name in METHODS if "then" in name])
def test_it_goes_on_from_the_sft_adapter(runs, method):
    first, after = (load_file(runs / m / "adapter_model.safetensors") for m in ("sft", method))
    for name, tensor in first.items():
        assert 0 < (after[name] - tensor).abs().max() < 0.03  # two steps of AdamW, rate 0.01


def test_a_killed_round_goes_on_from_its_checkpoint(runs):
    before = load_file(runs / "sft-then-dpo/before.safetensors")
    after = load_file(runs / "sft-then-dpo/adapter_model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert history(runs, "sft-then-dpo")["global_step"] == N_ROWS // 2


def test_computing_less_trains_the_same(runs):
    """Logits at the answers alone, prompts read once, the reference's part before the first step
    of the SFT adapter's copy and not of the bare base."""
    figures = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected")
    for whole, less in zip(
        steps_of(runs, "sft-then-dpo-sft"), steps_of(runs, COMPUTES_LESS), strict=True
    ):
        assert [less[name] for name in figures] == pytest.approx(
            [whole[name] for name in figures], rel=1e-3, abs=1e-3
        )


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_trains_in_32_bits_but_as_published(runs, method):
    weights = load_file(runs / method / "adapter_model.safetensors")
    wanted = torch.bfloat16 if method == "published" else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {wanted}


def test_an_adapter_trained_on_4_bits_merges_into_the_weights_it_was_trained_on(runs, tiny_qwen2):
    """The merged model is the trained one: no 4-bit rounding lies between the two."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    method = "dpo-sft"
    said = run_stage("inference.merge_adapter", runs / f"{method}.yaml").stdout
    nf4 = BitsAndBytesConfig(**NF4)
    ids = AutoTokenizer.from_pretrained(tiny_qwen2)("The harbour protects it.", return_tensors="pt")

    def logits(model):
        # In training mode, for bitsandbytes rounds to bf16 where a CPU infers; no dropout here.
        return model.train()(**ids).logits.detach()

    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    quantized = AutoModelForCausalLM.from_pretrained(tiny_qwen2, quantization_config=nf4)
    merged = AutoModelForCausalLM.from_pretrained(runs / method / "merged")
    bare = logits(quantized)
    adapted = logits(PeftModel.from_pretrained(quantized, runs / method))
    gap, moved = ((adapted - other).abs().mean() for other in (logits(merged), bare))
    rounding = (logits(base) - bare).abs().mean()
    print(f"mean logit gap {gap:.2g}; 4-bit rounding {rounding:.2g}, adapter {moved:.2g}")
    assert gap < moved / 1000 and gap < rounding / 1000 and "mean logit gap" in said
    assert "quantization_config" not in json.loads(
        (runs / method / "merged/config.json").read_text()
    )
    embeddings = AutoModelForCausalLM.from_pretrained(tiny_qwen2).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    assert merged.get_output_embeddings().weight is merged.get_input_embeddings().weight


def test_rows_with_nothing_rejected_are_for_sft_alone(folder, tiny_qwen2, tmp_path):
    rows = [to_row(pair(i) | {"rejected": "", "rejected_by": None}, "train") for i in range(N_ROWS)]
    schema = Dataset.from_list([to_row(pair(0), "train")]).features
    Dataset.from_list(rows, features=schema).to_parquet(tmp_path / "train.parquet")
    settings = shrink("dpo-sft", folder, tiny_qwen2)
    settings["datasets"][0]["path"] = str(tmp_path)
    with pytest.raises(UserError, match="lacks rejected answers: --method sft"):
        check_rows_fit(RunConfig(folder / "run.yaml", settings))


ODD = {  # a rejected answer -> what is said of its row
    "": "1 of 4 rows of .* have an empty answer.*: row1",
    "user": "1 of 4 rows of .* stands in what the chat template writes; --method sft.*: row1",
    "dummy": "1 of 4 rows of .* stands in what the chat template writes; --method sft.*: row1",
    "Say <|im_end|> twice.": r"control token <\|im_end\|>; `just stage --tokenizer .*: row1",
}


@pytest.mark.parametrize("answer", ODD)
def test_answers_that_axolotl_would_misread_are_named(folder, tiny_qwen2, tmp_path, answer):
    """It finds an answer by searching for it in a dummy conversation."""
    rows = [to_row(pair(i), "train") for i in range(N_ROWS)]
    rows[1]["rejected"][0]["content"] = answer
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    settings = shrink("dpo-sft", folder, tiny_qwen2)
    settings["datasets"][0]["path"] = str(tmp_path)
    with pytest.raises(UserError, match=ODD[answer]):
        check_rows_fit(RunConfig(folder / "run.yaml", settings))


def test_what_sft_reads_right_is_let_pass_and_a_control_token_is_not(folder, tiny_qwen2, tmp_path):
    rows = [to_sft_row(pair(i) | {"chosen": "user"}) for i in range(N_ROWS)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    settings = shrink("sft", folder, tiny_qwen2)
    settings["datasets"] = [
        {"path": str(tmp_path), "type": "chat_template", "field_messages": "messages"}
    ]
    config = RunConfig(folder / "run.yaml", settings)
    check_rows_fit(config)
    rows[2]["messages"][0]["content"] += "<|im_start|>"
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"1 of 4 rows .*control token .*: row2"):
        check_rows_fit(config)


def test_rows_that_are_no_conversation_are_named(folder, tiny_qwen2, tmp_path):
    settings = shrink("sft", folder, tiny_qwen2)
    settings["datasets"] = [{"path": str(tmp_path), "type": "chat_template"}]
    config = RunConfig(folder / "run.yaml", settings)
    Dataset.from_list([{"text": "a"}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has no column messages, which its entry names"):
        check_rows_fit(config)
    Dataset.from_list([{"messages": [{"from": "a"}]}]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"1 of 1 rows .* are no conversation of roles"):
        check_rows_fit(config)


def test_prompts_of_another_student_template_are_not_trained(folder, tiny_qwen2, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/task.yaml").write_text("{label: X, answers: 1, hub: {}}")
    template = tmp_path / "mine/student.jinja"
    template.write_text("In short:\n\n{{ text }}")
    task = load_task("mine", tmp_path)
    rows = [to_row(pair(i), "train", task) for i in range(N_ROWS)]
    Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    settings = shrink("dpo-sft", folder, tiny_qwen2)
    settings["datasets"][0]["path"] = str(tmp_path / "train.parquet")
    config = RunConfig(folder / "run.yaml", settings, asked_task=task)
    check_rows_fit(config)
    template.write_text("Shorter:\n\n{{ text }}")
    edited = load_task.__wrapped__("mine", tmp_path)  # as a new process loads it
    with pytest.raises(UserError, match=r"student\.jinja is not what the dataset.s"):
        check_rows_fit(replace(config, asked_task=edited))
