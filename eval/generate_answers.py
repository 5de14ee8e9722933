"""Answer the test texts with every system: models, adapters, endpoints, the first sentences.

Reads the test split of the run's dataset, or with --split train the extracts that have a reply, and
appends batch by batch to outputs/RUN/eval/answers/SYSTEM.jsonl. Every record carries the settings
that made it; those of other settings stay, and asked.json there says which were asked for last. A
killed run goes on where it stopped. Endpoints are named by TOGETHER_BASE_URL. Greedy decoding.

    python -m eval.generate_answers smollm2-135m-dpo-sft-lora --n 32
"""

import argparse
import json
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import table
from common.cli import UserError, positive, run, script_parser
from common.files import append_record, appending, write_text
from eval.load_model import load_model, precision
from eval.systems import (
    System,
    add_run_options,
    load_test_rows,
    load_train_rows,
    run_of,
    systems_of,
)
from prompts import Task, load_task
from training.run_config import RunConfig

KEY = ("id", "settings")


def build_prompt(
    tokenizer, text: str, template: str | None, max_tokens: int, task: Task | None = None
) -> tuple[str, int]:
    """(prompt, number of tokens cut off the text's end so that the prompt fits)."""

    def prompt_of(part: str) -> str:
        messages = (task or load_task()).student_messages(part, template)
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    n_tokens = len(tokenizer(prompt_of(text), add_special_tokens=False).input_ids)
    if n_tokens <= max_tokens:
        return prompt_of(text), 0
    ids = tokenizer(text, add_special_tokens=False).input_ids
    keep = len(ids) - (n_tokens - max_tokens)
    if keep < 1:
        raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
    return prompt_of(tokenizer.decode(ids[:keep])), len(ids) - keep


def generate_batch(
    model, tokenizer, prompts: list[str], max_new_tokens: int, **options: object
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn."""
    import torch

    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    options |= {"max_new_tokens": max_new_tokens, **inputs.to(model.device)}
    with torch.inference_mode():
        new = model.generate(**options)[:, inputs.input_ids.shape[1] :].tolist()
    results, ends = [], model.generation_config.eos_token_id
    for n_prompt, ids in zip(inputs.attention_mask.sum(1).tolist(), new, strict=True):
        answer = list(takewhile(lambda token: token not in ends, ids))
        text = tokenizer.decode(answer, skip_special_tokens=True).strip()
        end = "length" if len(answer) == len(ids) else "stop"
        counts = {"n_prompt_tokens": n_prompt, "n_new_tokens": len(answer)}
        results.append({"text": text, "finish_reason": end, **counts})
    return results


def pack_batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, the longest first.

    A batch, padded and with its answers, holds at most `batch_tokens`, or a single prompt.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    while order:
        size = max(1, batch_tokens // (lengths[order[0]] + max_new_tokens))
        yield order[:size]
        order = order[size:]


def settings_of(system: System, task: Task, args: argparse.Namespace) -> dict:
    """All that tells a model's answers from those that it gives otherwise."""
    made = {"template": task.sha(system.template) if system.template else None}
    made["max_new_tokens"] = args.max_new_tokens or task.max_new_tokens
    if isinstance(system.model, str):
        return made | {"model": system.model, "decoding": "temperature 0"}
    made |= {"max_prompt_tokens": args.max_prompt_tokens, **system.model.settings}
    return made | {"decoding": "greedy", "precision": precision()}


def prompt_limit(model, settings: dict) -> int:
    """The longest prompt that leaves room for an answer."""
    context = getattr(model.config, "max_position_embeddings", 10**9)
    return min(settings["max_prompt_tokens"], context - settings["max_new_tokens"])


def generate(system: System, rows: list[dict], task: Task, settings: dict, args) -> Iterator[dict]:
    """The records of the rows by a model, batch by batch."""
    model, tokenizer = load_model(system.model)
    n_new, limit = settings["max_new_tokens"], prompt_limit(model, settings)
    built = [build_prompt(tokenizer, row["text"], system.template, limit, task) for row in rows]
    prompts, cuts = zip(*built, strict=True)
    if n_cut := sum(cut > 0 for cut in cuts):
        print(f"{n_cut} of {len(rows)} texts are cut to {limit:,} prompt tokens")
    lengths = [len(tokenizer(p, add_special_tokens=False).input_ids) for p in prompts]
    for batch in pack_batches(lengths, n_new, args.batch_tokens):
        outputs = generate_batch(model, tokenizer, [prompts[i] for i in batch], n_new)
        for i, output in zip(batch, outputs, strict=True):
            made = {"n_cut_tokens": cuts[i], "settings": settings}
            yield {"id": rows[i]["id"], **output, **made}


def ask_endpoint(name: str, system: System, wanted: list[dict], path: Path, task: Task, args):
    """Complete the answers of a model behind an endpoint, asked as the teacher is."""
    from data_prep.teacher.ask import ask_all

    requests = [
        {**row, "messages": task.student_messages(row["text"], system.template)} for row in wanted
    ]
    longest = wanted[0]["settings"]["max_new_tokens"]
    options = {"model": system.model, "max_tokens": longest, "temperature": 0.0}
    options |= {"max_rate": None, "retry_refused": True}
    ask_all(requests, path, argparse.Namespace(**vars(args) | options), f"{name} answers", KEY)


def first_sentences(text: str, words: float, cut: bool = False) -> str:
    """As many of the first sentences as come nearest to `words`, or the first one, cut to them."""
    from pysbd import Segmenter

    beginning = " ".join(text[: 2000 + int(30 * words)].split())
    sentences = Segmenter(language="en").segment(beginning)
    if cut:
        return " ".join(sentences[0].split()[: int(words)])
    lengths = np.cumsum([len(sentence.split()) for sentence in sentences])
    best = int(np.abs(lengths - words).argmin())
    return " ".join(sentence.strip() for sentence in sentences[: best + 1])


def read_answers(system: System, rows: list[dict], task: Task) -> list[dict]:
    """What needs no model: the first sentences, or a column of the rows. Raises UserError."""
    words = task.lead_words or float(np.mean([len(row["reference"].split()) for row in rows]))
    made = {"finish_reason": "stop", "settings": {"model": None, "words": words}}
    if system.column and not all(row[system.column] for row in rows):
        raise UserError(f"the test split has no {system.column} answers; leave {system.column} out")
    cut, column = bool(task.lead_words), system.column
    texts = (row[column] if column else first_sentences(row["text"], words, cut) for row in rows)
    return [{"id": row["id"], "text": text, **made} for row, text in zip(rows, texts, strict=True)]


def answer_rows(
    name: str, system: System, rows: list[dict], path: Path, task: Task, args
) -> list[dict]:
    """A system's answers to `rows`, in their order; what `path` lacks is made and kept there."""
    if not system.model:
        return read_answers(system, rows, task)
    settings = settings_of(system, task, args)
    wanted = [{"id": row["id"], "text": row["text"], "settings": settings} for row in rows]
    if isinstance(system.model, str):
        ask_endpoint(name, system, wanted, path, task, args)
    else:
        with appending(path) as log:
            if left := table.missing(path, wanted, KEY):
                records = generate(system, left, task, settings, args)
                for record in tqdm(records, f"{name} answers", len(left), unit="text"):
                    append_record(log, record)
            else:
                print(f"{name}: all answers are there")
    records = table.load(path, wanted, KEY)
    if n_lacking := len(rows) - len(records):
        raise UserError(f"{n_lacking} of {len(rows)} texts have no answer by {name}; run again")
    return list(records.values())


def answers_path(config: RunConfig, name: str) -> Path:
    """outputs/RUN/eval/answers/SYSTEM.jsonl, the system's name made a file name."""
    return config.eval_dir / "answers" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.jsonl"


def read_asked(config: RunConfig) -> dict[str, dict]:
    """system -> the settings with which it was asked last."""
    path = config.eval_dir / "answers/asked.json"
    return json.loads(path.read_text()) if path.exists() else {}


def answer_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Complete the answers of all systems that `args` names."""
    systems, asked = systems_of(config, args.systems), read_asked(config)
    asked |= {s: settings_of(one, config.task, args) for s, one in systems.items() if one.model}
    # All of them before the first answer: what is half made is never scored beside another's.
    write_text(config.eval_dir / "answers/asked.json", json.dumps(asked, indent=1) + "\n")
    for name, system in systems.items():
        answer_rows(name, system, rows, answers_path(config, name), config.task, args)


def load_answers(
    config: RunConfig, rows: list[dict], systems: list[str] | None, asked: dict | None = None
) -> dict[str, dict[str, dict]]:
    """system -> id -> record, as they were asked for last, or with the settings in `asked`.

    Raises UserError if a system lacks a text.
    """
    asked, answers = asked or read_asked(config), {}
    for name in systems or config.task.systems:
        path = answers_path(config, name)
        if name in ("lead", "second"):
            records = read_answers(systems_of(config, [name])[name], rows, config.task)
            answers[name] = {record["id"]: record for record in records}
            continue
        if name not in asked:
            raise UserError(f"{path} was not asked for yet; make it with `just answers`")
        wanted = [{"id": row["id"], "settings": asked[name]} for row in rows]
        answers[name] = table.load(path, wanted, KEY)
        if lacking := len(rows) - len(answers[name]):
            raise UserError(
                f"{path} lacks {lacking} of {len(rows)} texts with the settings asked for last; "
                "complete them with the same `just answers`, ask for the earlier settings again, "
                "or pass the same --n"
            )
    return answers


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--batch-tokens", type=positive, default=16384, help="most tokens of a padded batch")
    option("--budget-usd", type=float, help="ceiling for all that the endpoints ever cost")
    option("--concurrency", type=positive, default=64, help="most requests in flight")
    option("--timeout", type=float, default=300, help="seconds to wait for an endpoint")
    option("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which texts")
    args = parser.parse_args()
    config = run_of(args)
    if args.split == "test":
        return answer_all(config, load_test_rows(config, args.n), args)
    args.systems = args.systems or ["instructed"]
    answer_all(config, load_train_rows(config, args.data, args.n), args)


if __name__ == "__main__":
    run(main)
