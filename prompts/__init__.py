"""Render the Jinja templates of this folder, and build the messages a student sees.

Templates are rendered strictly (a variable that is not given is an error) and are identified
by the hash of their source, which is stored with everything they made.
"""

import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

FOLDER = Path(__file__).parent
_environment = Environment(loader=FileSystemLoader(FOLDER), undefined=StrictUndefined)


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


def answer_message(summary: str) -> list[dict[str, str]]:
    """The assistant turn of a preference pair, in the conversational format of TRL."""
    return [{"role": "assistant", "content": summary}]
