"""Append a run's scores to the committed ledger: when, which commit, what, n, with intervals.

Reads outputs/<config>/eval/scores.json, appends a row to results/ledger.csv.

    python -m eval.record_result axolotl_configs/smollm2-135m-dpo-sft-lora.yaml --note "just demo"
"""

import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd

from common.cli import run, script_parser
from common.report import format_interval
from eval.build_report import COMPARED, load_scores
from training.run_config import load_run_config


def commit() -> str:
    """The short hash of HEAD, with a + if tracked files differ from it."""
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True
    )
    return said.stdout.strip() or "unknown"


def to_row(scores: dict, note: str) -> dict:
    """One row of the ledger."""
    row = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "config": scores["settings"]["config"],
        "command": note,
        "encoder": scores["settings"]["hash"],
        "n": scores["n"],
    }
    for system, values in scores["systems"].items():
        row |= {f"{system} {m}": round(values[m], 3) for m in COMPARED if m in values}
        row[f"{system} words"] = round(values["words"], 1)
    for name, metrics in scores["differences"].items():
        gains = {m: format_interval(*metrics[m]) for m in COMPARED if m in metrics}
        row |= {f"{scores['target']} - {name} {metric}": gain for metric, gain in gains.items()}
    return row


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", type=Path, help="the axolotl YAML of the run")
    parser.add_argument("--note", default="", help="the command that made it")
    parser.add_argument("--ledger", type=Path, default=Path("results/ledger.csv"))
    args = parser.parse_args()
    scores = load_scores(load_run_config(args.config))
    args.ledger.parent.mkdir(parents=True, exist_ok=True)
    rows = pd.read_csv(args.ledger, dtype=str) if args.ledger.exists() else pd.DataFrame()
    rows = pd.concat([rows, pd.DataFrame([to_row(scores, args.note)])], ignore_index=True)
    rows.to_csv(args.ledger, index=False)
    print(f"{args.ledger}: {len(rows)} rows")


if __name__ == "__main__":
    run(main)
