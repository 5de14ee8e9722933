"""What a training run needs, checked before it starts: rows that fit, GPU memory, room on disk."""

import importlib.util
import shutil
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, warn
from training.run_config import RunConfig, load_rows


def row_lengths(rows, tokenizer) -> list[int]:
    """Tokens of each row as trained on: the longest of its conversations in the chat template."""
    conversations = (
        [rows["messages"]]
        if "messages" in rows.column_names
        else [
            [p + a for p, a in zip(rows["prompt"], rows[side], strict=True)]
            for side in ("chosen", "rejected")
        ]
    )
    lengths = [0] * len(rows)
    with tqdm(total=len(rows) * len(conversations), desc="checking lengths", unit="text") as bar:
        for side in conversations:
            for start in range(0, len(side), 256):
                texts = tokenizer.apply_chat_template(side[start : start + 256], tokenize=False)
                encoded = tokenizer([t.rstrip() for t in texts], add_special_tokens=False)
                for i, ids in enumerate(encoded.input_ids, start):
                    lengths[i] = max(lengths[i], len(ids))
                bar.update(len(texts))
    return lengths


def check_rows_fit(config: RunConfig) -> None:
    """Raise UserError with the ids of rows that do not fit.

    Where the config says `excess_length_strategy: drop` they are counted and named instead.
    """
    from transformers import AutoTokenizer

    rows, limit = load_rows(config), config.settings["sequence_len"]
    tokenizer = AutoTokenizer.from_pretrained(config.base_model, revision=config.base_revision)
    lengths = row_lengths(rows, tokenizer)
    ids = rows["id"] if "id" in rows.column_names else list(map(str, range(len(rows))))
    long = [i for i, length in zip(ids, lengths, strict=True) if length > limit]
    found = (
        f"{len(long)} of {len(rows)} rows are longer than sequence_len {limit} "
        f"(the longest {max(lengths)} tokens): {', '.join(long[:5])}{', ...' * (len(long) > 5)}"
    )
    if long and config.settings.get("excess_length_strategy") == "raise":
        raise UserError(f"{found}; raise sequence_len or drop them with `just pairs --max-tokens`")
    if long:
        warn(f"{found}; the config leaves them out")


def check_gpu(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError if the config asks for what this machine cannot do."""
    import torch

    settings = config.settings
    flash = str(settings.get("attn_implementation", "")).startswith("flash_attention")
    asks_gpu = [
        k for k, asked in (("bf16", settings.get("bf16")), ("flash attention", flash)) if asked
    ]
    if on_cpu or not torch.cuda.is_available():
        if asks_gpu:
            raise UserError(
                f"{config.path.name} asks for {' and '.join(asks_gpu)}, and no GPU is in use here; "
                "train it on a machine with one, or take a smollm2 config"
            )
        return
    capability = torch.cuda.get_device_capability()
    if flash and capability < (8, 0):
        raise UserError(
            f"flash attention 2 needs an Ampere GPU or later, this one is sm_{capability[0]}"
            f"{capability[1]}; write `attn_implementation: sdpa` into {config.path.name}"
        )
    if flash and not any(map(importlib.util.find_spec, ("flash_attn", "kernels"))):
        raise UserError("flash attention is not installed: pip install kernels, or flash-attn")


def check_disk(folder: Path, need: int) -> None:
    """Raise UserError if the disk of `folder` has fewer than `need` bytes free."""
    while not folder.exists():
        folder = folder.absolute().parent
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(
            f"{folder} has {free / 2**30:.1f} GiB free, training writes about {need / 2**30:.1f}; "
            "make room or point output_dir elsewhere"
        )


def check_run(config: RunConfig, options: list[str]) -> None:
    """All checks. Raises UserError with one line for the first that fails."""
    check_disk(config.output_dir, 2**30)
    check_gpu(config, "--cpu" in options)
    check_rows_fit(config)
