"""The answers to documents: streamed to the terminal, or a file each in a folder with their table.

A document that is longer than those the adapter was taught on is read in parts: inference/parts.py.
One that the memory does not hold is told, and the others are answered.
"""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import tell_errors, warn
from common.files import digest, write_text
from common.table import load
from data_prep.filter_pairs import repetition
from inference.answers import (
    KEY,
    AnswerOptions,
    System,
    answer_rows,
    outputs_of,
    requests_of,
    settings_of,
)
from inference.generate import build_prompt, generate_batch
from inference.parts import Cutter, condense, show_parts
from inference.sources import TABLE, Document
from inference.weights import OutOfMemory
from prompts.task import Task


@dataclass(frozen=True)
class Job:
    """What answers texts, and how they are read."""

    system: System
    task: Task
    options: AnswerOptions
    limit: int  # tokens of a prompt; the end of a longer one is left out
    cutter: Cutter | None = None  # None: nothing tells what is long
    whole: bool = False  # a long text is only told
    shows_parts: bool = False

    def in_parts(self, document: Document) -> bool:
        """Whether a document is read in parts; a long one that is not is told."""
        if not self.cutter or not self.cutter.is_long(document.text):
            return False
        if self.whole:
            self.cutter.tell_length(document.called, document.text, "read in one")
        return not self.whole

    def condense(self, document: Document, answer: Callable[[list[str]], list[str]]) -> str:
        """What is to be answered last: what the parts of a long document say, or else its text."""
        if not self.in_parts(document):
            return document.text
        condensed = condense(document.called, document.text, self.cutter, answer)
        if self.shows_parts:
            show_parts(condensed)
        return condensed.text

    def tell_cut(self, name: str, n_cut: int) -> None:
        """Say how much of a text is left out, if any is."""
        if n_cut:
            lost = f"its last {n_cut:,} tokens do not fit into {self.limit:,} and are left out"
            warn(f"{name}: {lost}")


def part_names(parts: list[str]) -> list[str]:
    return [f"part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]


def stream(job: Job, documents: list[Document]) -> int:
    """Print the answers word by word as they come. Returns how many documents have none, which is
    told at once."""
    from transformers import TextStreamer

    system, options = job.system, job.options
    model, tokenizer = options.load(system.model)
    settings = settings_of(system, job.task, options)
    if options.samples:
        how = {"samples": options.samples}
    else:
        how = {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}

    def prompt_of(name: str, text: str) -> str:
        prompt, n_cut = build_prompt(tokenizer, text, system.template, job.limit, job.task)
        job.tell_cut(name, n_cut)
        return prompt

    def answer_parts(parts: list[str]) -> list[str]:
        prompts = list(map(prompt_of, part_names(parts), parts))
        outputs = dict(outputs_of(model, tokenizer, prompts, settings, system, options))
        return [outputs[i]["text"] for i in range(len(parts))]

    def answer(document: Document) -> None:
        name = document.called
        if len(documents) > 1:
            print(f"==> {name} <==", flush=True)
        prompt = prompt_of(name, job.condense(document, answer_parts))
        (record,) = generate_batch(model, tokenizer, [prompt], settings["max_new_tokens"], **how)
        if options.samples:
            print(record["text"], flush=True)
        tell_answer(name, record)

    n_failures = 0
    for document in documents:
        try:
            answer(document)
        except OutOfMemory as error:
            tell_errors(f"{document.called}: {error}")
            n_failures += 1
    return n_failures


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
        texts = []
        for name, part in zip(part_names(parts), parts, strict=True):
            answer = answers[digest(part)]
            self.job.tell_cut(name, answer["n_cut_tokens"])
            texts.append(answer["text"])
        return texts

    def answer_files(self, documents: list[Document]) -> None:
        """Write a file for each document, and say which texts or answers are cut."""
        rows = rows_of(document.text for document in documents)
        try:
            self.complete(rows)
        finally:  # what is there after Ctrl-C, too
            answers = self.load(rows)
            for document in documents:
                answer = answers.get(digest(document.text))
                if answer:
                    write_text(self.folder / document.name, answer["text"] + "\n")
                    self.tell_faults(document.called, answer)

    def tell_faults(self, name: str, answer: dict) -> None:
        """Say what may be wrong with an answer, and nothing of a good one: there may be many."""
        self.job.tell_cut(name, answer["n_cut_tokens"])
        if answer["finish_reason"] == "length":
            tell_answer(name, answer)


def rows_of(texts: Iterable[str]) -> list[dict]:
    """{id, text} of unlike texts."""
    return [{"id": digest(text), "text": text} for text in dict.fromkeys(texts)]


def write(job: Job, documents: list[Document], folder: Path) -> int:
    """Complete the table in the folder, and write from it a file for each document: for those that
    are read in one first, which are answered together, then for one long document after another.
    Returns how many of them have no answer, which is told at once."""
    answers = AnswerFolder(job, folder, settings_of(job.system, job.task, job.options))
    left = [document for document in documents if job.in_parts(document)]
    try:
        answers.answer_files([document for document in documents if document not in left])
    except OutOfMemory:
        job.options.load(job.system.model)  # raises once more if the model itself is too large
        left = documents  # else it is the longest, which comes first, and the others may fit
    n_failures = 0
    for document in left:
        try:
            text = job.condense(document, answers.answer_parts)
            answers.answer_files([replace(document, text=text)])
        except OutOfMemory as error:
            tell_errors(f"{document.called}: {error}")
            n_failures += 1
    return n_failures
