"""Have the teacher judge the target's answers against every other system's, in both orders.

Reads scores.json and the answers of outputs/RUN/eval, appends verdicts to judge.jsonl there (budget
and resume as for replies; changed answers are judged anew), writes judge.json and the report.

    TOGETHER_API_KEY=... python -m eval.judge_answers RUN --budget-usd 2
"""

import json

import pandas as pd

from common.cli import UserError, run, script_parser, warn
from common.files import write_text
from common.stats import paired_bootstrap
from common.table import load
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.client import ask_options
from data_prep.teacher.judge import pair_requests, points
from eval.report import write_report
from eval.score_answers import load_evaluation
from training.config import load_run_config

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


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    teacher_options(parser)
    parser.set_defaults(temperature=0.0, max_tokens=2048)
    args = parser.parse_args()
    config = load_run_config(args.config)
    scores, rows, answers = load_evaluation(config)
    texts = {s: {i: one["text"] for i, one in found.items()} for s, found in answers.items()}
    path, target, systems, left = config.eval_dir / "judge.jsonl", scores["target"], {}, 0
    for other in scores["differences"]:
        requests = pair_requests(rows, texts[target], texts[other], config.task)
        left += ask_all(requests, path, ask_options(args), f"verdicts on {other}", key=KEY)
        replies = load(path, [{**request, "model": args.model} for request in requests], KEY)
        judged = points(requests, replies, config.task)
        alike = [row["id"] for row in rows if row["id"] not in judged.index]  # draws, not asked
        whole = pd.concat([judged.dropna(), pd.DataFrame(0.5, alike, judged.columns)])
        if lacking := len(rows) - len(whole):
            warn(f"{other}: {lacking} pairs lack a verdict and are left out")
        if len(whole):
            systems[other] = win_rates(whole)
            print(f"{target} against {other}: {systems[other]}")
    verdicts = {"model": args.model, "target": target, "systems": systems}
    for name in ("generation", "answers"):  # what was judged
        verdicts[name] = scores["settings"].get(name)
    write_text(config.eval_dir / "judge.json", json.dumps(verdicts, indent=1))
    write_report(config.eval_dir, scores, rows, answers, config.task)
    if left:
        raise UserError(f"{left} pairs got no verdict; run again to ask for them")


if __name__ == "__main__":
    run(main)
