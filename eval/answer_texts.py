"""Answer the test texts with every system: models, adapters, endpoints, the first sentences.

Reads the test split of the run's dataset, or with --split train the extracts that have a reply, and
appends batch by batch to outputs/RUN/eval/answers/SYSTEM.jsonl. Every record carries the digest of
the very messages that it answers and the settings that made it; others stay, and asked.json there
says which settings were asked for last. A killed run goes on where it stopped. Endpoints are named
by TOGETHER_BASE_URL. Greedy decoding, but for `consensus`: the tuned model's greedy answer and some
samples, of which the one most like all of them is taken. With --split unseen, of extracts without
a reply, all samples of the tuned model are kept (samples.jsonl), to make pairs of.

    python -m eval.answer_texts smollm2-135m-dpo-sft-lora --n 32
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from common import table
from common.cli import UserError, not_negative, positive, run, script_parser, warn
from common.files import digest, locked, read_json, write_text
from common.text import count_words
from eval.systems import (
    WITHOUT_MODEL,
    add_run_options,
    load_test_rows,
    run_of,
    sampled_system,
    systems_of,
    template_of,
    train_rows,
    unseen_rows,
)
from inference.answers import KEY, AnswerOptions, System, answer_rows, requests_of, settings_of
from inference.vllm_engine import ENGINES
from prompts.task import Task, cut_to_words
from training.config import RunConfig

SAMPLES = "samples"  # the name of the table that holds all samples of the tuned model


def first_sentences(text: str, words: float, cut: bool = False) -> str:
    """As many of the first sentences as come nearest to `words`, or the first one, cut to them."""
    from pysbd import Segmenter

    beginning = " ".join(text[: 2000 + int(30 * words)].split())
    sentences = [one.strip() for one in Segmenter(language="en").segment(beginning)]
    if cut:
        return " ".join(sentences[0].split()[: int(words)])
    lengths = np.cumsum([count_words(sentence) for sentence in sentences])
    return " ".join(sentences[: np.abs(lengths - words).argmin() + 1])


def read_answers(name: str, rows: list[dict], task: Task) -> dict[str, dict]:
    """id -> record of the answers that need no model (WITHOUT_MODEL). Raises UserError."""
    words = task.lead_words or float(np.mean([count_words(row["reference"]) for row in rows]))
    if name == "lead-1":
        words = 0  # the first sentence alone comes nearest to it
    texts = [row["second"] for row in rows]
    if name != "second":
        cut = name == "lead" and bool(task.lead_words)
        texts = [first_sentences(row["text"], words, cut) for row in rows]
    elif not all(texts):
        raise UserError("the test split holds no second answers of the teacher; leave out second")
    made = {"finish_reason": "stop", "settings": {"model": None, "words": words}}
    return {row["id"]: {"text": text, **made} for row, text in zip(rows, texts, strict=True)}


def answers_path(config: RunConfig, name: str) -> Path:
    """outputs/RUN/eval/answers/SYSTEM.jsonl, the system's name made a file name."""
    file = re.sub(r"[^A-Za-z0-9.-]", "_", name)
    if len(file) > 200:  # a file name has 255 bytes at most
        file = f"{file[:180]}-{digest(name)}"
    return config.eval_dir / "answers" / f"{file}.jsonl"


def answer_all(
    config: RunConfig, rows: list[dict], names: list[str] | None, options: AnswerOptions
) -> None:
    """Complete the answers of the named systems, by default the task's, to `rows`. Raises UserError
    if one lacks some."""
    asked = answer_systems(config, systems_of(config, names), rows, options)
    load_answers(config, rows, list(asked), asked)


def answer_systems(
    config: RunConfig, systems: dict[str, System], rows: list[dict], options: AnswerOptions
) -> dict[str, dict]:
    """Complete the answers of systems to `rows`; return the settings of those with a model, by
    name. Raises UserError if one cannot be asked."""
    path = config.eval_dir / "answers/asked.json"
    known, asked = read_json(path), {}
    for name, system in systems.items():
        if system.model:
            asked[name] = settings_of(system, config.task, options, known.get(name))
    for name in systems.keys() - asked.keys():
        read_answers(name, rows, config.task)  # raises, before any work, where there are none
    # All of them before the first answer: what is half made is never scored beside another's.
    with locked(path):
        write_text(path, json.dumps(read_json(path) | asked, indent=1) + "\n")
    for name, settings in asked.items():
        path = answers_path(config, name)
        answer_rows(systems[name], rows, path, config.task, options, settings)
    return asked


def load_answers(config: RunConfig, rows: list[dict], systems=None, asked=None) -> dict[str, dict]:
    """system -> id -> record, with the settings in `asked`, by default those asked for last; of
    all systems of the task, if none are named. What an endpoint gave that is no answer counts as an
    empty one, with the reason in `unusable`. Raises UserError if a system lacks a text."""
    asked, answers = asked or read_json(config.eval_dir / "answers/asked.json"), {}
    for name in config.task.systems if systems is None else systems:
        source, n_words = cut_to_words(name)
        if source in WITHOUT_MODEL:
            records = read_answers(source, rows, config.task)
        else:
            settings = asked.get(name) or asked.get(source)
            records = read_model_answers(config, rows, source, settings)
        if n_words:
            records = {key: first_words(record, n_words) for key, record in records.items()}
        answers[name] = records
    return answers


def read_model_answers(
    config: RunConfig, rows: list[dict], name: str, settings: dict | None
) -> dict[str, dict]:
    """id -> record of the answers of a system with a model. Raises UserError if it lacks a text."""
    if not settings:
        raise UserError(f"{name} was not asked for yet; make its answers with `just answers`")
    path = answers_path(config, name)
    wanted = requests_of(rows, template_of(config.task, name), config.task, settings)
    found = table.load(path, wanted, KEY)
    if lacking := len(rows) - len(found):
        said = f"{path} lacks {lacking} of {len(rows)} texts with the settings asked for last"
        raise UserError(f"{said}; the same `just answers` makes them, or pass the same --n")
    records = {key: usable(record) for key, record in found.items()}
    if reasons := Counter(r["unusable"] for r in records.values() if "unusable" in r):
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        hint = "`just answers` with --retry-unusable asks for them again"
        warn(f"{name}: {counts} of {len(rows)}, no answers, count as empty ones; {hint}")
    return records


def first_words(record: dict, n_words: int) -> dict:
    """A record with no more than the first words of its answer; of a longer one the limit of tokens
    cut nothing that is kept."""
    words = record["text"].split()
    if len(words) <= n_words:
        return record
    return record | {"text": " ".join(words[:n_words]), "finish_reason": "stop"}


def usable(record: dict) -> dict:
    """A record of an answer; one that is none (filtered, broken off) without its text. One that
    was cut at the token limit is an answer, as of a model of our own."""
    reason = record.get("unusable")
    if reason and record.get("finish_reason") != "length":
        return record | {"text": "", "unusable": reason}
    return {field: value for field, value in record.items() if field != "unusable"}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How a model of one's own answers."""
    option = parser.add_argument
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    engines = "auto: vLLM where it and a GPU are there, else transformers"
    option("--engine", choices=ENGINES, default="auto", help=engines)
    option("--samples", type=positive, default=16, help="of `consensus`, or of --split unseen")
    option("--batch-tokens", type=positive, default=16384, help="most tokens of a padded batch")


def add_endpoint_options(parser: argparse.ArgumentParser) -> None:
    """How a model behind an endpoint is asked."""
    option = parser.add_argument
    option("--budget-usd", type=not_negative, help="ceiling for all that the endpoints ever cost")
    option("--concurrency", type=positive, default=64, help="most requests to an endpoint at once")
    option(
        "--price", type=not_negative, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens"
    )
    again = "ask an endpoint again where its reply was no answer: filtered, broken off"
    option("--retry-unusable", action="store_true", help=again)


def answer_options(args: argparse.Namespace) -> AnswerOptions:
    """How texts are answered, of a command line with both groups of options above."""
    return AnswerOptions(
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        samples=args.samples,
        batch_tokens=args.batch_tokens,
        engine=args.engine,
        budget_usd=args.budget_usd,
        concurrency=args.concurrency,
        price=args.price,
        retry_unusable=args.retry_unusable,
    )


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    add_endpoint_options(parser)
    which = "which texts; unseen: extracts without a reply, all samples of the tuned model"
    parser.add_argument("--split", choices=("test", "train", "unseen"), default="test", help=which)
    args = parser.parse_args()
    config, options = run_of(args), answer_options(args)
    if args.split == "test":
        systems_of(config, args.systems)  # before the dataset is had
        answer_all(config, load_test_rows(config, args.n), args.systems, options)
    elif args.split == "train":
        systems = args.systems or ["instructed"]
        without_model = set(WITHOUT_MODEL) & set(systems)
        if without_model:
            named = ", ".join(sorted(without_model))
            raise UserError(f"{named}: only a model answers the training texts")
        answer_all(config, train_rows(config, args.data, args.n), systems, options)
    else:
        if args.systems not in (None, ["tuned"]):
            raise UserError("--split unseen: only the tuned model is sampled")
        rows = unseen_rows(config, args.data, args.n)
        answer_systems(config, {SAMPLES: sampled_system(config)}, rows, options)


if __name__ == "__main__":
    run(main)
