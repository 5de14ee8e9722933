"""Long documents in one and in parts: lays documents out, and scores what `just run` made of them.

Of the articles that `just demo` lays out, those of benchmarks/long_documents.py, to the end of the
last paragraph within their first 16,000 characters. Facts are looked for in all of that.

    python -m benchmarks.parts texts
    python -m inference.run_task summarize texts --output-dir whole --whole
    python -m inference.run_task summarize texts --output-dir parts
    python -m benchmarks.parts texts --answers whole parts
"""

import re
from pathlib import Path

import pandas as pd

from benchmarks.long_documents import ARTICLES
from common.cli import run, script_parser
from common.files import load_records, write_text
from common.stats import markdown
from eval.measures import basics, extractiveness, inventions

CHARACTERS, DOCUMENTS = 16_000, 12


def lay_out(folder: Path) -> None:
    """Write the documents, a file each."""
    articles = load_records(ARTICLES, ("text",), "just demo")
    texts = [one["text"] for one in articles if CHARACTERS <= len(one["text"]) <= 60_000]
    for number, text in enumerate(texts[:DOCUMENTS], 1):
        name = re.sub(r"\W+", "-", text[:24].lower()).strip("-")
        start, _, _ = text[:CHARACTERS].rpartition("\n\n")
        write_text(folder / f"{number:02}-{name}.txt", start + "\n")


def score(texts: Path, answers: Path) -> dict[str, float]:
    """Means over a folder's answers; the share of facts that are invented is of all of them."""
    paths = sorted(texts.glob("*.txt"))
    rows = [{"text": path.read_text()} for path in paths]
    said = [(answers / path.name).read_text().strip() for path in paths]
    columns = basics(said, rows) | inventions(said, rows) | extractiveness(said, rows)
    frame = pd.DataFrame(columns)
    share = frame["invented_facts"].sum() / max(1, frame["facts"].sum())
    return {"n": len(said)} | frame.mean().to_dict() | {"invented_facts": share}


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--answers", type=Path, nargs="+", default=[], help="folders of just run")
    args = parser.parse_args()
    if not args.answers:
        return lay_out(args.texts)
    scores = {folder.name: score(args.texts, folder) for folder in args.answers}
    print(markdown(pd.DataFrame(scores).T.round(3)))


if __name__ == "__main__":
    run(main)
