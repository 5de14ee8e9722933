"""Merge a trained adapter into the base it was trained on, in the precision that was published in.

Reads outputs/RUN/ (the adapter axolotl wrote), writes outputs/RUN/merged. Where the run trained on
4 bits, the base is rounded alike first (see inference/weights.py). Prints how far the merged logits
are from those of base + adapter as trained.

    python -m inference.merge_adapter smollm2-135m-dpo-sft-lora
"""

import shutil
from dataclasses import asdict
from pathlib import Path

from common.cli import UserError, one_line, run, script_parser
from common.files import is_made, locked, mark_made
from inference.adapters import add_adapter, merge_adapter
from inference.weights import (
    Weights,
    is_quantized,
    load_base,
    load_tokenizer,
    memory_told,
    weights_of_run,
)
from training.config import (
    SETTING_FILES,
    RunConfig,
    check_model_folder,
    load_run_config,
    weights_fingerprint,
)
from training.lengths import read_lengths, write_lengths

PROBE = "The harbour was built in 1823 and protects the market square from the sea."


def merge(weights: Weights):
    """Base + adapter as one model.

    Raises UserError if it does not compute what the two compute, or just what the base computes.
    """
    import torch

    inputs = load_tokenizer(weights)(PROBE, return_tensors="pt")

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(**inputs.to(model.device)).logits.float()

    base = load_base(weights, dequantize=False)
    packed = is_quantized(base)  # in 4 bits, which cannot be merged into
    adapted = add_adapter(base, weights.adapter)
    wanted = logits(adapted)
    if packed:
        adapted = add_adapter(load_base(weights), weights.adapter)
    with adapted.disable_adapter():
        untouched = logits(adapted)
    try:
        model = merge_adapter(adapted, progressbar=True)
    except ValueError as error:  # NaN in it
        raise UserError(f"the merge of {weights.adapter} failed: {one_line(error)}") from None
    gap, moved = ((logits(model) - x).abs().mean().item() for x in (wanted, untouched))
    print(f"mean logit gap to base + adapter: {gap:.2g}; the adapter moves logits by {moved:.2g}")
    # Weights and activations in bf16 round by up to 1/256; more than that is another model.
    if not gap <= max(moved / 4, untouched.abs().mean().item() / 64):
        raise UserError(f"the merge of {weights.adapter} failed: it is not base + adapter")
    if not moved:
        raise UserError(f"the adapter {weights.adapter} changes nothing in its base; train it anew")
    return model


def is_old_merge(merged: Path, weights: Weights) -> bool:
    """Whether version 0.3.7 merged these weights, and tokenizer, chat template and configs were
    not written since, which it did not look at."""
    old = asdict(weights) | {
        "fingerprint": weights_fingerprint(weights.adapter),
        "base_fingerprint": weights_fingerprint(weights.model),
    }
    if not is_made(merged, old):
        return False
    since = (merged / "made.json").stat().st_mtime
    folders = (Path(weights.adapter), Path(weights.model))
    files = [file for folder in folders for kind in SETTING_FILES for file in folder.glob(kind)]
    return all(file.stat().st_mtime <= since for file in files)


def merge_run(config: RunConfig) -> None:
    """Make the run's merged model, unless it is there and up to date. Raises UserError."""
    check_model_folder(config.base_model)
    weights = weights_of_run(config)
    with locked(config.merged):  # two evaluations of a run may begin together
        settings = weights.settings
        if is_old_merge(config.merged, weights):
            mark_made(config.merged, settings)
        if is_made(config.merged, settings):
            return print(f"{config.merged} is up to date")
        partial = config.merged.with_name("merged.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with memory_told("merging holds the whole model in memory"):
            merge(weights).save_pretrained(partial)
        load_tokenizer(weights).save_pretrained(partial)
        write_lengths(partial, read_lengths(config.output_dir))
        mark_made(partial, settings)
        shutil.rmtree(config.merged, ignore_errors=True)
        partial.rename(config.merged)
        print(f"merged model in {config.merged}")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run's name, or its axolotl YAML")
    merge_run(load_run_config(parser.parse_args().config))


if __name__ == "__main__":
    run(main)
