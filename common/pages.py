"""Pages and reports from templates; a variable that is not given raises."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

ROOT = Path(__file__).parents[1]


def render(path: str, /, **variables: object) -> str:
    """The template at `path` in this repo, such as eval/report.html.jinja; in HTML every text is
    escaped. It includes others by their paths."""
    is_html = ".html." in path
    loader = FileSystemLoader(ROOT)
    environment = Environment(loader=loader, autoescape=is_html, undefined=StrictUndefined)
    return environment.get_template(path).render(**variables)
