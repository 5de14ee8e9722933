"""What a task.yaml may hold, checked before anything is made of it: `read_task_file`.

A faulty file is one line with its name and the key at fault, whatever is wrong with it.
"""

import re
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from common.cli import UserError, one_line

MARKUP = "*_`#<>[]"  # in a reply these are read as blanks, see data_prep/parse_replies.py
# A criterion so called could not be told from the total or the verdict in a teacher's reply.
TAKEN = re.compile(
    r"(?i)total|(total|overall|final) (score|rating)|best|better|preferred|winn(er|ing)"
)
SAID = {  # pydantic's words for what happens most, in ours
    "string_type": "is text; put it in quotes if it looks like something else",
    "int_type": "is a whole number, without quotes",
    "list_type": "is a list, like [one, two]",
    "dict_type": "is a mapping, like {one: 1, two: 2}",
    "model_type": "is a mapping, like {answer: title, answers: titles}",
    "model_attributes_type": "is a mapping, like {answer: title, answers: titles}",
    "finite_number": "is a finite number",
}


def shown_words(name: str) -> list[str]:
    """The words of a label or criterion as a reply shows them when its markup is read as blanks."""
    return name.translate(str.maketrans(dict.fromkeys(MARKUP, " "))).split()


def _one_line(text: str) -> str:
    if not text.strip() or not text.isprintable():
        raise ValueError("is one line of text")
    return text


def _found_in_replies(name: str) -> str:
    _one_line(name)
    if not re.search(r"\w", " ".join(shown_words(name))):
        raise ValueError("holds no letter or digit to find it by in a reply")
    return name


Line = Annotated[str, StringConstraints(strict=True), AfterValidator(_one_line)]
Name = Annotated[str, StringConstraints(strict=True), AfterValidator(_found_in_replies)]
Word = str | int | float | None  # bool is an int
Limit = bool | int | Annotated[float, Field(allow_inf_nan=False)]


class HubWords(BaseModel):
    """Words for the cards; a task's own card template may use more."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Word | list[Word]]
    answer: Line = "answer"
    answers: Line = "answers"
    does: Line = "answers"
    task_category: Line = "text-generation"
    tags: list[Line] = []


class TaskFile(BaseModel):
    """The keys of task.yaml; prompts/shared/new_task/task.yaml explains them."""

    model_config = ConfigDict(strict=True, extra="forbid")
    label: Name
    hub: HubWords
    answers: int = 2
    criteria: dict[Name, int] = {}
    checks: dict[Line, Limit] = {}
    measures: list[Line] = ["bertscore", "rouge", "extractiveness"]
    systems: Annotated[list[Line], Field(min_length=1)] = ["base", "instructed", "tuned", "lead"]
    lead_words: Annotated[int, Field(gt=0)] | None = None
    max_new_tokens: Annotated[int, Field(gt=0, le=1_000_000)] = 512
    titles: dict[Line, Line] = {}

    @field_validator("answers")
    @classmethod
    def _one_or_two(cls, answers: int) -> int:
        if answers not in (1, 2):
            raise ValueError("is 1 or 2")
        return answers

    @field_validator("criteria")
    @classmethod
    def _told_apart(cls, criteria: dict[str, int]) -> dict[str, int]:
        shown = {}
        for name, scale in criteria.items():
            words = " ".join(shown_words(name)).lower()
            if not 2 <= scale <= 1000:
                raise ValueError(f"{name} needs a scale, a whole number over 1 (and under 1001)")
            if TAKEN.fullmatch(words):
                raise ValueError(f"{name} cannot be told from the total or the verdict; rename it")
            if words in shown:
                raise ValueError(f"{name} and {shown[words]} cannot be told apart in a reply")
            shown[words] = name
        return criteria

    @field_validator("systems", "measures")
    @classmethod
    def _once_each(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise ValueError("names one twice")
        return names

    @model_validator(mode="after")
    def _rated(self) -> "TaskFile":
        if self.answers == 2 and not self.criteria:
            raise ValueError("criteria are missing; two answers are told apart by them")
        return self


MOST_BYTES = 1_000_000  # of a task.yaml; ours have 2,000


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key stands once; PyYAML takes the last of several without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1 and key != "<<"}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{', '.join(twice)} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> object:
    """What a YAML file holds. Raises UserError."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:  # a pipe is never read to its end
        raise UserError(f"{path} is no regular file of at most {MOST_BYTES:,} bytes")
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_UniqueKeys)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # PyYAML's own, and what `!!int x`, 2001-99-99, deep nesting raise
        said = one_line(error) or type(error).__name__
        raise UserError(f"{path} is not YAML: {said}") from None


def _said(error: dict, keys: str) -> str:
    """What pydantic says of one fault, as `key: what is wrong`."""
    place = ": ".join(str(part) for part in error["loc"] if part != "[key]")
    if error["type"] == "missing":
        return f"{place} missing; the keys are {keys}"
    if error["type"] == "extra_forbidden":
        return f"{place} unknown; the keys are {keys}"
    first, *below = error["loc"] or ("",)
    if first == "criteria" and len(below) == 1:
        return f"{place} needs a scale, a whole number over 1"
    if first == "checks" and below:
        return f"checks: {below[0]}: a limit is a number or true"
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}".removeprefix(": ")
    got = error["input"]
    if got is None:
        shown = "left empty"
    elif isinstance(got, str | int | float):
        shown = one_line(repr(got), 40)
    else:  # written out, a list of aliases of lists may be endless
        shown = f"a {type(got).__name__}"
    return f"{place} {SAID.get(error['type'], '- ' + error['msg'])}; it is {shown}"


def read_task_file(path: Path) -> dict:
    """The fields of a task.yaml, with defaults filled in. Raises UserError: file, key, reason."""
    given = read_yaml(path)
    keys = ", ".join(TaskFile.model_fields)
    if not isinstance(given, dict):
        raise UserError(f"{path} holds no keys; a task's keys are {keys}")
    if odd := [key for key in given if not isinstance(key, str)]:
        raise UserError(f"{path}: {one_line(repr(odd[0]), 40)} unknown; the keys are {keys}")
    try:
        return TaskFile.model_validate(given).model_dump()
    except ValidationError as error:
        # A missing key is told before all: a file of another kind lacks them and has others.
        faults = sorted(error.errors(), key=lambda fault: fault["type"] != "missing")
        first, *others = dict.fromkeys(_said(fault, keys) for fault in faults)
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{path}: {first}{more}") from None
