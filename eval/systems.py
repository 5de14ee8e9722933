"""The systems that an evaluation sets side by side, and the test documents they are given."""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.cli import UserError, positive
from eval.load_model import Weights, weights_in
from training.run_config import RunConfig, check_model_folder, load_rows

INSTRUCTED = "instructed"
SYSTEMS = ("base", "instructed", "tuned", "lead")
ENDPOINTS = {"endpoint:": INSTRUCTED, "endpoint-bare:": None}  # -> what its model is given


@dataclass(frozen=True)
class System:
    """A model, or a name behind an endpoint, and the template around the text, None for the bare
    text; lead has no model."""

    model: Weights | str | None
    template: str | None = None


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
    """One system, its model under the overrides of the run. Raises UserError."""
    for prefix, template in ENDPOINTS.items():
        if name.startswith(prefix):
            return System(name.removeprefix(prefix), template)
    if name == "lead":
        return System(None)
    if name in ("base", "instructed"):
        check_model_folder(config.base_model)
        weights = Weights(config.base_model, config.base_revision, overrides=config.overrides)
        return System(weights, INSTRUCTED if name == "instructed" else None)
    if name == "tuned":
        if not (config.merged / "config.json").is_file():
            hint = f"make it with `just merge {config.path.stem}`"
            raise UserError(f"{config.merged} is not a model folder (nothing merged); {hint}")
        return System(Weights(str(config.merged), overrides=config.overrides))
    if not Path(name).is_dir():
        choices = f"{', '.join(SYSTEMS)}, a folder that is there, endpoint:MODEL"
        raise UserError(f"no system {name}: --systems takes {choices}")
    weights = weights_in(Path(name), config.base_revision)
    if weights.adapter and weights.model != config.base_model:
        raise UserError(f"{name} is an adapter of {weights.model}, not of {config.base_model}")
    return System(replace(weights, overrides=config.overrides or weights.overrides))


def answers_path(config: RunConfig, name: str) -> Path:
    """outputs/<config>/eval/answers/<system>.jsonl, the system's name made a file name."""
    return config.eval_dir / "answers" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.jsonl"


def load_test_rows(config: RunConfig, n: int | None) -> list[dict]:
    """[{id, source, text, reference}] of the first `n` test documents, in the dataset's order."""
    rows = [
        {
            "id": r["id"],
            "source": r.get("source") or "unknown",
            "text": r["prompt"][-1]["content"],
            "reference": r["chosen"][-1]["content"],
            "second": r["rejected"][-1]["content"] if r.get("rejected") else None,
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
