"""What `benchmarks.gpu` runs in processes of their own, so that each starts with an empty GPU.

    python -m benchmarks.gpu_ways trl RUN/config.yaml FOLDER
    python -m benchmarks.gpu_ways answers MODEL ANSWERS.json 8192
    python -m benchmarks.gpu_ways batch RUN PROMPTS.json ANSWERS.json

`trl` trains what axolotl trained by a resolved config, in plain TRL with the same settings; `Meter`
measures both. `answers` reads one text as long as the context and answers it. `batch` answers
prompts as `just answers` does.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import yaml
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from common.files import write_text
from training.plugins import Fp32Adapter

WARM_UP = 2  # steps that are not timed: kernels are compiled and chosen in them
NEW_TOKENS = 128


def peak_gib() -> float:
    """Peak memory of this process: the GPU's where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class MeterCallback(TrainerCallback):
    """Seconds of each step and the losses; meter.json in the output folder once training ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.dtype = ""

    def on_step_begin(self, args, state, control, model=None, **_) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.dtype = str(trained[0].dtype).removeprefix("torch.")
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in (logs or {}):
            self.losses.append(float(logs["loss"]))

    def on_train_end(self, args, state, control, **_) -> None:
        measured = {
            "seconds_a_step": statistics.median(self.seconds[WARM_UP:] or self.seconds),
            "steps": len(self.seconds),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "adapter_dtype": self.dtype,
            "peak_gib": peak_gib(),
        }
        write_text(Path(args.output_dir) / "meter.json", json.dumps(measured))


class Meter(BasePlugin):
    """Measures a training of axolotl's: `plugins: [benchmarks.gpu_ways.Meter]`."""

    def add_callbacks_post_trainer(self, cfg, trainer) -> list[TrainerCallback]:
        return [MeterCallback()]


def load_student(settings: dict):
    """(model, tokenizer) of a config: its base, in 4 bits where it says so."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    dtype = torch.bfloat16 if settings["bf16"] else torch.float32
    options = {"dtype": dtype, "attn_implementation": settings["attn_implementation"]}
    if settings["load_in_4bit"]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    options["device_map"] = {"": 0} if torch.cuda.is_available() else "cpu"
    base = settings["base_model"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    return AutoModelForCausalLM.from_pretrained(base, **options), tokenizer


def trl_arguments(settings: dict, folder: str) -> dict:
    """The options of TRL's trainers under which it trains as a config says."""
    copied = ("num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
    copied += ("gradient_accumulation_steps", "gradient_checkpointing", "bf16", "tf32")
    copied += ("gradient_checkpointing_kwargs",)
    ours = settings | {
        "num_train_epochs": settings["num_epochs"],
        "lr_scheduler_type": settings["lr_scheduler"],
        "warmup_steps": settings.get("warmup_steps") or settings.get("warmup_ratio"),
    }
    arguments = {key: ours[key] for key in copied if ours.get(key) is not None}
    return arguments | {
        "output_dir": folder,
        "per_device_train_batch_size": settings["micro_batch_size"],
        "max_length": settings["sequence_len"],
        "optim": settings["optimizer"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
    }


def train_with_trl(config: str, folder: str) -> None:
    """Train by a resolved config in plain TRL, its defaults where the config says nothing.

    Its SFT computes the output layer at the answers alone, by default, and trains the line break
    behind an answer too; so losses agree only nearly.
    """
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings = yaml.safe_load(Path(config).read_text())
    (entry,) = settings["datasets"]
    rows = load_dataset(entry["path"], entry.get("name"), split=entry["split"])
    model, tokenizer = load_student(settings)
    arguments = trl_arguments(settings, folder)
    if settings.get("rl"):
        keys = {"beta": "rl_beta", "loss_type": "dpo_loss_type", "loss_weights": "dpo_loss_weights"}
        arguments |= {ours: settings[key] for ours, key in keys.items() if settings.get(key)}
        rows = rows.select_columns(["prompt", "chosen", "rejected"])
        trainer_class, trainer_config = DPOTrainer, DPOConfig(**arguments)
    else:
        parts = {"prompt": [], "completion": []}
        for row in rows:
            parts["prompt"].append(row["messages"][:-1])
            parts["completion"].append(row["messages"][-1:])
        rows = type(rows).from_dict(parts)
        trainer_class, trainer_config = SFTTrainer, SFTConfig(**arguments)
    lora = LoraConfig(
        r=settings["lora_r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings["lora_dropout"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = trainer_class(
        model=model,
        args=trainer_config,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[MeterCallback()],
    )
    # axolotl's adapter is in 32 bits: of SFT by itself, of DPO by our plugin.
    if not settings.get("rl") or "training.plugins.Fp32Adapter" in settings.get("plugins", []):
        Fp32Adapter().post_trainer_create(None, trainer)
    trainer.train()


def answer_long_text(model: str, path: str, context: str) -> None:
    """Read one text that fills a context but for its answer, and write as many tokens."""
    from benchmarks.gpu import prose
    from inference.generate import build_prompt, generate_batch
    from inference.weights import load_model

    loaded, tokenizer = load_model(model)
    most = int(context) - NEW_TOKENS
    prompt, _ = build_prompt(tokenizer, prose(most * 8), None, most)
    generate_batch(loaded, tokenizer, [prompt[-200:]], 4)  # warm
    seconds = []
    for n_new in (1, NEW_TOKENS):
        synchronize()
        started = time.perf_counter()
        (answer,) = generate_batch(loaded, tokenizer, [prompt], n_new, min_new_tokens=n_new)
        synchronize()
        seconds.append(time.perf_counter() - started)
    measured = {
        "read_tokens": answer["n_prompt_tokens"],
        "read_seconds": seconds[0],
        "new_tokens_a_second": (NEW_TOKENS - 1) / (seconds[1] - seconds[0]),
        "peak_gib": peak_gib(),
    }
    write_text(Path(path), json.dumps(measured))


def answer_batch(run: str, prompts: str, path: str) -> None:
    """The answers to prompts, in packed batches, and the seconds without loading."""
    from inference.generate import answer_prompts, build_prompt
    from inference.weights import load_model

    loaded, tokenizer = load_model(run)
    texts = json.loads(Path(prompts).read_text())
    written = [build_prompt(tokenizer, text, None, 8192)[0] for text in texts]
    synchronize()
    started = time.perf_counter()
    answers = dict(answer_prompts(loaded, tokenizer, written, NEW_TOKENS, 65536, 0))
    synchronize()
    measured = {
        "seconds": time.perf_counter() - started,
        "answers": [answers[i]["text"] for i in range(len(texts))],
        "new_tokens": sum(answer["n_new_tokens"] for answer in answers.values()),
        "peak_gib": peak_gib(),
    }
    write_text(Path(path), json.dumps(measured))


WAYS = {"trl": train_with_trl, "answers": answer_long_text, "batch": answer_batch}

if __name__ == "__main__":
    WAYS[sys.argv[1]](*sys.argv[2:])
