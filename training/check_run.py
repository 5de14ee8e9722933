"""What a training run needs, checked before it starts: rows that fit, GPU memory, room on disk."""

import importlib.util
import shutil
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, warn
from training.run_config import RunConfig, load_rows

PREFERENCE = ("dpo", "ipo", "orpo", "simpo", "kto")


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


def check_rows_fit(config: RunConfig) -> int:
    """Length of the longest row trained on. Raises UserError with the ids of rows that do not fit.

    Where the config says `excess_length_strategy: drop` they are counted and named instead.
    """
    from transformers import AutoTokenizer

    rows, limit = load_rows(config), config.settings["sequence_len"]
    tokenizer = AutoTokenizer.from_pretrained(config.base_model, revision=config.base_revision)
    lengths = row_lengths(rows, tokenizer)
    ids = rows["id"] if "id" in rows.column_names else list(map(str, range(len(rows))))
    long = [i for i, length in zip(ids, lengths, strict=True) if length > limit]
    said = (
        f"{len(long)} of {len(rows)} rows are longer than sequence_len {limit} "
        f"(the longest {max(lengths)} tokens): {', '.join(long[:5])}{', ...' * (len(long) > 5)}"
    )
    if long and config.settings.get("excess_length_strategy") == "raise":
        raise UserError(f"{said}; raise sequence_len or drop them with `just pairs --max-tokens`")
    if long:
        warn(f"{said}; the config leaves them out")
    return max((length for length in lengths if length <= limit), default=0)


def estimate_gpu_bytes(model, settings: dict, longest: int) -> int:
    """A rough estimate of what training takes on one GPU.

    `model` is the base's transformers config, `longest` the longest row in tokens. Weights in 4 or
    16 bits, adapter with gradient and Adam's two moments in 32 bits, one hidden state a layer
    (gradient checkpointing) and one layer in full, logits in 16 bits and twice in 32.
    """
    hidden, inner, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    head = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    wide, narrow = head * model.num_attention_heads, head * model.num_key_value_heads
    shapes = [(hidden, wide), (hidden, narrow), (hidden, narrow), (wide, hidden)]
    shapes += [(hidden, inner)] * 2 + [(inner, hidden)]
    layers, rank = model.num_hidden_layers, settings.get("lora_r", 0)
    weights = layers * sum(a * b for a, b in shapes) * (0.52 if settings.get("load_in_4bit") else 2)
    embeddings = vocab * hidden * 2 * (1 if model.tie_word_embeddings else 2)
    adapter = layers * sum(rank * (a + b) for a, b in shapes) * 16
    tokens = settings["micro_batch_size"] * longest * (2 if settings.get("rl") in PREFERENCE else 1)
    one_layer = tokens * (8 * hidden + 4 * inner) * 2
    kept = layers * (tokens * hidden * 2 if settings.get("gradient_checkpointing") else one_layer)
    return int(weights + embeddings + adapter + kept + one_layer + tokens * vocab * 10)


def check_gpu(config: RunConfig, longest: int, on_cpu: bool) -> None:
    """Raise UserError if the config asks for what this GPU cannot do; warn of too little memory."""
    import torch
    from transformers import AutoConfig

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
    model = AutoConfig.from_pretrained(config.base_model, revision=config.base_revision)
    need, free = estimate_gpu_bytes(model, settings, longest), torch.cuda.mem_get_info()[0]
    print(f"GPU memory: about {need / 2**30:.1f} GiB wanted, {free / 2**30:.1f} GiB free")
    if need > free:
        warn(
            "the GPU may run out of memory; a shorter sequence_len, load_in_4bit or "
            "gradient_checkpointing take less"
        )


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
    check_gpu(config, check_rows_fit(config), "--cpu" in options)
