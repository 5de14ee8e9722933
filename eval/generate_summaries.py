"""Summarize the test documents with the base model, the base model told to, and the tuned one.

Reads the test split of the config's dataset and outputs/<config>/merged, appends to
outputs/<config>/eval/summaries/{base,base_told,tuned}.jsonl batch by batch; a killed run goes on
where it stopped. Greedy decoding; every record carries the settings that made it.

    python -m eval.generate_summaries axolotl_configs/smollm2-135m-dpo-sft-lora.yaml --n 32
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from axolotl_configs.run_config import (
    RunConfig,
    check_dataset,
    check_model_folder,
    fingerprint,
    load_run_config,
)
from data_prep.records import (
    UserError,
    append_record,
    appending,
    positive,
    read_records,
    run,
    script_parser,
)
from prompts import student_messages, template_sha

TOLD = "summarize/told.jinja"


@dataclass(frozen=True)
class System:
    """A model and the template around the text, None for the bare text."""

    model: str
    revision: str | None
    template: str | None


def systems_of(config: RunConfig) -> dict[str, System]:
    """The systems by name, in the order of the table."""
    return {
        "base": System(config.base_model, config.base_revision, None),
        "base_told": System(config.base_model, config.base_revision, TOLD),
        "tuned": System(str(config.merged), None, None),
    }


def load_test_rows(config: RunConfig, n: int | None) -> list[dict]:
    """[{id, text, reference}] of the first `n` test documents, by the dataset's own order."""
    from datasets import load_dataset

    check_dataset(config.dataset)
    try:
        rows = load_dataset(config.dataset, split="test", revision=config.dataset_revision)
    except Exception as error:  # the datasets package raises many kinds for a bad repo or folder
        raise UserError(
            f"cannot load the test split of {config.dataset}: {' '.join(str(error).split())[:200]}"
        ) from None
    rows = [
        {"id": r["id"], "text": r["prompt"][-1]["content"], "reference": r["chosen"][-1]["content"]}
        for r in rows
    ]
    if not rows:
        raise UserError(f"the test split of {config.dataset} is empty")
    return rows[:n]


def load_model(name: str, revision: str | None):
    """(model, tokenizer) ready for batched generation, on the GPU in bf16 where there is one."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device, dtype = (
        ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    )
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    return model.to(device).eval(), tokenizer


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


def summarize(
    name: str, system: System, rows: list[dict], path: Path, args: argparse.Namespace
) -> None:
    """Complete one system's file with the rows that it lacks."""
    settings = {
        "model": system.model,
        "revision": system.revision,
        "fingerprint": fingerprint(system.model),
        "template": system.template and template_sha(system.template),
        "max_new_tokens": args.max_new_tokens,
        "max_prompt_tokens": args.max_prompt_tokens,
        "decoding": "greedy",
    }
    with appending(path) as log:
        done = {
            r["id"] for r in read_records(path, ("id", "settings")) if r["settings"] == settings
        }
        rows = [row for row in rows if row["id"] not in done]
        if not rows:
            print(f"{name}: all summaries are there")
            return
        model, tokenizer = load_model(system.model, system.revision)
        room = getattr(model.config, "max_position_embeddings", 10**9) - args.max_new_tokens
        limit = min(args.max_prompt_tokens, room)
        for row in rows:
            row["prompt"], row["n_cut_tokens"] = build_prompt(
                tokenizer, row["text"], system.template, limit
            )
        if cut := sum(row["n_cut_tokens"] > 0 for row in rows):
            print(f"{name}: {cut} of {len(rows)} documents are cut to {limit:,} prompt tokens")
        rows.sort(key=lambda row: len(row["prompt"]))
        started, n_new = time.monotonic(), 0
        with tqdm(total=len(rows), desc=f"{name} summaries", unit="text") as bar:
            for start in range(0, len(rows), args.batch_size):
                batch = rows[start : start + args.batch_size]
                outputs = generate_batch(
                    model, tokenizer, [row["prompt"] for row in batch], args.max_new_tokens
                )
                for row, output in zip(batch, outputs, strict=True):
                    cut = {"n_cut_tokens": row["n_cut_tokens"], "settings": settings}
                    append_record(log, {"id": row["id"], **output, **cut})
                    n_new += output["n_new_tokens"]
                rate = n_new / (time.monotonic() - started)
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
                bar.update(len(batch))


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", type=Path, help="the axolotl YAML of the run")
    option("--n", type=positive, help="only the first N test documents")
    option("--max-new-tokens", type=positive, default=512, help="longest summary")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--batch-size", type=positive, default=8, help="texts of like length at once")
    args = parser.parse_args()
    config = load_run_config(args.config)
    for system in systems_of(config).values():
        check_model_folder(system.model)
    rows = load_test_rows(config, args.n)
    for name, system in systems_of(config).items():
        path = config.eval_dir / "summaries" / f"{name}.jsonl"
        summarize(name, system, [dict(row) for row in rows], path, args)


if __name__ == "__main__":
    run(main)
