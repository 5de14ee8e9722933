"""The systems that an evaluation sets side by side, and the test documents they are given."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import UserError, positive
from eval.load_model import Weights, base_of_adapter
from training.run_config import RunConfig, check_model_folder, load_rows

INSTRUCTED = "summarize/instructed.jinja"
SYSTEMS = ("base", "instructed", "tuned", "lead")
ENDPOINTS = {"endpoint:": INSTRUCTED, "endpoint-bare:": None}  # -> what its model is given


@dataclass(frozen=True)
class System:
    """A model and the template around the text, None for the bare text; lead has no model."""

    model: str | Weights | None
    revision: str | None = None
    template: str | None = None
    is_endpoint: bool = False


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every stage of an evaluation takes."""
    parser.add_argument("config", help="the run's name, or its axolotl YAML")
    documents = parser.add_mutually_exclusive_group()
    documents.add_argument("--n", type=positive, help="only the first N test documents")
    documents.add_argument("--all", action="store_true", help="all test documents, as without --n")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=list(SYSTEMS),
        help="of base, instructed, tuned, lead, folders of models or adapters, endpoint:MODEL "
        "(instructed), endpoint-bare:MODEL",
    )


def systems_of(config: RunConfig, names: list[str]) -> dict[str, System]:
    """The systems by name, in the order of the table.

    Raises UserError for one that is not there, and for an adapter of another base.
    """
    return {name: system_of(config, name) for name in names}


def system_of(config: RunConfig, name: str) -> System:
    """One system. Raises UserError."""
    for prefix, template in ENDPOINTS.items():
        if name.startswith(prefix):
            return System(name.removeprefix(prefix), None, template, is_endpoint=True)
    base = Weights(config.base_model, config.base_revision)
    known = {
        "base": System(base),
        "instructed": System(base, None, INSTRUCTED),
        "tuned": System(Weights(str(config.merged))),
        "lead": System(None),
    }
    if name not in known and not Path(name).is_dir():
        choices = f"{', '.join(SYSTEMS)}, a folder that is there, endpoint:MODEL"
        raise UserError(f"no system {name}: --systems takes {choices}")
    if name == "tuned" and not (config.merged / "config.json").is_file():
        hint = f"make it with `just merge {config.path.stem}`"
        raise UserError(f"{config.merged} is not a model folder (nothing merged); {hint}")
    if system := known.get(name):
        if system.model:
            check_model_folder(system.model.model)
        return system
    trained_on = base_of_adapter(Path(name))
    if trained_on not in (None, config.base_model):
        raise UserError(f"{name} is an adapter of {trained_on}, not of {config.base_model}")
    if not trained_on:
        check_model_folder(name)
    return System(name.rstrip("/"), config.base_revision)


def summaries_path(config: RunConfig, name: str) -> Path:
    """outputs/<config>/eval/summaries/<system>.jsonl, the system's name made a file name."""
    return config.eval_dir / "summaries" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.jsonl"


def load_test_rows(config: RunConfig, n: int | None) -> list[dict]:
    """[{id, source, text, reference}] of the first `n` test documents, in the dataset's order."""
    rows = [
        {
            "id": r["id"],
            "source": r.get("source") or "unknown",
            "text": r["prompt"][-1]["content"],
            "reference": r["chosen"][-1]["content"],
        }
        for r in load_rows(config, "test")
    ][:n]
    if bare := [row["id"] for row in rows if not row["reference"].strip()]:
        raise UserError(f"{len(bare)} test documents of {config.dataset} lack a reference: {bare}")
    return rows


def lead_sentences(text: str, words: float) -> str:
    """As many of the text's first sentences as come nearest to `words`; never none."""
    from pysbd import Segmenter

    best = summary = ""
    beginning = " ".join(text[: 2000 + int(30 * words)].split())
    for sentence in Segmenter(language="en").segment(beginning):
        summary = f"{summary} {sentence}".strip()
        if not best or abs(len(summary.split()) - words) < abs(len(best.split()) - words):
            best = summary
    return best


def words_of_references(rows: list[dict]) -> float:
    """How many words the references have on average, and so how many the lead is to have."""
    return float(np.mean([len(row["reference"].split()) for row in rows]))
