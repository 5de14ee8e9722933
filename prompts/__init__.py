"""A folder a task: what it is (task.yaml) and its Jinja templates; the messages a student sees.

Templates are rendered strictly (a variable that is not given is an error) and are identified
by the hash of their source, which is stored with everything they made.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.cli import UserError

FOLDER = Path(__file__).parent
_environment = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined)


@dataclass(frozen=True, eq=False)
class Task:
    """A job, as its task.yaml describes it; the comments there say what each field is.

    It is hashed by identity, so that what is made of a task can be cached.
    """

    name: str
    label: str
    criteria: dict[str, int]
    limits: dict[str, float]
    titles: dict[str, str]
    hub: dict

    @property
    def lowest_score(self) -> int:
        return len(self.criteria)

    @property
    def highest_score(self) -> int:
        return sum(self.criteria.values())

    def template(self, name: str) -> str:
        """The path under prompts/ of the task's template of that name."""
        return f"{self.name}/{name}.jinja"


@cache
def load_task(name: str = "summarize") -> Task:
    """Read prompts/`name`/task.yaml. Raises UserError that names the file and the key at fault."""
    path = FOLDER / name / "task.yaml"
    try:
        given = yaml.safe_load(path.read_text()) | {"name": name}
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}") from None
    known = {field.name for field in dataclasses.fields(Task)}
    if faulty := sorted(known ^ given.keys()):
        raise UserError(f"{path}: {', '.join(faulty)} missing or unknown; the keys are {known}")
    return Task(**given)


def render(template: str, **variables: object) -> str:
    """Render `template` (a path under prompts/). Raises jinja2.UndefinedError on a gap."""
    return _environment.get_template(template).render(**variables)


def template_sha(template: str) -> str:
    """First 12 hex digits of the SHA-256 of the template's source."""
    return hashlib.sha256((FOLDER / template).read_bytes()).hexdigest()[:12]


def student_messages(text: str, template: str | None = None) -> list[dict[str, str]]:
    """The conversation a student answers: the bare text, or the text inside `template`.

    The dataset stores this list and inference sends it, so training and use cannot differ.
    """
    return [{"role": "user", "content": render(template, text=text) if template else text}]


def answer_message(answer: str) -> list[dict[str, str]]:
    """The assistant turn of a preference pair, in the conversational format of TRL."""
    return [{"role": "assistant", "content": answer}]
