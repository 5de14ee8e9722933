"""Have the teacher judge pairs of answers, in both orders (judges lean to the one shown first)."""

import pandas as pd

from common.files import digest
from common.text import plain_text
from data_prep.parse_replies import read_better
from data_prep.teacher.read_reply import without_surrogates
from data_prep.teacher.reply_table import why_unusable
from prompts.task import Task

POINTS = {"first": {1: 1.0, 2: 0.0, 0: 0.5}, "second": {1: 0.0, 2: 1.0, 0: 0.5}}  # of answer one


def pair_requests(rows: list[dict], first: dict, second: dict, task: Task) -> list[dict]:
    """Both orders for each of `rows` whose answers, in `first` and `second` by id, are unlike."""
    requests, sha = [], task.sha("judge_pair")
    for row in rows:
        pair = first[row["id"]].strip(), second[row["id"]].strip()
        for order, (one, two) in zip(POINTS, (pair, pair[::-1]), strict=True):
            shown = {"text": row["text"], "first": one, "second": two}
            shown = {name: plain_text(without_surrogates(text)) for name, text in shown.items()}
            prompt = task.render("judge_pair", **shown)
            request = {"id": f"{row['id']} | {order}", "text_id": row["id"], "order": order}
            request |= {"prompt_sha": sha, "settings": {"prompt": digest(prompt)[:12]}}
            if one != two:
                requests.append(request | {"messages": [{"role": "user", "content": prompt}]})
    return requests


def points(requests: list[dict], replies: dict[str, dict], task: Task) -> pd.DataFrame:
    """By text and order: 1 if answer one won, 0 if it lost, 0.5 for a draw, NaN for no verdict."""
    points_by_order: dict[str, dict] = {order: {} for order in POINTS}
    for request in requests:
        verdict = replies.get(request["id"])
        # A verdict that was cut or filtered is none, whatever its text seems to say.
        is_whole = verdict and not why_unusable(verdict)
        better = read_better(verdict["text"], task) if is_whole else None
        order = request["order"]
        points_by_order[order][request["text_id"]] = POINTS[order].get(better)
    return pd.DataFrame(points_by_order, dtype=float)
