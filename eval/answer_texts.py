"""Answer the test texts with every system: models, adapters, endpoints, the first sentences.

Reads the test split of the run's dataset, or with --split train the extracts that have a reply, and
appends batch by batch to outputs/RUN/eval/answers/SYSTEM.jsonl. Every record carries the digest of
the very messages that it answers and the settings that made it; others stay, and asked.json there
says which settings were asked for last. A killed run goes on where it stopped. Endpoints are named
by TOGETHER_BASE_URL. Greedy decoding, but for `consensus`: the tuned model's greedy answer and some
samples, of which the one most like all of them is taken.

    python -m eval.answer_texts smollm2-135m-dpo-sft-lora --n 32
"""

import argparse
import json
import re
from collections import Counter, deque
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from tqdm import tqdm

from common import table
from common.cli import UserError, not_negative, one_line, positive, run, script_parser, warn
from common.files import (
    append_record,
    appending,
    digest,
    locked,
    read_json,
    read_records,
    write_text,
)
from common.text import control_tokens, count_words, plain_text, words_of
from data_prep.teacher.teacher_prompts import prompt_digest
from inference.weights import OutOfMemory, load_model, memory_told, precision
from inference.served_model import NoEndpoint, address_of, describe_served
from eval.systems import (
    System,
    add_run_options,
    load_test_rows,
    run_of,
    systems_of,
    template_of,
    train_rows,
)
from prompts.task import Task, load_task
from training.chat import build_chat
from training.run_config import RunConfig

KEY = ("id", "prompt", "settings")
# Part of what tells a consensus' answers from others: how its samples are drawn.
SAMPLING = "Gumbel noise, seeded by the prompt"


def build_prompt(
    tokenizer, text: str, template: str | None, max_tokens: int, task: Task | None = None
) -> tuple[str, int]:
    """(prompt, number of tokens cut off the text's end so that the prompt fits)."""
    task = task or load_task()

    def prompt_of(part: str) -> str:
        return build_chat(tokenizer, task.student_messages(part, template))

    def tokens_over(prompt: str) -> int:
        return len(tokenizer(prompt, add_special_tokens=False).input_ids) - max_tokens

    prompt = prompt_of(text)
    over = tokens_over(prompt)
    if over <= 0:
        return prompt, 0
    ids = tokenizer(plain_text(text, control_tokens(tokenizer)), add_special_tokens=False).input_ids
    cut = 0
    while over > 0:  # once more where the template makes more of a shorter text
        cut += over
        if cut >= len(ids):
            raise UserError(f"--max-prompt-tokens {max_tokens} leaves no room for any text")
        prompt = prompt_of(tokenizer.decode(ids[:-cut]))
        over = tokens_over(prompt)
    return prompt, cut


def most_alike(texts: list[str]) -> int:
    """Index of the text that is most like all of them, by ROUGE-L's F1 of words: minimum Bayes risk
    decoding (Kumar and Byrne 2004) where they are samples of one model."""
    words = [words_of(text) or [""] for text in texts]
    return int(cdist(words, words, scorer=Indel.normalized_similarity).mean(axis=1).argmax())


class SeededNoise:
    """Makes greedy decoding draw samples at temperature 1: Gumbel noise on the logits (Gumbel-max,
    Maddison et al. 2014, arXiv:1411.0030), of a generator for each prompt.

    So the samples of a prompt do not depend on the batch that it falls into, but for the rounding
    of the logits: in bfloat16 a batch of another width may turn a close choice.
    """

    def __init__(self, prompts: list[str], samples: int, device):
        import torch

        self.samples, self.generators = samples, []
        for prompt in prompts:
            seed = int(digest(prompt), 16) % 2**63
            self.generators.append(torch.Generator(device).manual_seed(seed))

    def __call__(self, input_ids, logits):
        """Logits of shape (prompts * samples, vocabulary), the samples of a prompt side by side."""
        import torch

        noise = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        of_prompts = noise.unflatten(0, (-1, self.samples))
        for drawn, generator in zip(of_prompts, self.generators, strict=True):
            drawn.exponential_(generator=generator)
        # Minus the log of an exponential is Gumbel's. A 0, which 24 bits of chance round a small
        # one to, would be infinite.
        return logits.float() - noise.clamp_(min=2**-25).log_()


def draw_samples(model, inputs: dict, samples: int, n_new: int, prompts: list[str]):
    """(prompts * samples, tokens): as many sampled continuations of each prompt, side by side. A
    prompt is read once for all of its samples; generate alone would read it for each. The texts of
    the `prompts` seed the samples."""
    from transformers import DynamicCache, LogitsProcessorList

    cache, read = DynamicCache(config=model.config), {k: v[:, :-1] for k, v in inputs.items()}
    model.generate(**read, max_new_tokens=1, past_key_values=cache)
    cache.batch_repeat_interleave(samples)
    noise = LogitsProcessorList([SeededNoise(prompts, samples, model.device)])
    inputs = {k: v.repeat_interleave(samples, 0) for k, v in inputs.items()}
    return model.generate(
        **inputs, max_new_tokens=n_new, past_key_values=cache, logits_processor=noise
    )


def generate_batch(
    model, tokenizer, prompts: list[str], n_new: int, samples: int = 0, **options
) -> list[dict]:
    """A record for each greedy continuation of a batch, cut at the end of the turn; or, of it and
    as many `samples`, for the one that is most like them all. Raises OutOfMemory."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs = inputs.to(model.device)
    with memory_told("lower --max-prompt-tokens, --max-new-tokens or --samples"):
        made = [model.generate(**inputs, max_new_tokens=n_new, **options)]
        if samples:
            made.append(draw_samples(model, inputs, samples, n_new, prompts))
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


def settings_of(
    system: System, task: Task, args: argparse.Namespace, known: dict | None = None
) -> dict:
    """All that tells a model's answers from those that it gives otherwise, but for what it is asked
    (see `prompt_digest`). An endpoint that does not answer is taken to serve what it did when it
    was asked last, by its `known` settings. Raises UserError if there are none."""
    settings = {"template": task.sha(system.template) if system.template else None}
    settings["max_new_tokens"] = args.max_new_tokens or task.max_new_tokens
    if isinstance(system.model, str):
        settings |= {"model": system.model, "endpoint": address_of()}
        try:
            return settings | {"served": describe_served(system.model)}
        except NoEndpoint as error:
            if not known or {key: known.get(key) for key in settings} != settings:
                raise
            warn(f"{error}; it is taken to serve what it did before")
            return settings | {"served": known.get("served")}
    settings |= {"max_prompt_tokens": args.max_prompt_tokens, "precision": precision()}
    if system.consensus:
        settings |= {"samples": args.samples, "sampling": SAMPLING}
    return settings | system.model.settings


def prompt_limit(model, settings: dict) -> int:
    """The longest prompt that leaves room for an answer. Raises UserError if there is none."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:  # a model without such a limit
        return settings["max_prompt_tokens"]
    room = context - settings["max_new_tokens"]
    if room < 1:
        asked = f"--max-new-tokens {settings['max_new_tokens']}"
        raise UserError(f"{asked} leaves no room in a context of {context} tokens")
    return min(settings["max_prompt_tokens"], room)


def ask_endpoint(system: System, requests: list[dict], path: Path, args) -> None:
    """Complete the answers of a model behind an endpoint, asked as the teacher is."""
    from data_prep.teacher.ask import ask_all

    how = {"model": system.model, "max_tokens": requests[0]["settings"]["max_new_tokens"]}
    how |= {"temperature": 0.0, "max_rate": None, "retry_refused": True}
    how |= {"batch": False, "timeout": 300}
    how = argparse.Namespace(**vars(args) | how)
    ask_all(requests, path, how, system.model, KEY, cut_counts=True)


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
    """id -> record of the answers that need no model, lead and second. Raises UserError."""
    words = task.lead_words or float(np.mean([count_words(row["reference"]) for row in rows]))
    texts = [row["second"] for row in rows]
    if name != "second":
        texts = [first_sentences(row["text"], words, bool(task.lead_words)) for row in rows]
    elif not all(texts):
        raise UserError("the test split holds no second answers of the teacher; leave out second")
    made = {"finish_reason": "stop", "settings": {"model": None, "words": words}}
    return {row["id"]: {"text": text, **made} for row, text in zip(rows, texts, strict=True)}


def requests_of(rows: list[dict], template: str | None, task: Task, settings: dict) -> list[dict]:
    """What each of `rows` {id, text} is asked, and by what its answer is found again."""
    requests = []
    for row in rows:
        messages = task.student_messages(row["text"], template)
        request = {"id": row["id"], "prompt": prompt_digest(messages), "settings": settings}
        requests.append(request | {"messages": messages})
    return requests


def answer_rows(
    name: str,
    system: System,
    rows: list[dict],
    path: Path,
    task: Task,
    args: argparse.Namespace,
    settings: dict | None = None,
) -> None:
    """Append to `path` the answers of a system with a model to those of `rows` that it lacks; with
    its `settings`, if they are known already."""
    settings = settings or settings_of(system, task, args)
    wanted = requests_of(rows, system.template, task, settings)
    if isinstance(system.model, str):
        return ask_endpoint(system, wanted, path, args)
    texts = {row["id"]: row["text"] for row in rows}
    with appending(path) as log, tqdm(desc=f"{name} answers", unit="text") as bar:
        if not (left := table.missing(path, wanted, KEY)):
            return
        if old := sum("prompt" not in record for record in read_records(path)):
            told = "are of an earlier version and do not tell to which text they are"
            print(f"{path}: {old:,} answers {told}; they stay, and are made again", flush=True)
        model, tokenizer = load_model(system.model)
        limit, template = prompt_limit(model, settings), system.template
        built = [build_prompt(tokenizer, texts[r["id"]], template, limit, task) for r in left]
        bar.reset(len(left))
        samples = settings.get("samples", 0)
        batch_tokens = args.batch_tokens // (samples or 1)
        prompts = [prompt for prompt, _ in built]
        n_new = settings["max_new_tokens"]
        for i, output in answer_prompts(model, tokenizer, prompts, n_new, batch_tokens, samples):
            about = {key: left[i][key] for key in KEY}
            append_record(log, about | {"n_cut_tokens": built[i][1]} | output)
            bar.update()


def answer_prompts(
    model, tokenizer, prompts: list[str], n_new: int, batch_tokens: int, samples: int
) -> Iterator[tuple[int, dict]]:
    """(index of a prompt, its record) batch by batch; a batch that the memory does not hold is
    halved. Raises OutOfMemory for a prompt that is too large alone."""
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in prompts]
    batches = deque(pack_batches(lengths, n_new, batch_tokens))
    while batches:
        batch = batches.popleft()
        of_batch = [prompts[i] for i in batch]
        try:
            outputs = generate_batch(model, tokenizer, of_batch, n_new, samples)
        except OutOfMemory as error:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            batches.extendleft([batch[half:], batch[:half]])
            warn(f"{one_line(error, 80)}: batches of {half}, as with a smaller --batch-tokens")
            continue
        yield from zip(batch, outputs, strict=True)


def answers_path(config: RunConfig, name: str) -> Path:
    """outputs/RUN/eval/answers/SYSTEM.jsonl, the system's name made a file name."""
    file = re.sub(r"[^A-Za-z0-9.-]", "_", name)
    if len(file) > 200:  # a file name has 255 bytes at most
        file = f"{file[:180]}-{digest(name)}"
    return config.eval_dir / "answers" / f"{file}.jsonl"


def answer_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Complete the answers of all systems that `args` names. Raises UserError if one lacks some."""
    systems, path = systems_of(config, args.systems), config.eval_dir / "answers/asked.json"
    known, asked = read_json(path), {}
    for name, system in systems.items():
        if system.model:
            asked[name] = settings_of(system, config.task, args, known.get(name))
    for name in systems.keys() - asked.keys():
        read_answers(name, rows, config.task)  # raises, before any work, where there are none
    # All of them before the first answer: what is half made is never scored beside another's.
    with locked(path):
        write_text(path, json.dumps(read_json(path) | asked, indent=1) + "\n")
    for name, settings in asked.items():
        path = answers_path(config, name)
        answer_rows(name, systems[name], rows, path, config.task, args, settings)
    load_answers(config, rows, list(asked), asked)


def load_answers(config: RunConfig, rows: list[dict], systems=None, asked=None) -> dict[str, dict]:
    """system -> id -> record, with the settings in `asked`, by default those asked for last; of
    all systems of the task, if none are named. What an endpoint gave that is no answer counts as an
    empty one, with the reason in `unusable`. Raises UserError if a system lacks a text."""
    asked, answers = asked or read_json(config.eval_dir / "answers/asked.json"), {}
    for name in config.task.systems if systems is None else systems:
        if name in ("lead", "second"):
            answers[name] = read_answers(name, rows, config.task)
            continue
        if name not in asked:
            raise UserError(f"{name} was not asked for yet; make its answers with `just answers`")
        path = answers_path(config, name)
        wanted = requests_of(rows, template_of(config.task, name), config.task, asked[name])
        found = table.load(path, wanted, KEY)
        if lacking := len(rows) - len(found):
            said = f"{path} lacks {lacking} of {len(rows)} texts with the settings asked for last"
            raise UserError(f"{said}; the same `just answers` makes them, or pass the same --n")
        answers[name] = {i: usable(record) for i, record in found.items()}
        if reasons := Counter(r["unusable"] for r in answers[name].values() if "unusable" in r):
            counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            hint = "`just answers` with --retry-unusable asks for them again"
            warn(f"{name}: {counts} of {len(rows)}, no answers, count as empty ones; {hint}")
    return answers


def usable(record: dict) -> dict:
    """A record of an answer; one that is none (filtered, broken off) without its text. One that
    was cut at the token limit is an answer, as of a model of our own."""
    reason = record.get("unusable")
    if reason and record.get("finish_reason") != "length":
        return record | {"text": "", "unusable": reason}
    return {field: value for field, value in record.items() if field != "unusable"}


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--samples", type=positive, default=16, help="of which `consensus` takes one")
    option("--batch-tokens", type=positive, default=16384, help="most tokens of a padded batch")
    option("--budget-usd", type=not_negative, help="ceiling for all that the endpoints ever cost")
    option("--concurrency", type=positive, default=64, help="most requests to an endpoint at once")
    option(
        "--price", type=not_negative, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens"
    )
    again = "ask an endpoint again where its reply was no answer: filtered, broken off"
    option("--retry-unusable", action="store_true", help=again)


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
