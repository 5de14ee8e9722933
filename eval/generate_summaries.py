"""Summarize the test documents with every system: models, adapters, endpoints, the lead sentences.

Reads the test split of the config's dataset and outputs/<config>/merged, appends to
outputs/<config>/eval/summaries/<system>.jsonl batch by batch; a killed run goes on where it
stopped. Greedy decoding; every record carries the settings that made it. A system is base,
instructed, tuned, lead, a folder with a merged model or an adapter, or endpoint:MODEL (any
OpenAI-compatible one, named by TOGETHER_BASE_URL).

    python -m eval.generate_summaries axolotl_configs/smollm2-135m-dpo-sft-lora.yaml --n 32
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import append_record, appending, read_records
from eval.systems import (
    ENDPOINT,
    System,
    add_run_options,
    ask_endpoint,
    base_of_adapter,
    load_test_rows,
    model_config,
    precision,
    summaries_path,
    systems_of,
    write_lead,
)
from prompts import student_messages, template_sha
from training.run_config import RunConfig, fingerprint, load_run_config


def load_model(name: str, revision: str | None, overrides: dict | None = None):
    """(model, tokenizer) of a Hub id, a model folder or an adapter folder, for batched generation.

    On the GPU in bf16 where there is one. Raises UserError if a weight is NaN or infinite.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    base = base_of_adapter(Path(name)) or name
    with_tokenizer = base == name or (Path(name) / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        name if with_tokenizer else base, revision=revision, padding_side="left"
    )
    config = model_config(base, revision, overrides)
    model = AutoModelForCausalLM.from_pretrained(
        base, revision=revision, dtype=precision(), config=config
    )
    if base != name:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f"{name} holds weights that are NaN or infinite; its training diverged")
    return model.to("cuda" if precision() == "bfloat16" else "cpu").eval(), tokenizer


def build_prompt(tokenizer, text: str, template: str | None, max_tokens: int) -> tuple[str, int]:
    """(prompt, number of tokens cut off the text's end so that the prompt fits)."""

    def prompt_of(part: str) -> str:
        return tokenizer.apply_chat_template(
            student_messages(part, template), tokenize=False, add_generation_prompt=True
        )

    n_tokens = len(tokenizer(prompt_of(text), add_special_tokens=False).input_ids)
    if n_tokens <= max_tokens:
        return prompt_of(text), 0
    ids = tokenizer(text, add_special_tokens=False).input_ids
    keep = len(ids) - (n_tokens - max_tokens)
    if keep < 1:
        raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
    return prompt_of(tokenizer.decode(ids[:keep])), len(ids) - keep


def generate_batch(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[dict]:
    """Greedy continuations of a batch, cut at the end of the turn."""
    import torch

    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    ends = {tokenizer.eos_token_id}
    configured = model.generation_config.eos_token_id
    ends |= set(configured) if isinstance(configured, list) else {configured} - {None}
    with torch.inference_mode():
        output = model.generate(
            **inputs.to(model.device),
            do_sample=False,
            repetition_penalty=1.0,  # greedy in earnest, whatever the model's own settings
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=tokenizer.pad_token_id,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    results = []
    for prompt_mask, ids in zip(
        inputs.attention_mask, output[:, inputs.input_ids.shape[1] :].tolist(), strict=True
    ):
        length = next((i for i, token in enumerate(ids) if token in ends), None)
        results.append(
            {
                "text": tokenizer.decode(ids[:length], skip_special_tokens=True).strip(),
                "finish_reason": "length" if length is None else "stop",
                "n_prompt_tokens": int(prompt_mask.sum()),
                "n_new_tokens": len(ids) if length is None else length,
            }
        )
    return results


def pack_batches(
    lengths: list[int], max_new_tokens: int, token_bytes: int, budget: float, largest: int
) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, longest first.

    A padded batch holds for each prompt a KV cache of `token_bytes` a token and an attention mask
    of 4 bytes a pair of prompt tokens; together at most `budget` bytes. Raises UserError if one
    prompt alone is over it (its mask is left out: it has no padding).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        cache = token_bytes * (lengths[order[0]] + max_new_tokens)
        if cache > budget:
            raise UserError(
                f"a prompt of {lengths[order[0]]:,} tokens needs a KV cache of "
                f"{cache / 2**30:.2f} GiB; raise --kv-cache-gib or lower --max-prompt-tokens"
            )
        size = max(1, min(largest, int(budget // (cache + 4 * lengths[order[0]] ** 2))))
        yield order[:size]
        order = order[size:]


def cache_bytes_per_token(config, bytes_per_value: int) -> int:
    """Bytes of keys and values that one token adds over all layers."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * bytes_per_value


def transformers_engine(system: System, overrides: dict, args: argparse.Namespace) -> tuple:
    """(tokenizer, context in tokens, batches of prompt lengths, continuations of prompts)."""
    model, tokenizer = load_model(system.model, system.revision, overrides)
    token_bytes = cache_bytes_per_token(model.config, model.dtype.itemsize)
    limits = (args.max_new_tokens, token_bytes, args.kv_cache_gib * 2**30, args.batch_size)
    return (
        tokenizer,
        getattr(model.config, "max_position_embeddings", 10**9),
        lambda lengths: pack_batches(lengths, *limits),
        lambda prompts: generate_batch(model, tokenizer, prompts, args.max_new_tokens),
    )


def summarize(
    name: str, system: System, rows: list[dict], path: Path, overrides: dict, args
) -> None:
    """Complete one model's file with the rows that it lacks."""
    settings = {
        "model": system.model,
        "revision": system.revision,
        "fingerprint": fingerprint(system.model),
        "template": system.template and template_sha(system.template),
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "decoding": "greedy",
        "backend": args.backend,
        "precision": precision(),
        "overrides": overrides,
    }
    with appending(path) as log:
        done = {
            r["id"] for r in read_records(path, ("id", "settings")) if r["settings"] == settings
        }
        rows = [row for row in rows if row["id"] not in done]
        if not rows:
            print(f"{name}: all summaries are there")
            return
        if args.backend == "vllm":
            from eval.vllm_engine import vllm_engine as engine
        else:
            engine = transformers_engine
        tokenizer, context, batches, generate = engine(system, overrides, args)
        limit = min(args.max_prompt_tokens, context - args.max_new_tokens)
        prompts, cuts = zip(
            *(build_prompt(tokenizer, r["text"], system.template, limit) for r in rows), strict=True
        )
        if n_cut := sum(cut > 0 for cut in cuts):
            print(f"{name}: {n_cut} of {len(rows)} documents are cut to {limit:,} prompt tokens")
        lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
        started, n_new = time.monotonic(), 0
        with tqdm(total=len(rows), desc=f"{name} summaries", unit="text") as bar:
            for batch in batches(lengths):
                for i, output in zip(batch, generate([prompts[i] for i in batch]), strict=True):
                    cut = {"n_cut_tokens": cuts[i], "settings": settings}
                    append_record(log, {"id": rows[i]["id"], **output, **cut})
                    n_new += output["n_new_tokens"]
                rate = n_new / (time.monotonic() - started)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update(len(batch))


def summarize_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Complete the summaries of all systems that `args` names."""
    overrides = config.settings.get("overrides_of_model_config") or {}
    for name, system in systems_of(config, args.systems).items():
        path = summaries_path(config, name)
        if system.model is None:
            write_lead(rows, path)
        elif name.startswith(ENDPOINT):
            ask_endpoint(name, system, rows, path, args)
        else:
            summarize(name, system, rows, path, overrides, args)


def load_summaries(
    config: RunConfig, rows: list[dict], systems: list[str], asked: dict | None = None
) -> dict[str, dict[str, dict]]:
    """Stand-in until the generation branch is merged.

    system -> id -> record, in the table's order; of the settings `asked` (system -> settings).
    """
    ids = [row["id"] for row in rows]
    summaries = {}
    for system in systems:
        path = summaries_path(config, system)
        records = {
            r["id"]: r
            for r in read_records(path, ("id", "text", "settings"), "just summaries")
            if asked is None or r["settings"] == asked[system]
        }
        if missing := set(ids) - records.keys():
            raise UserError(
                f"{path} lacks {len(missing)} of {len(ids)} test texts; "
                "complete it with `just summaries`, or pass the same --n"
            )
        summaries[system] = {i: records[i] for i in ids}
        if len({json.dumps(record["settings"]) for record in summaries[system].values()}) > 1:
            raise UserError(
                f"{path} holds texts made with different settings; run `just summaries` again "
                "with one setting for all of them"
            )
    return summaries


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--max-new-tokens", type=positive, default=512, help="longest summary")
    option("--max-prompt-tokens", type=tokens, default=8192, help="longer texts are cut; 16K, 32K")
    option("--batch-size", type=positive, default=16, help="most texts of like length at once")
    option("--kv-cache-gib", type=float, default=2.0, help="memory for a batch's KV cache")
    option("--backend", choices=["transformers", "vllm"], default="transformers")
    option("--endpoint-options", default="", help='as for the teacher, e.g. "--budget-usd 2"')


def tokens(text: str) -> int:
    """8192 or 8K, for argparse."""
    return positive(text[:-1]) * 1024 if text[-1:] in ("k", "K") else positive(text)


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    args = parser.parse_args()
    config = load_run_config(args.config)
    systems_of(config, args.systems)
    summarize_all(config, load_test_rows(config, args.n), args)


if __name__ == "__main__":
    run(main)
