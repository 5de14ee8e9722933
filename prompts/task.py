"""Tasks: a folder each, with a task.yaml and Jinja templates, and the loader that reads them.

A template that a task's folder lacks is taken from prompts/shared. A variable that a template names
and is not given raises. A folder may come from a stranger: prompts/schema.py says what a task.yaml
may hold, prompts/sandbox.py what a template may do.
"""

import argparse
import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Protocol

from jinja2 import TemplateError, TemplateNotFound, nodes
from jinja2.meta import find_referenced_templates

from common.cli import UserError, one_line
from common.files import digest
from common.text import plain_text
from prompts.sandbox import Offered, TemplateEnvironment, limits
from prompts.schema import read_task_file

FOLDER = Path(__file__).parent
SHARED = FOLDER / "shared"
TITLES = {
    "base": "base, bare text",
    "instructed": "base, instructed",
    "tuned": "tuned adapter",
    "consensus": "tuned adapter, the most alike of several answers",
    "lead": "the text's first sentences (no model)",
    "lead-1": "the text's first sentence (no model)",
    "second": "the teacher's second answer",
}
OTHER_TEMPLATE = "{} is not what the dataset's prompts were made with; `just stage` makes them anew"
MERGED_RUN = re.compile(r"outputs/(?P<run>.+)/merged/?")
CUT_TO_WORDS = re.compile(r"(?P<source>.+):(?P<words>[1-9]\d{0,5})-words")

# What a prompt is about. Each of these that a template is given must show in what it writes.
MARKS = {"text": "textmark", "first": "firstmark", "second": "secondmark"}
# Two texts that a student's prompt is tried with: short, and long with all that may be rewritten.
PROBES = "probe7", 'probe8 <b>&amp;</b> "it\'s" {{ x }} {% y %} \\n\n\n' * 2_000 + "probe9"
PUBLIC = [
    "name",
    "label",
    "hub",
    "answers",
    "criteria",
    "checks",
    "measures",
    "systems",
    "lead_words",
    "max_new_tokens",
    "titles",
    "lowest_score",
    "highest_score",
]


class PublicTask(SimpleNamespace):
    """What a template sees of a task: copies of its fields, and a few functions."""

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Task:
    """A job, as its task.yaml describes it; the comments there say what each field is.

    It is hashed by identity, so that what is made of a task can be cached.
    """

    folder: Path
    label: str
    hub: dict
    answers: int = 2
    criteria: dict[str, int] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    measures: list[str] = field(default_factory=lambda: ["bertscore", "rouge", "extractiveness"])
    systems: list[str] = field(default_factory=lambda: ["base", "instructed", "tuned", "lead"])
    lead_words: int | None = None
    max_new_tokens: int = 512
    titles: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def lowest_score(self) -> int:
        return len(self.criteria)

    @property
    def highest_score(self) -> int:
        return sum(self.criteria.values())

    @cached_property
    def _environment(self) -> TemplateEnvironment:
        return TemplateEnvironment(self.folder, SHARED)

    @cached_property
    def _tried(self) -> set[tuple]:
        """(template, its small variables) of the prompts that were seen to show their text."""
        return set()

    def title(self, system: str) -> str:
        """What an evaluation's tables call a system."""
        if merged := MERGED_RUN.fullmatch(system):
            return f"adapter {merged['run']} (merged)"
        known = self.titles.get(system) or TITLES.get(system)
        source, n_words = cut_to_words(system)
        if known or not n_words:
            return known or system
        return f"{self.title(source)}, cut to {n_words} words"

    def public(self) -> PublicTask:
        """What a template sees of the task: nothing of this machine, nothing that acts."""
        fields = {name: copy.deepcopy(getattr(self, name)) for name in PUBLIC}
        functions = (self.title, self.student_template, self.student_messages)
        return PublicTask(**fields, **{one.__name__: Offered(one) for one in functions})

    def _place(self, name: str) -> Path:
        own = self.folder / f"{name}.jinja"
        return own if own.is_file() or not (SHARED / own.name).is_file() else SHARED / own.name

    @contextmanager
    def _faults_told(self, name: str) -> Iterator[None]:
        try:
            with limits():
                yield
        except UserError:
            raise
        except UnicodeDecodeError:
            raise UserError(f"{self._place(name)} is not UTF-8 text; save it as UTF-8") from None
        except RecursionError:
            raise UserError(f"{self._place(name)} includes or calls itself without end") from None
        except TemplateNotFound as error:
            lacking = one_line(", ".join(map(str, getattr(error, "templates", [error.name]))), 80)
            what = f"TemplateNotFound, neither the task's folder nor {SHARED} holds {lacking}"
            raise UserError(f"{self._place(name)}: {what}") from None
        except Exception as error:  # a template can raise whatever Python can
            place = (isinstance(error, TemplateError) and getattr(error, "filename", None)) or None
            line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
            where = f"{place or self._place(name)}{line}"
            raise UserError(f"{where}: {type(error).__name__}, {one_line(error)}") from None

    def _write(self, name: str, variables: dict) -> str:
        with self._faults_told(name):
            functions = {
                key: Offered(value)
                for key, value in variables.items()
                if isinstance(value, FunctionType)
            }
            template = self._environment.get_template(f"{name}.jinja")
            return template.render({"task": self.public()} | variables | functions)

    def render(self, name: str, /, **variables: object) -> str:
        """The task's template `name`.jinja, or the shared one.

        Raises UserError if it is faulty, or if a `text`, `first` or `second` that it is given does
        not show in what it writes: nothing is asked for with a prompt that lacks its text.
        """
        with limits():
            if MARKS.keys() & variables.keys():
                self._check_shown(name, variables)
            return self._write(name, variables)

    def _check_shown(self, name: str, variables: dict) -> None:
        """Try a template once with marks instead of the texts. Raises UserError if one is lost."""
        marks = {key: mark for key, mark in MARKS.items() if key in variables}
        others = {key: value for key, value in variables.items() if key not in marks}
        if (tried := (name, repr(others))) in self._tried:
            return
        # Several paragraphs and sentences, so that a template may cut, split or count them.
        texts = {key: "\n\n".join([f"{mark} and {mark}. " * 3] * 3) for key, mark in marks.items()}
        try:
            prompt = self._write(name, others | texts).lower()
        except UserError:
            return  # it cannot be tried; with the real text it is told what is wrong
        if lost := [key for key, mark in marks.items() if mark not in prompt]:
            shown = " and ".join(f"{{{{ {key} }}}}" for key in lost)
            raise UserError(f"{self._place(name)} does not show {shown}; write it where it belongs")
        self._tried.add(tried)

    def _sources(self, name: str) -> list[str]:
        """A template's source, those of what it includes, and those of what these include."""
        environment = self._environment

        def parts_of(source: str) -> list[str | None]:
            return list(find_referenced_templates(environment.parse(source)))

        sources = [environment.loader.get_source(environment, f"{name}.jinja")[0]]
        parts, seen = parts_of(sources[0]), {f"{name}.jinja"}
        # Its own parts count as often as they stand there, as they did when none had parts of its
        # own: hashes of such templates, which old replies are found by, stay as they were.
        own = len(parts)
        for position, part in enumerate(parts):
            if part is None:
                raise UserError(
                    f"{self._place(name)}: the name of what it includes must be written out"
                )
            if position >= own and part in seen:
                continue
            try:
                source = environment.loader.get_source(environment, part)[0]
            except TemplateNotFound:
                continue  # `ignore missing`, or rendering tells
            sources.append(source)
            if part not in seen:
                parts.extend(parts_of(source))
            seen.add(part)
        return sources

    def sha(self, name: str) -> str:
        """First 12 hex digits of the SHA-256 of the template's source and of what it includes."""
        with self._faults_told(name):
            return digest("".join(self._sources(name)))[:12]

    def student_sha(self) -> str | None:
        """12 hex digits that tell what stands around a student's text; None for the bare text.

        Not of the template's source but of what it writes: an edit of a file that it includes, or
        of a field of task.yaml that it shows, counts, and one of a comment does not.
        """
        template = self.student_template()
        return digest(*self._around)[:12] if template else None

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What student.jinja writes before and after the text.

        Raises UserError if the text does not stand in it once and as it is, or if what is around it
        depends on it: the evaluation takes the prompts of the dataset apart again.
        """
        with self._faults_told("student"):
            uses = []
            for source in self._sources("student"):
                names = self._environment.parse(source).find_all(nodes.Name)
                uses += [node for node in names if node.name == "text"]
        parts = [self._write("student", {"text": probe}).split(probe) for probe in PROBES]
        if len(uses) != 1 or len(parts[0]) != 2 or parts[0] != parts[1]:
            what = "must hold {{ text }} once and as it is: no filter, no condition on the text"
            raise UserError(f"{self.folder / 'student.jinja'} {what}")
        return tuple(parts[0])

    def text_of(self, prompt: str) -> str:
        """The text in a student's prompt, as the dataset holds it. Raises UserError.

        The error: the prompt was not written by this student.jinja, so it was edited since.
        """
        if not self.student_template():
            return prompt
        before, after = self._around
        inner = len(prompt) - len(before) - len(after)
        if inner < 0 or not (prompt.startswith(before) and prompt.endswith(after)):
            raise UserError(OTHER_TEMPLATE.format(self.folder / "student.jinja"))
        return prompt[len(before) : len(before) + inner]

    def student_template(self, instructed: bool = False) -> str | None:
        """The template around a student's text, None for the bare text."""
        if instructed:
            return "instructed"
        return "student" if (self.folder / "student.jinja").is_file() else None

    def student_messages(self, text: str, template: str | None) -> list[dict[str, str]]:
        """The conversation that a student answers: the bare text, or the text in a template.

        The dataset stores this list and inference sends it, so training and use cannot differ.
        """
        text = plain_text(text)
        content = self.render(template, text=text) if template else text
        return [{"role": "user", "content": content}]


def cut_to_words(system: str) -> tuple[str, int | None]:
    """(the system that answers, how many words are kept of an answer) of a system's name such as
    `instructed:12-words`; None where all are."""
    match = CUT_TO_WORDS.fullmatch(system)
    return (match["source"], int(match["words"])) if match else (system, None)


@cache
def load_task(name: str = "summarize", folder: Path = FOLDER) -> Task:
    """Read `folder`/`name`/task.yaml. Raises UserError that names the file and the key at fault."""
    names = sorted(path.parent.name for path in folder.glob("*/task.yaml"))
    if name not in names:  # so a name is never a path
        likely = get_close_matches(name, names, 1) or names[:8]
        hint = f"did you mean {' or '.join(likely)}?" if likely else "it holds no task.yaml"
        raise UserError(f"no task {one_line(name, 80)} in {folder}; {hint}")
    path = folder / name / "task.yaml"
    task = Task(folder=path.parent, **read_task_file(path))
    if task.student_template():
        _ = task._around  # a student's template that cannot be taken apart is refused at once
    return task


class TaskOptions(Protocol):
    """What a command line with `add_task_options` holds."""

    task: str
    prompts_dir: Path
    data: Path


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options that tell a stage its job, and where the data are."""
    option = parser.add_argument
    option("--task", default="summarize", help="a folder in --prompts-dir")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--data", type=Path, default=Path("data"), help="of the extracts and of all tasks' data")


def task_of(args: TaskOptions) -> Task:
    """The task of a command line with `add_task_options`. Raises UserError."""
    return load_task(args.task, args.prompts_dir)


def data_folder(args: TaskOptions, stage: str, name: str = "") -> Path:
    """DATA/extracts, which the tasks share, or a stage's DATA/TASK/STAGE, or STAGE-NAME there."""
    folder = args.data if stage == "extracts" else args.data / args.task
    return folder / (f"{stage}-{name}" if name else stage)
