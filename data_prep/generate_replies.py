"""Ask the teacher about every extract: for two rated answers, or for one.

Reads DATA/extracts/{train,test}.jsonl, appends to DATA/TASK/replies/{train,test}.jsonl. A later run
asks only for what is missing for this model and prompt. The endpoint and the key come from
TOGETHER_BASE_URL and TOGETHER_API_KEY; --plan needs neither.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --budget-usd 50
"""

import argparse
import sys

import pandas as pd

from common.cli import positive, run, script_parser
from common.files import share_of
from common.report import markdown
from common.table import missing
from data_prep.load_extracts import load_extracts
from data_prep.teacher import client
from data_prep.teacher.ask import KEY, REFUSED, ask_all, teacher_options
from prompts import add_task_options, data_folder, task_of

REPLY_TOKENS = {2: 1100, 1: 250}  # of a reply with so many answers, about


def to_requests(split: str, args: argparse.Namespace, answers: int) -> list[dict]:
    """What to ask; `longer` is the answer, 1 or 2, that is asked to be the longer one."""
    path, task = data_folder(args, "extracts") / f"{split}.jsonl", task_of(args)
    template = "teacher_single" if answers < task.answers else "teacher"
    about, requests = {"prompt_sha": task.sha(template), "answers": answers}, []
    for extract in load_extracts(path)[: args.limit]:
        # By a key of its own: the extracts themselves were chosen by the share of their id.
        second = args.balance and share_of(f"longer {extract['id']}", 0) < 0.5
        longer = {"longer": 2 if second else 1}
        prompt = task.render(template, text=extract["text"], **longer)
        request = {"id": extract["id"], "messages": [{"role": "user", "content": prompt}]}
        requests.append(request | about | (longer if answers == 2 else {}))
    return requests


def plan(args: argparse.Namespace) -> pd.DataFrame:
    """What the replies that the model lacks would take, also at the prices of other models."""
    own = client.price_of(argparse.Namespace(**vars(args) | {"batch": False}))  # both are shown
    prices, rows = {args.model: own}, {}
    for name, price in client.PRICES.items():
        if price.get("served", True):
            prices.setdefault(name, price)
    for answers in range(task_of(args).answers, 0, -1):
        lacking = []
        for split in args.splits:
            requests = [one | {"model": args.model} for one in to_requests(split, args, answers)]
            path = data_folder(args, "replies") / f"{split}.jsonl"
            lacking += missing(path.with_suffix(REFUSED), missing(path, requests, KEY), KEY)
        tokens_in = sum(map(client.prompt_bytes, lacking)) / client.BYTES_A_TOKEN
        for model, price in prices.items():
            usd = client.cost_usd(tokens_in, len(lacking) * REPLY_TOKENS[answers], price)
            rows[f"{model} ({answers} a reply)"] = {
                "requests": f"{len(lacking):,}",
                "M tokens in": f"{tokens_in / 1e6:.2f}",
                "M tokens out": f"{len(lacking) * REPLY_TOKENS[answers] / 1e6:.2f}",
                "$": "?" if usd is None else f"{usd:.2f}",
                "$ in batch": "?" if usd is None else f"{usd * price.get('batch', 1):.2f}",
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    parser = script_parser(__doc__)
    add_task_options(parser)
    option = parser.add_argument
    option("--splits", nargs="+", default=["train", "test"], choices=["train", "test"])
    option("--limit", type=positive, help="only the first N extracts of each split")
    option("--single", action="store_true", help="ask for one answer and no rating")
    teacher_options(parser)
    balance = "draw which answer is the longer one; without, it is the first (the original's way)"
    option("--balance", action=argparse.BooleanOptionalAction, default=True, help=balance)
    option("--plan", action="store_true", help="say what it would cost; nothing is asked")
    args = parser.parse_args()
    answers = 1 if args.single else task_of(args).answers
    if args.plan:
        print(markdown(plan(args)))
        print(f"Estimates, 4 bytes to a token; terms: {client.TEACHERS.name}. Nothing was asked.")
        return
    client.make_client(args)  # a missing key is said before anything is read
    left = 0
    for split in args.splits:
        path = data_folder(args, "replies") / f"{split}.jsonl"
        left += ask_all(to_requests(split, args, answers), path, args, f"{split} replies")
    if left:
        sys.exit(f"error: {left} requests got no reply; run again to ask for them")


if __name__ == "__main__":
    run(main)
