"""Tasks: a folder each, with a task.yaml and Jinja templates, and the loader that reads them.

A template that a task's folder lacks is taken from prompts/shared. A variable that a template names
and is not given raises.
"""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache, cached_property
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError
from jinja2.meta import find_referenced_templates

from common.cli import UserError, one_line
from common.files import digest
from common.text import plain_text

FOLDER = Path(__file__).parent
SHARED = FOLDER / "shared"
TITLES = {
    "base": "base, bare text",
    "instructed": "base, instructed",
    "tuned": "tuned adapter",
    "consensus": "tuned adapter, the most alike of several answers",
    "lead": "the text's first sentences (no model)",
    "second": "the teacher's second answer",
}


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
    def _environment(self) -> Environment:
        loader = FileSystemLoader([self.folder, SHARED])
        return Environment(loader=loader, undefined=StrictUndefined)

    def title(self, system: str) -> str:
        return self.titles.get(system) or TITLES.get(system, system)

    @contextmanager
    def _faults_told(self, name: str) -> Iterator[None]:
        try:
            yield
        except TemplateError as error:
            place = getattr(error, "filename", None) or self.folder / f"{name}.jinja"
            line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
            raise UserError(f"{place}{line}: {type(error).__name__}, {one_line(error)}") from None

    def render(self, name: str, /, **variables: object) -> str:
        """The task's template `name`.jinja, or the shared one. Raises UserError if it is faulty."""
        with self._faults_told(name):
            return self._environment.get_template(f"{name}.jinja").render(task=self, **variables)

    def sha(self, name: str) -> str:
        """First 12 hex digits of the SHA-256 of the template's source and of what it includes."""
        environment = self._environment
        with self._faults_told(name):
            source = environment.loader.get_source(environment, f"{name}.jinja")[0]
            parts = find_referenced_templates(environment.parse(source))
            more = (environment.loader.get_source(environment, part)[0] for part in parts)
            return digest("".join([source, *more]))[:12]

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


@cache
def load_task(name: str = "summarize", folder: Path = FOLDER) -> Task:
    """Read `folder`/`name`/task.yaml. Raises UserError that names the file and the key at fault."""
    path = folder / name / "task.yaml"
    if not path.is_file():
        tasks = sorted(found.parent.name for found in folder.glob("*/task.yaml"))
        nearest = get_close_matches(name, tasks, 1) or tasks
        raise UserError(f"no task {name} in {folder}; did you mean {' or '.join(nearest)}?")
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    known = {one.name for one in dataclasses.fields(Task)} - {"folder"}
    if faulty := sorted({"label", "hub"} - given.keys()) or sorted(given.keys() - known):
        what = "unknown" if given.keys() >= {"label", "hub"} else "missing"
        raise UserError(f"{path}: {', '.join(faulty)} {what}; the keys are {', '.join(known)}")
    task = Task(folder=path.parent, **given)
    for criterion, scale in task.criteria.items():
        if not isinstance(scale, int) or scale < 2:
            raise UserError(f"{path}: criteria: {criterion} needs a scale, a whole number over 1")
    if task.answers == 2 and not task.criteria:
        raise UserError(f"{path}: criteria are missing; two answers are told apart by them")
    return task


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options that tell a stage its job, and where the data are."""
    option = parser.add_argument
    option("--task", default="summarize", help="a folder in --prompts-dir")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--data", type=Path, default=Path("data"), help="of the extracts and of all tasks' data")


def task_of(args: argparse.Namespace) -> Task:
    """The task of a command line with `add_task_options`. Raises UserError."""
    return load_task(args.task, args.prompts_dir)


def data_folder(args: argparse.Namespace, stage: str, name: str = "") -> Path:
    """DATA/extracts, which the tasks share, or a stage's DATA/TASK/STAGE, or STAGE-NAME there."""
    folder = args.data if stage == "extracts" else args.data / args.task
    return folder / (f"{stage}-{name}" if name else stage)
