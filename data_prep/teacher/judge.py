"""Pairwise verdicts of the teacher, in both orders (a stand-in; the teacher's area owns it)."""

import pandas as pd

from common.files import digest
from data_prep.teacher.parsing import read_better
from prompts import Task

ORDERS = ("first", "second")  # where answer one stands


def pair_requests(rows: list[dict], first: dict, second: dict, task: Task) -> list[dict]:
    """Both orders of every pair of unlike answers; `first`, `second`: id -> answer."""
    requests = []
    for row in rows:
        one, two = first[row["id"]].strip(), second[row["id"]].strip()
        for order, shown in zip(ORDERS, ((one, two), (two, one)), strict=True):
            prompt = task.render("judge_pair", text=row["text"], first=shown[0], second=shown[1])
            requests.append(
                {
                    "id": f"{row['id']} | {order}",
                    "text_id": row["id"],
                    "order": order,
                    "prompt_sha": task.sha("judge_pair"),
                    "settings": {"prompt": digest(prompt)[:12]},
                    "messages": [{"role": "user", "content": prompt}],
                }
            )
    return [r for r in requests if first[r["text_id"]].strip() != second[r["text_id"]].strip()]


def points(requests: list[dict], replies: dict[str, dict], task: Task) -> pd.DataFrame:
    """A line a text, a column an order: 1 if answer one won, 0 lost, 0.5 draw, NaN unread."""
    found = pd.DataFrame(
        float("nan"), index=list(dict.fromkeys(r["text_id"] for r in requests)), columns=ORDERS
    )
    for request in requests:
        reply = replies.get(request["id"])
        better = read_better(reply["text"], task) if reply else None
        if better is not None:
            won = 0.5 if better == 0 else float((better == 1) == (request["order"] == "first"))
            found.loc[request["text_id"], request["order"]] = won
    return found
