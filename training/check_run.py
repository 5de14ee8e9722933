"""What a training run needs, checked before it starts: inputs, rows that fit, a GPU, the disk."""

import shutil
from pathlib import Path

from common.cli import UserError, warn
from training.run_config import RunConfig, check_model_folder, is_local, load_rows

ROOM = 2**30  # bytes that a training writes, about


def row_lengths(rows, tokenizer) -> list[int]:
    """Tokens of each row as trained on: the longest of its conversations in the chat template."""

    def length(row: dict) -> dict:
        if "messages" in row:
            talks = [row["messages"]]
        else:
            talks = [row["prompt"] + row[side] for side in ("chosen", "rejected")]
        texts = [tokenizer.apply_chat_template(talk, tokenize=False).rstrip() for talk in talks]
        return {"length": max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))}

    return rows.map(length, remove_columns=rows.column_names, desc="checking lengths")["length"]


def check_rows_fit(config: RunConfig) -> None:
    """Raise UserError with the ids of rows that do not fit; a config that drops them is warned."""
    from transformers import AutoTokenizer

    rows, limit = load_rows(config), config.settings["sequence_len"]
    tokenizer = AutoTokenizer.from_pretrained(config.base_model, revision=config.base_revision)
    lengths = row_lengths(rows, tokenizer)
    ids = rows["id"] if "id" in rows.column_names else list(map(str, range(len(rows))))
    long = [i for i, length in zip(ids, lengths, strict=True) if length > limit]
    found = (
        f"{len(long)} of {len(rows)} rows are longer than sequence_len {limit} "
        f"(the longest {max(lengths)} tokens): {', '.join(long[:5])}"
    )
    if long and config.settings.get("excess_length_strategy") == "raise":
        raise UserError(f"{found}; raise it or drop them with `just pairs --check length={limit}`")
    if long:
        warn(f"{found}; the config leaves them out")


def check_machine(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError if the config asks for a GPU that is not in use, or the disk is full."""
    import torch

    flash = str(config.settings.get("attn_implementation", "")).startswith("flash_attention")
    asks_gpu = flash or (config.settings.get("bf16") and not on_cpu)
    if asks_gpu and (on_cpu or not torch.cuda.is_available()):
        raise UserError(
            f"{config.path.name} asks for {'flash attention' if flash else 'bf16'}, and no GPU is "
            "in use here; train it on a machine with one, or take a smollm2 config"
        )
    folder = next(
        p for p in (config.output_dir, *config.output_dir.absolute().parents) if p.exists()
    )
    if (free := shutil.disk_usage(folder).free) < ROOM:
        raise UserError(f"{folder} has {free / 2**30:.1f} GiB free, training writes about 1")


def check_run(config: RunConfig, options: list[str]) -> None:
    """All checks. Raises UserError with one line for the first that fails."""
    check_model_folder(config.base_model)
    first = config.first_adapter
    if first and is_local(first) and not (Path(first) / "adapter_model.safetensors").is_file():
        hint = (
            f"train it first with `just train {Path(first).name}`, or --set lora_model_dir=FOLDER"
        )
        raise UserError(f"{config.path.name} goes on from {first}, which holds no adapter; {hint}")
    check_machine(config, "--cpu" in options)
    check_rows_fit(config)
