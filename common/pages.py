"""Pages and reports from templates; a variable that is not given raises."""

from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parents[1]


def project_link() -> str:
    """This project and its version in Markdown, a link where CITATION.cff tells its address
    (`repository-code`)."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    name, address = citation["title"].partition(":")[0], citation.get("repository-code")
    return f"{f'[{name}]({address})' if address else name} {citation['version']}"


def render(path: str, /, **variables: object) -> str:
    """The template at `path` in this repo, such as eval/report.html.jinja; in HTML every text is
    escaped. It includes others by their paths."""
    is_html = ".html." in path
    loader = FileSystemLoader(ROOT)
    environment = Environment(loader=loader, autoescape=is_html, undefined=StrictUndefined)
    return environment.get_template(path).render(**variables)
