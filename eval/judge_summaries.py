"""Have the teacher judge the target's summaries against every other system's, in both orders.

G-Eval's four criteria (Liu et al. 2023) in a pairwise prompt. Reads scores.json and the summaries
of outputs/<config>/eval, appends the replies to judge/replies.jsonl there (budget and resume as
for the teacher's replies), writes judge.json and renews the report.

    TOGETHER_API_KEY=... python -m eval.judge_summaries CONFIG.yaml --budget-usd 2
"""

import hashlib
import json
import re
from pathlib import Path

import numpy as np

from common.cli import UserError, run, script_parser, warn
from common.files import read_records, replacing
from common.report import paired_bootstrap
from data_prep.teacher.ask import ask_all, teacher_options
from eval.build_report import load_scores, write_report
from eval.score_summaries import load_summaries
from eval.systems import load_test_rows
from prompts import render
from training.run_config import load_run_config

TEMPLATE = "summarize/judge_pair.jinja"
ORDERS = ("target first", "target second")
BETTER = re.compile(r"^\W*Better\W*:\W*([012])\b", re.IGNORECASE | re.MULTILINE)


def to_requests(rows: list[dict], summaries: dict, target: str, other: str) -> list[dict]:
    """Both orders of every pair of unlike summaries."""
    requests = []
    for row in rows:
        pair = [summaries[system][row["id"]]["text"].strip() for system in (target, other)]
        for order, (first, second) in zip(ORDERS, (pair, pair[::-1]), strict=True):
            prompt = render(TEMPLATE, text=row["text"], first=first, second=second)
            request = {
                "id": f"{row['id']} | {target}, {other} | {order}",
                "messages": [{"role": "user", "content": prompt}],
                # The whole prompt's, so that changed summaries are judged anew.
                "prompt_sha": hashlib.sha256(prompt.encode()).hexdigest()[:12],
                **{"text_id": row["id"], "other": other, "order": order},
            }
            requests += [request] if first != second else []
    return requests


def target_points(verdict: str, place: int) -> float | None:
    """1 if the target, shown at `place`, wins, 0 if it loses, 0.5 for a draw; None if unsaid."""
    if not (found := BETTER.findall(verdict)):
        return None
    return 0.5 if found[-1] == "0" else float(int(found[-1]) == place + 1)


def compare(points: dict[str, list[float]]) -> dict:
    """Win rate with its 95% interval, position bias and disagreements of {id: [first, second]}."""
    both = [sum(pair) / 2 for pair in points.values()]
    first_shown = [p for first, second in points.values() for p in (first, 1 - second)]
    decided = [p for p in first_shown if p != 0.5]
    return {
        "n": len(points),
        "win_rate": paired_bootstrap(both, [0.0] * len(both)),
        "first_wins": round(float(np.mean(decided)), 3) if decided else None,
        "disagreements": [key for key, (first, second) in points.items() if first != second],
    }


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", type=Path, help="the axolotl YAML of the run")
    parser.add_argument("--against", nargs="+", help="only these systems (default: all)")
    teacher_options(parser)
    parser.set_defaults(temperature=0.0, max_tokens=2048)
    args = parser.parse_args()
    config = load_run_config(args.config)
    scores = load_scores(config)
    rows = load_test_rows(config, scores["n"])
    summaries = load_summaries(config, rows, list(scores["systems"]))
    against = args.against or [other for other in summaries if other != scores["target"]]
    if unknown := set(against) - set(scores["differences"]):
        raise UserError(f"no scores of {', '.join(unknown)}; there are {', '.join(summaries)}")
    requests = [r for o in against for r in to_requests(rows, summaries, scores["target"], o)]
    path = config.eval_dir / "judge" / "replies.jsonl"
    left = ask_all(requests, path, args, "verdicts")
    replies = (r for r in read_records(path) if r["model"] == args.model)
    said = {(r["id"], r["prompt_sha"]): r["text"] for r in replies}
    points = {other: {row["id"]: [0.5, 0.5] for row in rows} for other in against}
    for request in requests:
        verdict = said.get((request["id"], request["prompt_sha"]), "")
        place = ORDERS.index(request["order"])
        points[request["other"]][request["text_id"]][place] = target_points(verdict, place)
    result = {"model": args.model, "target": scores["target"], "systems": {}}
    for other, pairs in points.items():
        whole = {key: pair for key, pair in pairs.items() if None not in pair}
        if len(whole) < len(pairs):
            warn(f"{other}: {len(pairs) - len(whole)} pairs lack a verdict and are left out")
        if whole:
            result["systems"][other] = found = compare(whole)
            mean, low, high = found["win_rate"]
            print(
                f"{scores['target']} against {other}: wins {mean:.3f} [{low:.3f}, {high:.3f}], "
                f"n = {found['n']}; of the decided the first shown wins {found['first_wins']}; "
                f"{len(found['disagreements'])} verdicts depend on the order"
            )
    with replacing(config.eval_dir / "judge.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    write_report(config.eval_dir, scores, rows, summaries, result)
    if left:
        raise UserError(f"{left} pairs got no verdict; run again to ask for them")


if __name__ == "__main__":
    run(main)
