"""Have the teacher judge the target's summaries against every other system's, in both orders.

G-Eval's four criteria (Liu et al. 2023) in a pairwise prompt. Reads scores.json and the summaries
of outputs/RUN/eval, appends the verdicts to judge/replies.jsonl there (budget and resume as for
the teacher's replies), writes judge.json and builds the report anew.

    TOGETHER_API_KEY=... python -m eval.judge_summaries RUN --budget-usd 2
"""

import json

import numpy as np
import pandas as pd

from common.cli import UserError, run, script_parser, warn
from common.files import digest, write_text
from common.report import paired_bootstrap
from common.table import load
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.parsing import read_better
from eval.build_report import write_report
from eval.score_summaries import load_evaluation
from prompts import Task, load_task, render, template_sha
from training.run_config import load_run_config

ORDERS = ("target first", "target second")
KEY = ("id", "model", "settings")  # changed summaries are judged anew


def to_requests(
    rows: list[dict], summaries: dict, target: str, other: str, task: Task
) -> list[dict]:
    """Both orders of every pair of unlike summaries."""
    template, requests = task.template("judge_pair"), []
    for row in rows:
        pair = [summaries[system][row["id"]]["text"].strip() for system in (target, other)]
        if pair[0] == pair[1]:
            continue
        for order, (first, second) in zip(ORDERS, (pair, pair[::-1]), strict=True):
            prompt = render(template, text=row["text"], first=first, second=second)
            request = {
                "id": f"{row['id']} | {target}, {other} | {order}",
                "messages": [{"role": "user", "content": prompt}],
                "prompt_sha": template_sha(template),
                "settings": {"prompt": digest(prompt)[:12]},
            }
            requests.append(request | {"text_id": row["id"], "other": other, "order": order})
    return requests


def target_points(better: int | None, order: str) -> float | None:
    """1 if the target wins, 0 if it loses, 0.5 for a draw; None without a verdict."""
    if better is None:
        return None
    return 0.5 if better == 0 else float((better == 1) == (order == "target first"))


def win_rates(points: pd.DataFrame) -> dict:
    """Win rate with its 95% interval, position bias and disagreements; a line a text, a column an
    order, of the target's points."""
    both, (first, second) = points.mean(axis=1), (points[order] for order in ORDERS)
    first_shown = pd.concat([first, 1 - second])
    decided = first_shown[first_shown != 0.5]
    return {
        "n": len(points),
        "win_rate": paired_bootstrap(both, np.zeros(len(both))),
        "first_wins": round(float(decided.mean()), 3) if len(decided) else None,
        "disagreements": points.index[first != second].tolist(),
    }


def compare(requests: list[dict], replies: dict[str, dict], rows: list[dict], task: Task) -> dict:
    """Win rates over the system that `requests` are about; like summaries, not asked about, draw.

    Pairs that lack a verdict are left out; empty if there is no other.
    """
    points = pd.DataFrame(0.5, index=[row["id"] for row in rows], columns=list(ORDERS))
    for request in requests:
        reply = replies.get(request["id"])
        better = read_better(reply["text"], task) if reply else None
        points.loc[request["text_id"], request["order"]] = target_points(better, request["order"])
    whole = points.dropna()
    if lacking := len(points) - len(whole):
        warn(f"{requests[0]['other']}: {lacking} pairs lack a verdict and are left out")
    return win_rates(whole) if len(whole) else {}


def show(target: str, other: str, found: dict) -> None:
    mean, low, high = found["win_rate"]
    print(
        f"{target} against {other}: wins {mean:.3f} [{low:.3f}, {high:.3f}], n = {found['n']}; "
        f"of the decided the first shown wins {found['first_wins']}; "
        f"{len(found['disagreements'])} verdicts depend on the order"
    )


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    parser.add_argument("--against", nargs="+", help="only these systems (default: all)")
    teacher_options(parser)
    parser.set_defaults(temperature=0.0, max_tokens=2048)
    args = parser.parse_args()
    config, task = load_run_config(args.config), load_task()
    scores, rows, summaries = load_evaluation(config)
    target, against = scores["target"], args.against or list(scores["differences"])
    if unknown := set(against) - set(scores["differences"]):
        raise UserError(f"no scores of {', '.join(unknown)}; there are {', '.join(summaries)}")
    asked = {other: to_requests(rows, summaries, target, other, task) for other in against}
    requests = [request for about in asked.values() for request in about]
    path = config.eval_dir / "judge" / "replies.jsonl"
    left = ask_all(requests, path, args, "verdicts", key=KEY)
    replies = load(path, [{**request, "model": args.model} for request in requests], KEY)
    systems = {other: compare(asked[other], replies, rows, task) for other in against}
    systems = {other: found for other, found in systems.items() if found}
    for other, found in systems.items():
        show(target, other, found)
    verdicts = {"model": args.model, "target": target, "systems": systems}
    verdicts["generation"] = scores["settings"]["generation"]  # what was judged
    write_text(config.eval_dir / "judge.json", json.dumps(verdicts, indent=1))
    write_report(config.eval_dir, scores, rows, summaries)
    if left:
        raise UserError(f"{left} pairs got no verdict; run again to ask for them")


if __name__ == "__main__":
    run(main)
