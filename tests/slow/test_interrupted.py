"""A real training is interrupted, by Ctrl-C and alone, goes on, and trains what it says.

The student is an odd one: its turn ends with another token than its eos, and it has no pad token.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, clean_environment, make_tokenizer, run_stage, write_jsonl
from datasets import load_from_disk
from transformers import AutoTokenizer

from training.config import is_unfinished

pytestmark = pytest.mark.slow

# As Gemma's: the turn ends with a token that is not the eos, and contents are trimmed.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim "
    "+ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The YAML of an SFT of 60 steps on a dataset of four rows."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("interrupted")
    tokenizer = make_tokenizer(folder / "base", TEMPLATE)
    tokenizer.eos_token, tokenizer.pad_token = "<|endoftext|>", None
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2Config(**sizes, **heads)).save_pretrained(folder / "base")
    rows = [{"id": f"row{i}", "messages": talk(f"Text {i}.", f"Answer {i}.")} for i in range(4)]
    write_jsonl(folder / "data/train.jsonl", rows)
    settings = {
        "base_model": str(folder / "base"),
        "datasets": [
            {"path": str(folder / "data"), "type": "chat_template", "field_messages": "messages"}
        ],
        "output_dir": str(folder / "out"),
        "dataset_prepared_path": str(folder / "last_run_prepared"),  # where other runs' rows lie
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        **{f"lora_{name}_kernel": False for name in ("mlp", "qkv", "o", "embedding")},
        "sequence_len": 512,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 15,
        "optimizer": "adamw_torch",
        "bf16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "save_steps": 10,
        "save_total_limit": 2,
        "auto_resume_from_checkpoints": True,
    }
    path = folder / "run.yaml"
    # As one writes it by hand: to PyYAML it is a string.
    path.write_text(yaml.safe_dump(settings) + "learning_rate: 2e-3\n")
    return path


def talk(text: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def start(config) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "training.train_adapter", config, "--cpu"],
        env=clean_environment(OMP_NUM_THREADS="1"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own, as a terminal gives to a command
        preexec_fn=listen_to_ctrl_c,
    )


def listen_to_ctrl_c() -> None:
    """As a terminal's command does: a shell has what it starts in the background pass over it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_checkpoint(process: subprocess.Popen, folder, number: int) -> None:
    """Until one of so many steps, or of more, is written to its end."""
    states = "checkpoint-*/trainer_state.json"
    while not any(int(p.parent.name.split("-")[1]) >= number for p in folder.glob(states)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


def axolotl_of(process: subprocess.Popen) -> psutil.Process:
    """The process that trains."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(one for one in children if one.cmdline()[1:3] == ["-m", "axolotl.cli.train"])


def test_it_is_no_finished_run_until_training_said_so(config):
    output = config.parent / "out"
    process = start(config)
    wait_for_checkpoint(process, output, 10)
    os.killpg(process.pid, signal.SIGINT)  # Ctrl-C
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in said, said
    (reason,) = re.findall(r"error: .*", said)
    stopped = "error: training was stopped before its end; the same command goes on from checkpoint"
    assert reason.startswith(stopped)
    assert is_unfinished(output)

    process = start(config)
    wait_for_checkpoint(process, output, 30)
    axolotl_of(process).send_signal(signal.SIGINT)  # alone: it saves, and exits with 0
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in said, said
    assert "stopped before its end" in said and (output / "adapter_model.safetensors").is_file()
    assert is_unfinished(output)

    result = run_stage("training.train_adapter", config, "--cpu")
    assert "adapter in" in result.stdout and not is_unfinished(output)
    state = json.loads((output / "checkpoint-60/trainer_state.json").read_text())
    assert state["global_step"] == 60
    assert "is trained on this data" in run_stage("training.train_adapter", config, "--cpu").stdout


def test_it_trained_the_answers_and_the_end_of_its_turn(config):
    """Depends on the test before it, as a training takes half a minute."""
    output = config.parent / "out"
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert settings["eot_tokens"] == ["<|im_end|>"] and settings["learning_rate"] == 2e-3
    assert not (config.parent / "last_run_prepared").exists()
    (prepared,) = output.glob("prepared-*/*/dataset_info.json")
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.pad_token and len(tokenizer) == len(
        AutoTokenizer.from_pretrained(config.parent / "base")
    )
    labels = [row["labels"] for row in load_from_disk(prepared.parent)]
    trained = {tokenizer.decode([i for i in row if i != -100]) for row in labels}
    assert trained == {f"Answer {i}.<|im_end|>" for i in range(4)}
