"""Answer the test texts with every system: models, adapters, endpoints, the first sentences.

Reads the test split of the run's dataset, or with --split train the extracts that have a reply, and
appends batch by batch to outputs/RUN/eval/answers/SYSTEM.jsonl. Every record carries the settings
that made it; those of other settings stay, and asked.json there says which were asked for last. A
killed run goes on where it stopped. Endpoints are named by TOGETHER_BASE_URL. Greedy decoding, but
for `consensus`: the tuned model's greedy answer and some samples, of which the one most like all of
them is taken.

    python -m eval.generate_answers smollm2-135m-dpo-sft-lora --n 32
"""

import argparse
import json
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from tqdm import tqdm

from common import table
from common.cli import UserError, positive, run, script_parser
from common.files import append_record, appending, read_json, write_text
from eval.load_model import load_model, precision
from eval.systems import System, add_run_options, load_test_rows, run_of, systems_of, train_rows
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

    over = len(tokenizer(prompt_of(text), add_special_tokens=False).input_ids) - max_tokens
    if over <= 0:
        return prompt_of(text), 0
    ids = tokenizer(text, add_special_tokens=False).input_ids
    if over >= len(ids):
        raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
    return prompt_of(tokenizer.decode(ids[:-over])), over


def most_alike(texts: list[str]) -> int:
    """Index of the text that is most like all of them, by ROUGE-L's F1 of words: minimum Bayes risk
    decoding (Kumar and Byrne 2004) where they are samples of one model."""
    words = [re.findall(r"\w+", text.lower()) or [""] for text in texts]
    return int(cdist(words, words, scorer=Indel.normalized_similarity).mean(axis=1).argmax())


def draw_samples(model, inputs: dict, samples: int, n_new: int):
    """(prompts * samples, tokens): as many sampled continuations of each prompt, side by side. A
    prompt is read once for all of its samples; generate alone would read it for each."""
    from transformers import DynamicCache, set_seed

    set_seed(0)
    cache, read = DynamicCache(config=model.config), {k: v[:, :-1] for k, v in inputs.items()}
    model.generate(**read, max_new_tokens=1, past_key_values=cache)
    cache.batch_repeat_interleave(samples)
    how = {"past_key_values": cache, "do_sample": True, "temperature": 1.0, "top_k": 0}
    inputs = {k: v.repeat_interleave(samples, 0) for k, v in inputs.items()}
    return model.generate(**inputs, max_new_tokens=n_new, **how)


def generate_batch(
    model, tokenizer, prompts: list[str], n_new: int, samples: int = 0, **options
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn; or, of it and
    as many `samples`, for the one that is most like them all."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = inputs.to(model.device)
    made = [model.generate(**inputs, max_new_tokens=n_new, **options)]
    made += [draw_samples(model, inputs, samples, n_new)] if samples else []
    # (prompts, one or `samples`, tokens)
    made = [m[:, inputs.input_ids.shape[1] :].unflatten(0, (len(prompts), -1)) for m in made]
    results, ends = [], model.generation_config.eos_token_id
    for i, n_prompt in enumerate(inputs.attention_mask.sum(1).tolist()):
        rows = [ids for part in made for ids in part[i].tolist()]
        answers = [list(takewhile(lambda token: token not in ends, ids)) for ids in rows]
        texts = [one.strip() for one in tokenizer.batch_decode(answers, skip_special_tokens=True)]
        best = most_alike(texts)
        end = "length" if len(answers[best]) == len(rows[best]) else "stop"
        counts = {"n_prompt_tokens": n_prompt, "n_new_tokens": len(answers[best])}
        results.append({"text": texts[best], "finish_reason": end, **counts})
    return results


def pack_batches(lengths: list[int], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the prompts in batches of like length, the longest first; a batch, padded and
    with its answers, holds at most `batch_tokens`, or a single prompt."""
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
        return made | {"model": system.model}
    made |= {"max_prompt_tokens": args.max_prompt_tokens, "precision": precision()}
    made |= {"samples": args.samples} if system.consensus else {}
    return made | system.model.settings


def prompt_limit(model, settings: dict) -> int:
    """The longest prompt that leaves room for an answer."""
    room = model.config.max_position_embeddings - settings["max_new_tokens"]
    return min(settings["max_prompt_tokens"], room)


def ask_endpoint(system: System, rows: list[dict], path: Path, task: Task, args) -> None:
    """Complete the answers of a model behind an endpoint, asked as the teacher is."""
    from data_prep.teacher.ask import ask_all

    for row in rows:
        row["messages"] = task.student_messages(row.pop("text"), system.template)
    how = {"model": system.model, "max_tokens": rows[0]["settings"]["max_new_tokens"]}
    how |= {"temperature": 0.0, "max_rate": None, "retry_refused": True}
    how |= {"batch": False, "timeout": 300}
    how = argparse.Namespace(**vars(args) | how)
    ask_all(rows, path, how, system.model, KEY, cut_counts=True)


def first_sentences(text: str, words: float, cut: bool = False) -> str:
    """As many of the first sentences as come nearest to `words`, or the first one, cut to them."""
    from pysbd import Segmenter

    beginning = " ".join(text[: 2000 + int(30 * words)].split())
    sentences = [one.strip() for one in Segmenter(language="en").segment(beginning)]
    if cut:
        return " ".join(sentences[0].split()[: int(words)])
    lengths = np.cumsum([len(sentence.split()) for sentence in sentences])
    return " ".join(sentences[: np.abs(lengths - words).argmin() + 1])


def read_answers(name: str, rows: list[dict], task: Task) -> dict[str, dict]:
    """id -> record of the answers that need no model, lead and second. Raises UserError."""
    words = task.lead_words or float(np.mean([len(row["reference"].split()) for row in rows]))
    texts = [row["second"] for row in rows]
    if name != "second":
        texts = [first_sentences(row["text"], words, bool(task.lead_words)) for row in rows]
    elif not all(texts):
        raise UserError("the test split holds no second answers of the teacher; leave out second")
    made = {"finish_reason": "stop", "settings": {"model": None, "words": words}}
    return {row["id"]: {"text": text, **made} for row, text in zip(rows, texts, strict=True)}


def answer_rows(name: str, system: System, rows: list[dict], path: Path, task: Task, args) -> None:
    """Append to `path` the answers of a system with a model to those of `rows` that it lacks."""
    settings = settings_of(system, task, args)
    wanted = [{"id": row["id"], "text": row["text"], "settings": settings} for row in rows]
    if isinstance(system.model, str):
        return ask_endpoint(system, wanted, path, task, args)
    with appending(path) as log, tqdm(desc=f"{name} answers", unit="text") as bar:
        if not (left := table.missing(path, wanted, KEY)):
            return
        model, tokenizer = load_model(system.model)
        n_new, limit = settings["max_new_tokens"], prompt_limit(model, settings)
        built = [build_prompt(tokenizer, row["text"], system.template, limit, task) for row in left]
        lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text, _ in built]
        bar.reset(len(left))
        samples = settings.get("samples", 0)
        for batch in pack_batches(lengths, n_new, args.batch_tokens // (samples or 1)):
            outputs = generate_batch(model, tokenizer, [built[i][0] for i in batch], n_new, samples)
            for i, output in zip(batch, outputs, strict=True):
                about = {"id": left[i]["id"], "settings": settings, "n_cut_tokens": built[i][1]}
                append_record(log, about | output)
                bar.update()


def answers_path(config: RunConfig, name: str) -> Path:
    """outputs/RUN/eval/answers/SYSTEM.jsonl, the system's name made a file name."""
    return config.eval_dir / "answers" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.jsonl"


def answer_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Complete the answers of all systems that `args` names. Raises UserError if one lacks some."""
    systems, path = systems_of(config, args.systems), config.eval_dir / "answers/asked.json"
    asked = {s: settings_of(one, config.task, args) for s, one in systems.items() if one.model}
    for name in systems.keys() - asked.keys():
        read_answers(name, rows, config.task)  # raises, before any work, where there are none
    # All of them before the first answer: what is half made is never scored beside another's.
    write_text(path, json.dumps(read_json(path) | asked, indent=1) + "\n")
    for name in asked:
        answer_rows(name, systems[name], rows, answers_path(config, name), config.task, args)
    load_answers(config, rows, list(asked))


def load_answers(config: RunConfig, rows: list[dict], systems=None, asked=None) -> dict[str, dict]:
    """system -> id -> record, with the settings in `asked`, by default those asked for last; of
    all systems of the task, if none are named. Raises UserError if a system lacks a text."""
    asked, answers = asked or read_json(config.eval_dir / "answers/asked.json"), {}
    for name in config.task.systems if systems is None else systems:
        if name in ("lead", "second"):
            answers[name] = read_answers(name, rows, config.task)
            continue
        if name not in asked:
            raise UserError(f"{name} was not asked for yet; make its answers with `just answers`")
        path = answers_path(config, name)
        wanted = [{"id": row["id"], "settings": asked[name]} for row in rows]
        answers[name] = table.load(path, wanted, KEY)
        if lacking := len(rows) - len(answers[name]):
            said = f"{path} lacks {lacking} of {len(rows)} texts with the settings asked for last"
            raise UserError(f"{said}; the same `just answers` makes them, or pass the same --n")
    return answers


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--samples", type=positive, default=16, help="of which `consensus` takes one")
    option("--batch-tokens", type=positive, default=16384, help="most tokens of a padded batch")
    option("--budget-usd", type=float, help="ceiling for all that the endpoints ever cost")
    option("--concurrency", type=positive, default=64, help="most requests to an endpoint at once")
    option("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_generation_options(parser)
    parser.add_argument("--split", choices=("test", "train"), default="test", help="which texts")
    args = parser.parse_args()
    config = run_of(args)
    if args.split == "test":
        systems_of(config, args.systems)  # before the dataset is had
        return answer_all(config, load_test_rows(config, args.n), args)
    args.systems = args.systems or ["instructed"]
    if without_model := {"lead", "second"}.intersection(args.systems):
        raise UserError(f"{', '.join(without_model)}: only a model answers the training texts")
    answer_all(config, train_rows(config, args.data, args.n), args)


if __name__ == "__main__":
    run(main)
