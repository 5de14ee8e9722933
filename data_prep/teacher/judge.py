"""Ask a teacher which of two answers is the better one, in both orders."""

import pandas as pd

from common.files import digest
from data_prep.teacher.parsing import read_better
from prompts import Task

ORDERS = ("first", "second")


def pair_requests(rows: list[dict], first: dict, second: dict, task: Task) -> list[dict]:
    """Both orders of every two unlike answers to a row's text; `first`, `second`: id -> answer."""
    requests = []
    for row in rows:
        pair = first[row["id"]].strip(), second[row["id"]].strip()
        if pair[0] == pair[1]:
            continue
        for order, (one, two) in zip(ORDERS, (pair, pair[::-1]), strict=True):
            prompt = task.render("judge_pair", text=row["text"], first=one, second=two)
            request = {"id": f"{row['id']} | {order}", "text_id": row["id"], "order": order}
            request |= {"prompt_sha": task.sha("judge_pair")}
            request |= {"settings": {"prompt": digest(prompt)[:12]}}
            requests.append(request | {"messages": [{"role": "user", "content": prompt}]})
    return requests


def points(requests: list[dict], replies: dict[str, dict], task: Task) -> pd.DataFrame:
    """Of answer one, by text id and order: 1 won, 0 lost, 0.5 draw, NaN without a verdict."""
    found = pd.DataFrame(columns=[*ORDERS], dtype=float)
    for request in requests:
        reply = replies.get(request["id"])
        better = read_better(reply["text"], task) if reply else None
        won = None if better is None else 0.5
        if better:
            won = float((better == 1) == (request["order"] == "first"))
        found.loc[request["text_id"], request["order"]] = won
    return found
