"""Have the teacher judge the target's answers against every other system's, in both orders.

Reads scores.json and the answers of outputs/RUN/eval, appends the verdicts to judge/SYSTEM.jsonl
there (budget and resume as for the teacher's replies; changed answers are judged anew), writes
judge.json and builds the report anew.

    TOGETHER_API_KEY=... python -m eval.judge_answers RUN --budget-usd 2
"""

import json

import numpy as np
import pandas as pd

from common.cli import UserError, run, script_parser, warn
from common.files import write_text
from common.report import paired_bootstrap
from common.table import load
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.judge import pair_requests, points
from eval.build_report import write_report
from eval.score_answers import load_evaluation
from training.run_config import load_run_config

KEY = ("id", "model", "settings")


def win_rates(found: pd.DataFrame) -> dict:
    """Of the target's points, a line a text, a column an order: its win rate with an interval, the
    share of decided verdicts that the first shown won, the texts where the order decides."""
    first_shown = pd.concat([found["first"], 1 - found["second"]])
    decided = first_shown[first_shown != 0.5]
    return {
        "n": len(found),
        "win_rate": paired_bootstrap(found.mean(axis=1), np.zeros(len(found))),
        "first_wins": round(float(decided.mean()), 3) if len(decided) else None,
        "disagreements": found.index[found["first"] != found["second"]].tolist(),
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    parser.add_argument("--against", nargs="+", help="only these systems (default: all)")
    teacher_options(parser)
    parser.set_defaults(temperature=0.0, max_tokens=2048)
    args = parser.parse_args()
    config = load_run_config(args.config)
    scores, rows, answers = load_evaluation(config)
    target, against = scores["target"], args.against or list(scores["differences"])
    if unknown := set(against) - set(scores["differences"]):
        raise UserError(f"no scores of {', '.join(unknown)}; there are {', '.join(answers)}")
    systems, left = {}, 0
    for other in against:
        path = config.eval_dir / "judge" / f"{other}.jsonl"
        pair = (
            {key: one["text"] for key, one in answers[name].items()} for name in (target, other)
        )
        requests = pair_requests(rows, *pair, config.task)
        left += ask_all(requests, path, args, f"verdicts on {other}", key=KEY)
        replies = load(path, [{**request, "model": args.model} for request in requests], KEY)
        alike = [row["id"] for row in rows if row["id"] not in {r["text_id"] for r in requests}]
        draws = pd.DataFrame(0.5, index=alike, columns=["first", "second"])
        judged = pd.concat([draws, points(requests, replies, config.task)])
        whole = judged.dropna()
        if lacking := len(judged) - len(whole):
            warn(f"{other}: {lacking} pairs lack a verdict and are left out")
        if len(whole):
            systems[other] = win_rates(whole)
            mean, low, high = systems[other]["win_rate"]
            print(f"{target} against {other}: wins {mean:.3f} [{low:.3f}, {high:.3f}]", end=", ")
            print({name: v for name, v in systems[other].items() if name != "win_rate"})
    verdicts = {"model": args.model, "target": target, "systems": systems}
    verdicts["generation"] = scores["settings"]["generation"]  # what was judged
    write_text(config.eval_dir / "judge.json", json.dumps(verdicts, indent=1))
    write_report(config.eval_dir, scores, rows, answers, config.task)
    if left:
        raise UserError(f"{left} pairs got no verdict; run again to ask for them")


if __name__ == "__main__":
    run(main)
