"""What 4-bit training does to an adapter, and what the merge leaves of it, on SmolLM2-135M.

Trains the demo's recipe for a few steps at the full run's rate on a 4-bit base, once with the
adapter in bf16 as TRL casts it and once in 32 bits (training/plugins.py). Prints the
share of the adapter's weights that each step moved, then how far the logits of the merged model are
from those of base + adapter as trained: merged as `just merge` does, into weights rounded to 4 bits
and back, and merged into the weights as published.

    python -m benchmarks.adapter_precision
"""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from common.cli import UserError, positive, run, script_parser
from eval.generate_answers import build_prompt
from eval.load_model import NF4
from eval.systems import load_test_rows
from training.run_config import load_run_config

RECIPE = "smollm2-135m-dpo-sft-lora"
OUTPUT = Path("outputs/adapter_precision")
PLUGIN = "training.plugins.Fp32Adapter"


def train(name: str, steps: int, rate: float) -> Path:
    """The output folder of a run with a checkpoint after every step."""
    keys = {"adapter": "qlora", "load_in_4bit": "true", "learning_rate": rate, "bf16": "false"}
    keys |= {"lr_scheduler": "constant", "warmup_ratio": 0, "max_steps": steps}
    keys |= {"save_steps": 1, "save_total_limit": steps}
    keys |= {"plugins": f"[{PLUGIN}]"} if name == "fp32" else {}
    command = ["training.train_adapter", RECIPE, "--name", f"{OUTPUT.name}/{name}"]
    command += ["--set", *(f"{key}={value}" for key, value in keys.items())]
    command += ["--cpu", "--num_cpu_threads_per_process", str(os.cpu_count())]
    folder = OUTPUT / name
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError(f"training into {folder} failed; see {folder / 'train.log'}")
    return folder


def moved_by_step(folder: Path, steps: int) -> pd.DataFrame:
    """For every step after the first: % of the weights of lora_A and lora_B that it changed."""
    states = [
        load_file(folder / f"checkpoint-{i}/adapter_model.safetensors") for i in range(1, steps + 1)
    ]
    rows = []
    for before, after in pairwise(states):
        row = {}
        for matrix in ("lora_A", "lora_B"):
            names = [name for name in after if matrix in name]
            changed = sum(int((after[n] != before[n]).sum()) for n in names)
            row[matrix] = 100 * changed / sum(after[n].numel() for n in names)
        rows.append(row)
    return pd.DataFrame(rows, index=range(2, steps + 1))


def merge_gaps(folder: Path, text: str) -> dict[str, float]:
    """Mean absolute logit differences of two ways to merge to base + adapter as trained."""
    base = load_run_config(RECIPE, trained=False).base_model
    tokenizer = AutoTokenizer.from_pretrained(base)
    inputs = tokenizer(build_prompt(tokenizer, text, None, 4096)[0], return_tensors="pt")
    nf4 = {"quantization_config": BitsAndBytesConfig(**NF4)}

    def logits(model) -> torch.Tensor:
        # In training mode, for bitsandbytes rounds to bf16 where a CPU infers; no dropout here.
        return model.train()(**inputs).logits.detach()

    def load(**options):
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)

    def merged(model) -> torch.Tensor:
        return logits(PeftModel.from_pretrained(model, folder).merge_and_unload())

    quantized = logits(load(**nf4))
    trained = logits(PeftModel.from_pretrained(load(**nf4), folder))
    return {
        "merged into the weights as rounded in training": mean_gap(
            merged(load(**nf4).dequantize()), trained
        ),
        "merged into the weights as published": mean_gap(merged(load()), trained),
        "what the adapter moves": mean_gap(trained, quantized),
        "what 4 bits move": mean_gap(quantized, logits(load())),
    }


def mean_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--steps", type=positive, default=6)
    parser.add_argument("--rate", type=float, default=5e-5, help="learning rate, constant")
    args = parser.parse_args()
    moved, gaps = {}, {}
    text = load_test_rows(load_run_config(RECIPE, trained=False), 1)[0]["text"]
    for name in ("bf16", "fp32"):
        folder = train(name, args.steps, args.rate)
        for matrix, share in moved_by_step(folder, args.steps).items():
            moved[f"{matrix}, {name}: % moved"] = share.round(1)
        gaps[f"{name} adapter"] = merge_gaps(folder, text)
    print(pd.DataFrame(moved).rename_axis("step").to_markdown())
    print("\nmean absolute difference of logits\n")
    print(pd.DataFrame(gaps).to_markdown(floatfmt=".2g"))


if __name__ == "__main__":
    run(main)
