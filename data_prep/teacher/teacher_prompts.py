"""What a teacher is asked of an extract, and the digest that its reply is found again by."""

import json
from collections.abc import Iterable
from datetime import datetime
from functools import cached_property

from jinja2 import Environment
from jinja2.meta import find_referenced_templates, find_undeclared_variables

from common.files import digest
from common.text import plain_text
from prompts.task import SHARED, Task

TEMPLATES = ("teacher", "teacher_single")


def prompt_digest(messages: list[dict]) -> str:
    """Tells the very messages that are sent from others."""
    return digest(json.dumps(messages, sort_keys=True))


class TeacherPrompts:
    """The prompts of a task as they would be sent today, each about one of `extracts`."""

    def __init__(self, task: Task, extracts: Iterable[dict]) -> None:
        self.task, self.extracts = task, {extract["id"]: extract for extract in extracts}

    @cached_property
    def template_by_sha(self) -> dict[str, str]:
        there = [name for name in TEMPLATES if (self.task.folder / f"{name}.jinja").is_file()]
        return {self.task.sha(name): name for name in there}

    def messages(self, template: str, key: str, longer: int) -> list[dict]:
        """The conversation that asks about the extract `key`; control tokens in it are plain."""
        text = plain_text(self.extracts[key]["text"])
        prompt = self.task.render(template, text=text, longer=longer)
        return [{"role": "user", "content": prompt}]

    def text_digest(self, key: str) -> str:
        return digest(self.extracts[key]["text"])

    def digest_for(self, reply: dict) -> str | None:
        """Of today's prompt in the template and order of `reply`; None if that template is gone."""
        template = self.template_by_sha.get(reply["prompt_sha"])
        if not template:
            return None
        return prompt_digest(self.messages(template, reply["id"], reply.get("longer") or 1))

    def is_of_today(self, reply: dict) -> bool:
        """Whether a reply is to today's prompt about its extract, or, where its template is gone,
        at least to the extract's text of today."""
        if prompt := self.digest_for(reply):
            return reply.get("prompt") == prompt
        return reply.get("text_digest") == self.text_digest(reply["id"])

    def changed_at(self, sha: str) -> float:
        """When the prompts of a template last changed in what its hash does not tell: task.yaml
        and the templates that it takes in. 0 where it names none of them."""
        template = self.template_by_sha.get(sha)
        if not template:
            return 0.0
        parsed = Environment().parse((self.task.folder / f"{template}.jinja").read_text("utf-8"))
        takes_in = {*find_undeclared_variables(parsed), *find_referenced_templates(parsed)}
        if takes_in <= {"text", "longer"}:
            return 0.0
        files = [*self.task.folder.iterdir(), *SHARED.glob("*.jinja")]
        return max(file.stat().st_mtime for file in files)


def moment(created: object) -> float:
    """Seconds since 1970 of a record's `created`; 0 where it is no moment with its time zone."""
    try:
        parsed = datetime.fromisoformat(created)
    except (TypeError, ValueError):
        return 0.0
    return parsed.timestamp() if parsed.tzinfo else 0.0
