"""Do a task on your own texts with a run's model, a model or adapter folder, or one from the Hub.

Reads text, Markdown, HTML and PDF files, folders of them, web pages, arXiv addresses, or stdin (-).
Streams the answers to stdout, or writes a file for each text into --output-dir, from the table
answers.jsonl there: what it has is not made again, a changed text or another setting is. Prompt and
greedy decoding are the evaluation's. A text that is longer than those the adapter was taught on is
read in parts (inference/parts.py).

    python -m inference.run_task summarize paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.cli import UserError, one_line, positive, run, script_parser, warn
from common.files import digest, write_text
from common.table import load
from data_prep.filter_pairs import repetition
from data_prep.find_documents import shown
from inference.answers import (
    KEY,
    AnswerOptions,
    System,
    answer_rows,
    outputs_of,
    requests_of,
    settings_of,
)
from inference.generate import build_prompt, generate_batch, prompt_limit
from inference.parts import Cutter, condense, make_cutter, show_parts
from inference.sources import TABLE, check_outputs, find_sources, read_texts
from inference.weights import check_template, find_weights, load_model, load_tokenizer, trained_for
from prompts.task import FOLDER, Task, load_task
from training.config import OUTPUTS, check_finished, is_unfinished
from training.lengths import read_lengths


def newest_adapter(task: Task) -> str:
    """The folder of the task's adapter trained last. Raises UserError if there is none."""
    weights = sorted(OUTPUTS.glob("*/adapter_model.safetensors"), key=lambda p: p.stat().st_mtime)
    folders = [path.parent for path in weights if trained_for(path.parent) == task.name]
    finished = [folder for folder in folders if not is_unfinished(folder)]
    if not folders:
        raise UserError(f"{OUTPUTS}/ holds no adapter for {task.name}; train it, or name a --model")
    if not finished:
        check_finished(folders[-1])  # raises
    if finished[-1] != folders[-1]:
        warn(f"{folders[-1]} is passed over, for its training has not ended")
    return str(finished[-1])


@dataclass(frozen=True)
class Job:
    """What answers texts, and how they are read."""

    system: System
    task: Task
    options: AnswerOptions
    cutter: Cutter | None = None  # None: nothing tells what is long
    whole: bool = False  # a long text is only told
    shows_parts: bool = False

    def in_parts(self, file: str, text: str) -> bool:
        """Whether a text is read in parts; a long one that is not is told."""
        if not self.cutter or not self.cutter.is_long(text):
            return False
        if self.whole:
            self.cutter.tell_length(shown(file), text, "read in one")
        return not self.whole

    def condense(self, file: str, text: str, answer: Callable[[list[str]], list[str]]) -> str:
        """What the parts of a long text say (see inference/parts.py)."""
        condensed = condense(shown(file), text, self.cutter, answer)
        if self.shows_parts:
            show_parts(condensed)
        return condensed.text


def stream(job: Job, texts: dict[str, str]) -> None:
    """Print the answers (name -> text) word by word as they come."""
    from transformers import TextStreamer

    system, options = job.system, job.options
    model, tokenizer = options.load(system.model)
    settings = settings_of(system, job.task, options)
    limit = prompt_limit(model, settings)
    if options.samples:
        how = {"samples": options.samples}
    else:
        how = {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}

    def prompt_of(text: str) -> tuple[str, int]:
        return build_prompt(tokenizer, text, system.template, limit, job.task)

    def answer_parts(parts: list[str]) -> list[str]:
        prompts = [prompt_of(part)[0] for part in parts]
        outputs = dict(outputs_of(model, tokenizer, prompts, settings, system, options))
        return [outputs[i]["text"] for i in range(len(parts))]

    for file, text in texts.items():
        name = shown(file)
        if len(texts) > 1:
            print(f"==> {name} <==", flush=True)
        if job.in_parts(file, text):
            text = job.condense(file, text, answer_parts)
        prompt, n_cut = prompt_of(text)
        if n_cut:
            warn(f"{name}: its last {n_cut:,} tokens do not fit into {limit:,} and are left out")
        (answer,) = generate_batch(model, tokenizer, [prompt], settings["max_new_tokens"], **how)
        if options.samples:
            print(answer["text"], flush=True)
        tell_answer(name, answer)


def tell_answer(name: str, answer: dict) -> None:
    """Say how long an answer is, and what may be wrong with it."""
    is_cut = answer["finish_reason"] == "length"
    end = ", stopped at --max-new-tokens" if is_cut else ""
    read, written = answer["n_prompt_tokens"], answer["n_new_tokens"]
    print(f"{name}: {read:,} tokens read, {written} written{end}", file=sys.stderr)
    if is_cut and repetition(answer["text"]) > 0.5:
        advice = "is the text longer than those it was taught on? --parts reads it in parts"
        warn(f"{name}: the answer repeats itself; {advice}")


@dataclass(frozen=True)
class AnswerFolder:
    """A folder of answers: the table of them all, and a file for each text, written from it."""

    job: Job
    folder: Path
    settings: dict  # that tell the job's answers from others in the table

    @property
    def table(self) -> Path:
        return self.folder / TABLE

    def complete(self, rows: list[dict]) -> None:
        """Add to the table the answers to rows {id, text} that it lacks."""
        job = self.job
        answer_rows(job.system, rows, self.table, job.task, job.options, self.settings)

    def load(self, rows: list[dict]) -> dict[str, dict]:
        """id -> the table's record, of those it has."""
        requests = requests_of(rows, self.job.system.template, self.job.task, self.settings)
        return load(self.table, requests, KEY)

    def answer_parts(self, parts: list[str]) -> list[str]:
        rows = rows_of(parts)
        self.complete(rows)
        answers = self.load(rows)
        return [answers[digest(part)]["text"] for part in parts]

    def answer_files(self, texts: dict[str, str]) -> None:
        """Write a file for each text (name -> text)."""
        rows = rows_of(texts.values())
        try:
            self.complete(rows)
        finally:  # what is there after Ctrl-C, too
            answers = self.load(rows)
            for name, text in texts.items():
                answer = answers.get(digest(text))
                if answer:
                    write_text(self.folder / name, answer["text"] + "\n")


def rows_of(texts: Iterable[str]) -> list[dict]:
    """{id, text} of unlike texts."""
    return [{"id": digest(text), "text": text} for text in dict.fromkeys(texts)]


def write(job: Job, texts: dict[str, str], folder: Path) -> None:
    """Complete the table in the folder, and write from it a file for each text (name -> text): of
    those that are read in one first, which are answered together, then of one long text after
    another."""
    answers = AnswerFolder(job, folder, settings_of(job.system, job.task, job.options))
    long = {name: text for name, text in texts.items() if job.in_parts(name, text)}
    answers.answer_files({name: text for name, text in texts.items() if name not in long})
    for name, text in long.items():
        answers.answer_files({name: job.condense(name, text, answers.answer_parts)})


def choose_system(task: Task, model: str | None, of_base: str | None, consensus: bool) -> System:
    """The system that the command line names, which is told. `of_base`: None for the model itself,
    else how its base is asked, "base" or "instructed". Raises UserError."""
    name = model or newest_adapter(task)
    weights = find_weights(name, base=bool(of_base))
    if weights.adapter:
        check_template(Path(weights.adapter), task)
    which = "" if model else f", the adapter for {task.name} that was trained last"
    base = "the base of " if of_base else ""
    print(f"taking {base}{shown(str(name))}{which}; it is loading", file=sys.stderr, flush=True)
    return System(weights, task.student_template(of_base == "instructed"), consensus)


def choose_cutter(system: System, task: Task, of_base: bool, asked: int | None) -> Cutter | None:
    """How a long text is cut: into parts of as many tokens as are asked for, or as the adapter was
    taught on; None where nothing tells that. Raises UserError."""
    weights = system.model
    lengths = None if of_base else read_lengths(Path(weights.adapter or weights.model))
    if not (lengths or asked):
        if weights.adapter:
            unknown = "nothing tells on texts of what length it was taught, so all are read in one"
            print(f"{unknown}; --parts 1000 reads long ones in parts", file=sys.stderr)
        return None
    try:
        tokenizer = load_tokenizer(weights)
    except OSError as error:
        raise UserError(f"cannot load {weights.model}: {one_line(error, 200)}") from None
    return make_cutter(tokenizer, task, system.template, lengths, asked)


def make_parser() -> ArgumentParser:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("task", help="a folder in --prompts-dir, such as summarize")
    option("texts", nargs="+", help="files, folders, https://..., arXiv:ID, - for stdin")
    option("--model", help="run, folder or Hub id (default: the task's adapter trained last)")
    only = parser.add_mutually_exclusive_group()
    of_base = {"action": "store_const", "dest": "of_base"}
    only.add_argument("--base", const="base", help="compare: its base, not instructed", **of_base)
    instructed = "compare: its base, instructed"
    only.add_argument("--instructed", const="instructed", help=instructed, **of_base)
    option("--output-dir", type=Path, help="write a file for each text instead")
    option("--show-text", action="store_true", help="only show the text as it was read")
    option("--private", action="store_true", help="also read addresses in your own network")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, help="read in one, cut to this (default: 8192)")
    in_parts = parser.add_mutually_exclusive_group()
    parts = "read texts that are longer in parts of as many tokens (default: as it was taught on)"
    in_parts.add_argument("--parts", type=positive, metavar="TOKENS", help=parts)
    in_parts.add_argument("--whole", action="store_true", help="read long texts in one")
    option("--show-parts", action="store_true", help="print the parts' answers, too")
    option("--samples", type=positive, help="take the most alike of as many answers; not streamed")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task = load_task(args.task, args.prompts_dir)
    with suppress(AttributeError):  # a terminal of another encoding shows what it can
        sys.stdout.reconfigure(errors="replace")
    sources, failures = find_sources(args.texts, args.output_dir)
    if args.output_dir:
        check_outputs(sources, args.output_dir)
    options = AnswerOptions(
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens or 8192,
        samples=args.samples,
        engine="transformers",  # a few texts are answered before vLLM is up
        load=lru_cache(maxsize=1)(load_model),  # once for all parts of all texts
    )
    job = None
    if not args.show_text:
        system = choose_system(task, args.model, args.of_base, bool(args.samples))
        cutter = choose_cutter(system, task, bool(args.of_base), args.parts)
        whole = args.whole or (args.max_prompt_tokens is not None and not args.parts)
        job = Job(system, task, options, cutter, whole, args.show_parts)
    texts, unread = read_texts(sources, args.private)
    failures += unread
    try:
        if args.show_text:
            print("\n\n".join(texts.values()))
        elif texts and args.output_dir:
            write(job, texts, args.output_dir)
        elif texts:
            stream(job, texts)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
