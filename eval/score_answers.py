"""Score the systems' answers against the teacher's references, side by side on the same texts.

Reads outputs/RUN/eval/answers/*.jsonl and the run's dataset, writes outputs/RUN/eval/scores.json,
with the measures that the task names (eval/measures.py). `just scores RUN` (eval/evaluate.py) runs
it.
"""

import argparse
import json
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.cli import UserError, positive
from common.files import digest, read_json, write_text
from common.stats import RESAMPLES, paired_bootstrap
from eval.answer_texts import load_answers
from eval.measures import (
    COMPARED,
    COUNTS,
    OF_LIKENESS,
    Scorer,
    ScoringOptions,
    is_cut,
    linearize_shares,
    load_scorers,
)
from eval.systems import load_test_rows, told_base
from inference.weights import memory_told
from training.config import RunConfig

Answers = dict[str, dict[str, dict]]  # system -> id -> record
FEW_CUT = 0.05  # share of a system's answers that may be cut, with nothing said of it
LEAST_WHOLE = 10  # texts without a cut answer, under which a difference says nothing


def load_scores(config: RunConfig) -> dict:
    """scores.json of a run. Raises UserError if it was not made."""
    if scores := read_json(config.eval_dir / "scores.json"):
        return scores
    raise UserError(f"no scores in {config.eval_dir}; make them with `just scores {config.name}`")


def load_evaluation(config: RunConfig) -> tuple[dict, list[dict], Answers]:
    """(scores, test rows, answers) of a run, exactly those that were scored."""
    scores = load_scores(config)
    rows, settings = load_test_rows(config, scores["n"]), scores["settings"]
    if settings["documents"] != digest(*rows):
        hint = f"run `just answers {config.name}` and `just scores {config.name}`"
        raise UserError(f"the texts of {config.dataset} are not those that were scored; {hint}")
    systems = list(scores["systems"])
    return scores, rows, load_answers(config, rows, systems, asked=settings["generation"])


def commit() -> str:
    """The short hash of HEAD, with a + if tracked files differ from it but for results/, where each
    evaluation adds to the ledger; "unknown" without git."""

    def git(*command: str) -> str:
        try:
            return subprocess.run(["git", *command], capture_output=True, text=True).stdout.strip()
        except OSError:  # there is no git
            return ""

    changed = git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results"
    )
    return (git("rev-parse", "--short", "HEAD") + ("+" if changed else "")) or "unknown"


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=positive, help="layer to compare, if not a known encoder")
    option("--encoder-batch", type=positive, default=64, help="texts the encoder reads at once")
    option("--nli", help="model for faithfulness (default: the encoder, if it is one)")


def scoring_options(args: argparse.Namespace) -> ScoringOptions:
    """What a command line with `add_scoring_options` says."""
    return ScoringOptions(args.encoder, args.encoder_layers, args.encoder_batch, args.nli)


def score_texts(texts: list[str], rows: list[dict], scorers: dict[str, Scorer]) -> pd.DataFrame:
    """A line a text, a column a figure. Raises UserError for what is not a number."""
    columns = {}
    with memory_told("lower --encoder-batch"):
        for scorer in scorers.values():
            columns |= scorer(texts, rows)
    values = pd.DataFrame(columns)
    if faulty := values.columns[~np.isfinite(values).all()].tolist():
        raise UserError(f"{', '.join(faulty)}: some are not numbers; is the encoder sound?")
    return values


def digest_of(records: dict[str, dict], rows: list[dict]) -> str:
    """Tells a system's answers to `rows` from others."""
    return digest(*(records[row["id"]]["text"] for row in rows))


def figures_of(values: pd.DataFrame, records: list[dict]) -> dict[str, float]:
    """figure -> a system's mean, and the counts of its records."""
    counts = {}
    for figure, holds in COUNTS.items():
        counts[figure.name] = sum(holds(record) for record in records)
    return linearize_shares(values).mean().to_dict() | counts


def differences_from(
    target: str, values: dict[str, pd.DataFrame]
) -> dict[str, dict[str, tuple[float, ...]]]:
    """system -> figure -> (mean, low, high) of how much more the target has, text by text."""
    columns = {system: linearize_shares(frame) for system, frame in values.items()}
    ours = columns.pop(target)
    differences = {}
    for system, theirs in columns.items():
        differences[system] = {
            figure: paired_bootstrap(ours[figure], theirs[figure]) for figure in theirs
        }
    return differences


def figures_of_references(rows: list[dict], scorers: dict[str, Scorer]) -> dict[str, float]:
    """figure -> the mean of the teacher's answers, of what is not measured by likeness to them."""
    own = {name: scorer for name, scorer in scorers.items() if name not in OF_LIKENESS}
    values = score_texts([row["reference"] for row in rows], rows, own)
    return linearize_shares(values).mean().to_dict()


def differences_without_cut(
    target: str, values: dict[str, pd.DataFrame], is_cut_by_system: dict[str, np.ndarray]
) -> dict[str, dict]:
    """system -> {n, differences: figure -> (mean, low, high)}, on the n texts where neither the
    target's answer nor the system's was cut; of systems where more than a few of either are. No
    differences of few texts."""
    found = {}
    for system, frame in values.items():
        pair = is_cut_by_system[target], is_cut_by_system[system]
        if system == target or max(cut.mean() for cut in pair) <= FEW_CUT:
            continue
        is_whole = ~(pair[0] | pair[1])
        columns = [name for name in COMPARED if name in frame]
        left = {target: values[target].loc[is_whole, columns], system: frame.loc[is_whole, columns]}
        differences = {}
        if is_whole.sum() >= LEAST_WHOLE:
            differences = differences_from(target, left)[system]
        found[system] = {"n": int(is_whole.sum()), "differences": differences}
    return found


def settings_of_scores(
    config: RunConfig, rows: list[dict], answers: Answers, scorers: dict[str, Scorer]
) -> dict:
    """All that the scores depend on."""
    settings = {
        "config": config.name,
        "base": told_base(config),
        "task": config.task.name,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "documents": digest(*rows),
        "hash": None,  # of BERTScore
        "rescale_baseline": None,
        "faithfulness": None,
        "resamples": RESAMPLES,
    }
    for scorer in scorers.values():
        settings |= getattr(scorer, "settings", {})
    for package in ("rouge-score", "torch", "transformers"):
        settings[package] = version(package)
    first = rows[0]["id"]
    settings["generation"] = {system: by_id[first]["settings"] for system, by_id in answers.items()}
    settings["answers"] = {system: digest_of(by_id, rows) for system, by_id in answers.items()}
    return settings


def score_all(
    config: RunConfig, rows: list[dict], systems: list[str] | None, options: ScoringOptions
) -> tuple[dict, Answers]:
    """Score systems, by default the task's, and write scores.json: (the scores, what was scored).

    The target of all differences is the tuned system, or the first where there is none.
    """
    answers = load_answers(config, rows, systems)
    scorers = load_scorers(config.task, options)
    target = "tuned" if "tuned" in answers else next(iter(answers))
    values, figures, cut, support = {}, {}, {}, {}
    for system, by_id in tqdm(answers.items(), desc="scoring", unit="system"):
        records = [by_id[row["id"]] for row in rows]
        texts = [record["text"] for record in records]
        values[system] = score_texts(texts, rows, scorers)
        figures[system] = figures_of(values[system], records)
        cut[system] = np.array([is_cut(record) for record in records])
        if "faithfulness" in scorers:  # which has kept what it found of each sentence
            found = scorers["faithfulness"].support
            support[system] = [
                found[text, row["text"]] for text, row in zip(texts, rows, strict=True)
            ]
    scores = {
        "n": len(rows),
        "target": target,
        "systems": figures,
        "reference": figures_of_references(rows, scorers),
        "differences": differences_from(target, values),
        "without_cut": differences_without_cut(target, values, cut),
        "ids": [row["id"] for row in rows],
        "per_text": {system: frame.to_dict("list") for system, frame in values.items()},
        "support": support or None,
        "settings": settings_of_scores(config, rows, answers, scorers),
    }
    write_text(config.eval_dir / "scores.json", json.dumps(scores, indent=1))
    print(f"scores of {len(answers)} systems on {len(rows)} texts in {config.eval_dir}")
    return scores, answers
