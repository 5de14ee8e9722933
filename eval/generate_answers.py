"""Summarize the test documents with every system: models, adapters, endpoints, the lead sentences.

Reads the test split of the run's dataset and outputs/RUN/merged, appends batch by batch to
outputs/RUN/eval/summaries/SYSTEM.jsonl. Every record carries the settings that made it; those of
other settings stay, and asked.json there says which were asked for last. A killed run goes on where
it stopped. A system is base, instructed, tuned, lead, a folder with a model or an adapter, or
endpoint:MODEL or endpoint-bare:MODEL (any OpenAI-compatible one, named by TOGETHER_BASE_URL, such
as `vllm serve outputs/RUN/merged`). Greedy decoding.

    python -m eval.generate_summaries smollm2-135m-dpo-sft-lora --n 32
"""

import argparse
import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from tqdm import tqdm

from common import table
from common.cli import UserError, positive, run, script_parser
from common.files import append_record, appending, write_text
from eval.load_model import load_model, precision
from eval.systems import (
    System,
    add_run_options,
    answers_path,
    lead_sentences,
    load_test_rows,
    systems_of,
    words_of_references,
)
from prompts import Task, load_task
from training.run_config import RunConfig, load_run_config

KEY, ASKED = ("id", "settings"), "answers/asked.json"


def build_prompt(
    tokenizer, text: str, template: str | None, max_tokens: int, task: Task | None = None
) -> tuple[str, int]:
    """(prompt, number of tokens cut off the text's end so that the prompt fits)."""

    def prompt_of(part: str) -> str:
        return tokenizer.apply_chat_template(
            (task or load_task()).student_messages(part, template),
            tokenize=False,
            add_generation_prompt=True,
        )

    n_tokens = len(tokenizer(prompt_of(text), add_special_tokens=False).input_ids)
    if n_tokens <= max_tokens:
        return prompt_of(text), 0
    ids = tokenizer(text, add_special_tokens=False).input_ids
    keep = len(ids) - (n_tokens - max_tokens)
    if keep < 1:
        raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
    return prompt_of(tokenizer.decode(ids[:keep])), len(ids) - keep


def generate_batch(
    model, tokenizer, prompts: list[str], max_new_tokens: int, streamer=None
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn."""
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
            streamer=streamer,
        )
    new = output[:, inputs.input_ids.shape[1] :].tolist()
    results = []
    for n_prompt, ids in zip(inputs.attention_mask.sum(1).tolist(), new, strict=True):
        answer = list(takewhile(lambda token: token not in ends, ids))
        results.append(
            {
                "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
                "finish_reason": "length" if len(answer) == len(ids) else "stop",
                "n_prompt_tokens": n_prompt,
                "n_new_tokens": len(answer),
            }
        )
    return results


def pack_batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, the longest first.

    A batch, padded and with its answers, holds at most `batch_tokens`, or a single prompt; so what
    a batch needs (keys and values, and the mask of the padding) is bounded for prompts of any
    length, and too large a number fails on the first batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


def settings_of(system: System, rows: list[dict], args: argparse.Namespace) -> dict:
    """All that tells a system's summaries from those that it makes otherwise."""
    if system.model is None:
        return {"model": None, "words": words_of_references(rows)}
    template = system.template and load_task().sha(system.template)
    prompting = {"template": template, "max_new_tokens": args.max_new_tokens}
    if isinstance(system.model, str):
        return {"model": system.model, "decoding": "temperature 0", **prompting}
    return {
        **system.model.settings,
        **prompting,
        "max_prompt_tokens": args.max_prompt_tokens,
        "decoding": "greedy",
        "precision": precision(),
    }


def prompt_limit(model, settings: dict) -> int:
    """The longest prompt that leaves room for an answer."""
    context = getattr(model.config, "max_position_embeddings", 10**9)
    return min(settings["max_prompt_tokens"], context - settings["max_new_tokens"])


def generate(system: System, rows: list[dict], settings: dict, args) -> Iterator[dict]:
    """The records of the rows by a model, batch by batch."""
    model, tokenizer = load_model(system.model)
    n_new, limit = settings["max_new_tokens"], prompt_limit(model, settings)
    prompts, cuts = zip(
        *(build_prompt(tokenizer, r["text"], system.template, limit) for r in rows), strict=True
    )
    if n_cut := sum(cut > 0 for cut in cuts):
        print(f"{n_cut} of {len(rows)} documents are cut to {limit:,} prompt tokens")
    lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    for batch in pack_batches(lengths, n_new, args.batch_tokens):
        outputs = generate_batch(model, tokenizer, [prompts[i] for i in batch], n_new)
        for i, output in zip(batch, outputs, strict=True):
            yield {"id": rows[i]["id"], **output, "n_cut_tokens": cuts[i]}


def answer(system: System, rows: list[dict], settings: dict, args) -> Iterator[dict]:
    """The records of the rows by a model, or the lead sentences."""
    if system.model:
        yield from generate(system, rows, settings, args)
        return
    for row in rows:
        text = lead_sentences(row["text"], settings["words"])
        yield {"id": row["id"], "text": text, "finish_reason": "stop"}


def ask_endpoint(
    name: str, system: System, rows: list[dict], path: Path, settings: dict, args
) -> None:
    """Complete a system behind an endpoint, asked as the teacher is: budget, rate, resume."""
    from data_prep.teacher.ask import ask_all

    requests = []
    for row in rows:
        messages = load_task().student_messages(row["text"], system.template)
        requests.append({"id": row["id"], "settings": settings, "messages": messages})
    options = {"model": system.model, "max_tokens": settings["max_new_tokens"], "temperature": 0.0}
    options |= {"max_rate": None, "retry_refused": True}
    ask_all(requests, path, argparse.Namespace(**vars(args) | options), f"{name} summaries", KEY)


def complete(
    name: str, system: System, rows: list[dict], path: Path, settings: dict, args
) -> list[dict]:
    """Add to the table at `path` what it lacks of `rows`; their records, in the order of `rows`."""
    wanted = [{"id": row["id"], "settings": settings} for row in rows]
    if isinstance(system.model, str):
        ask_endpoint(name, system, rows, path, settings, args)
    else:
        with appending(path) as log:
            lacking = {one["id"] for one in table.missing(path, wanted, KEY)}
            if not lacking:
                print(f"{name}: all summaries are there")
                return list(table.load(path, wanted, KEY).values())
            left = [row for row in rows if row["id"] in lacking]
            answers = answer(system, left, settings, args)
            for record in tqdm(answers, f"{name} summaries", len(left), unit="text"):
                append_record(log, {**record, "settings": settings})
    records = table.load(path, wanted, KEY)
    if n_lacking := len(rows) - len(records):
        raise UserError(f"{n_lacking} of {len(rows)} texts have no summary by {name}; run again")
    return list(records.values())


def answer_rows(
    name: str, system: System, rows: list[dict], path: Path, task: Task, args
) -> list[dict]:
    """The summaries of `rows` by a system, in their order; what `path` lacks is made and kept."""
    return complete(name, system, rows, path, settings_of(system, rows, args), args)


def read_asked(config: RunConfig) -> dict[str, dict]:
    """system -> the settings with which it was asked last."""
    path = config.eval_dir / ASKED
    return json.loads(path.read_text()) if path.exists() else {}


def answer_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Complete the summaries of all systems that `args` names."""
    systems = systems_of(config, args.systems)
    asked = {name: settings_of(system, rows, args) for name, system in systems.items()}
    # All of them before the first summary: what is half made is never scored beside another's.
    write_text(config.eval_dir / ASKED, json.dumps(read_asked(config) | asked, indent=1) + "\n")
    for name, system in systems.items():
        complete(name, system, rows, answers_path(config, name), asked[name], args)


def load_answers(
    config: RunConfig, rows: list[dict], systems: list[str], asked: dict | None = None
) -> dict[str, dict[str, dict]]:
    """system -> id -> record, as they were asked for last, or with the settings in `asked`.

    Raises UserError if a system lacks a text.
    """
    asked, summaries = asked or read_asked(config), {}
    for system in systems:
        path = answers_path(config, system)
        if system not in asked:
            raise UserError(f"{path} was not asked for yet; make it with `just answers`")
        wanted = [{"id": row["id"], "settings": asked[system]} for row in rows]
        summaries[system] = table.load(path, wanted, KEY)
        if lacking := len(rows) - len(summaries[system]):
            raise UserError(
                f"{path} lacks {lacking} of {len(rows)} test texts with the settings asked for "
                "last; complete them with the same `just answers`, ask for the earlier settings "
                "again, or pass the same --n"
            )
    return summaries


def tokens(text: str) -> int:
    """8192 or 8K, for argparse."""
    return positive(text[:-1]) * 1024 if text[-1:] in ("k", "K") else positive(text)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--max-new-tokens", type=positive, default=512, help="longest summary")
    option("--max-prompt-tokens", type=tokens, default=8192, help="longer texts are cut; 16K, 32K")
    option("--batch-tokens", type=tokens, default=16384, help="most tokens of a padded batch")
    option("--budget-usd", type=float, help="ceiling for all that the endpoints ever cost")
    option("--concurrency", type=positive, default=64, help="most requests in flight")
    option("--timeout", type=float, default=300, help="seconds to wait for an endpoint")
    option("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    args = parser.parse_args()
    config = load_run_config(args.config)
    systems_of(config, args.systems)
    answer_all(config, load_test_rows(config, args.n), args)


if __name__ == "__main__":
    run(main)
