"""Have the teacher judge the target's answers against every other system's, in both orders.

Reads scores.json and the answers of outputs/RUN/eval, appends verdicts to judge.jsonl there (budget
and resume as for replies; changed answers are judged anew), writes judge.json and the report.

    TOGETHER_API_KEY=... python -m eval.judge_answers RUN --budget-usd 2
"""

import json
from pathlib import Path

import pandas as pd

from common.cli import UserError, run, script_parser, warn
from common.files import write_text
from common.stats import paired_bootstrap
from common.table import load
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.client import AskOptions, ask_options
from data_prep.teacher.judge import pair_requests, points
from eval.report import write_report
from eval.score_answers import load_evaluation
from prompts.task import Task
from training.config import RunConfig, load_run_config

KEY = ("id", "model", "settings")


def win_rates(found: pd.DataFrame) -> dict:
    """Of the target's points by text and order; `first_wins`: of the decided verdicts, those for
    the answer shown first; `disagreements`: the texts whose verdict depends on the order."""
    first_shown = pd.concat([found["first"], 1 - found["second"]])
    decided = first_shown[first_shown != 0.5]
    return {
        "n": len(found),
        "win_rate": paired_bootstrap(found.mean(axis=1), 0),
        "first_wins": round(float(decided.mean()), 3) if len(decided) else None,
        "disagreements": found.index[found["first"] != found["second"]].tolist(),
    }


def judge_system(
    path: Path, requests: list[dict], ids: list[str], model: str, task: Task
) -> pd.DataFrame:
    """The target's points against a system by text and order, from the table of verdicts at `path`;
    two answers that are alike are a draw that nobody was asked for."""
    replies = load(path, [request | {"model": model} for request in requests], KEY)
    judged = points(requests, replies, task)
    alike = [text_id for text_id in ids if text_id not in judged.index]
    draws = pd.DataFrame(0.5, alike, judged.columns)
    return pd.concat([judged.dropna(), draws])


def judge_all(config: RunConfig, options: AskOptions) -> int:
    """Ask for what is missing, write judge.json and the report; how many pairs lack a verdict."""
    scores, rows, answers = load_evaluation(config)
    texts = {
        system: {text_id: record["text"] for text_id, record in by_id.items()}
        for system, by_id in answers.items()
    }
    path, target = config.eval_dir / "judge.jsonl", scores["target"]
    ids = [row["id"] for row in rows]
    win_rates_by_system, n_left = {}, 0
    for other in scores["differences"]:
        requests = pair_requests(rows, texts[target], texts[other], config.task)
        n_left += ask_all(requests, path, options, f"verdicts on {other}", key=KEY)
        judged = judge_system(path, requests, ids, options.model, config.task)
        if lacking := len(rows) - len(judged):
            warn(f"{other}: {lacking} pairs lack a verdict and are left out")
        if len(judged):
            win_rates_by_system[other] = win_rates(judged)
            print(f"{target} against {other}: {win_rates_by_system[other]}")
    verdicts = {"model": options.model, "target": target, "systems": win_rates_by_system}
    for name in ("generation", "answers"):  # what was judged
        verdicts[name] = scores["settings"].get(name)
    write_text(config.eval_dir / "judge.json", json.dumps(verdicts, indent=1))
    write_report(config.eval_dir, scores, rows, answers, config.task)
    return n_left


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    teacher_options(parser)
    parser.set_defaults(temperature=0.0, max_tokens=2048)
    args = parser.parse_args()
    if n_left := judge_all(load_run_config(args.config), ask_options(args)):
        raise UserError(f"{n_left} pairs got no verdict; run again to ask for them")


if __name__ == "__main__":
    run(main)
