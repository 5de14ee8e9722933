"""Ask the teacher for two rated summaries of every extract.

Reads data/extracts/{train,test}.jsonl, appends to data/replies/{train,test}.jsonl. A later run asks
only for what is missing for this model and prompt. The endpoint and the key come from
TOGETHER_BASE_URL and TOGETHER_API_KEY; --plan needs neither.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --budget-usd 50
"""

import argparse
import math
import sys
from pathlib import Path

import pandas as pd

from common.cli import positive, run, script_parser
from common.files import load_records, share_of
from common.report import markdown
from common.table import missing
from data_prep.teacher.ask import KEY, ask_all, refused_file, teacher_options
from data_prep.teacher.batch import ask_batch
from data_prep.teacher.client import (
    BYTES_A_TOKEN,
    cost_usd,
    fits_context,
    make_client,
    price_of,
    prompt_bytes,
)
from data_prep.teacher.prices import PRICES, load_prices
from prompts import load_task, render, template_sha

TEACHER = load_task().template("teacher")
SECONDS_A_REPLY = 10  # of a large model on a serverless endpoint, for the plan's hours


def to_request(extract: dict, balance: bool, seed: int) -> dict:
    """What to ask about an extract; `longer` is the summary, 1 or 2, asked to be the longer one."""
    # By a key of its own: the extracts themselves were chosen by the share of their id.
    longer = 2 if balance and share_of(f"longer {extract['id']}", seed) < 0.5 else 1
    prompt = render(TEACHER, text=extract["text"], longer=longer)
    return {
        "id": extract["id"],
        "prompt_sha": template_sha(TEACHER),
        "messages": [{"role": "user", "content": prompt}],
        "longer": longer,
    }


def teacher_requests(split: str, args: argparse.Namespace) -> list[dict]:
    extracts = load_records(args.extracts / f"{split}.jsonl", ("id", "text"), "just extracts")
    return [to_request(extract, args.balance, args.seed) for extract in extracts[: args.limit]]


def plan(args: argparse.Namespace) -> str:
    """A table of what the missing replies would take, of the chosen model first."""
    requests = {args.output / f"{s}.jsonl": teacher_requests(s, args) for s in args.splits}
    rate = args.max_rate or args.concurrency / SECONDS_A_REPLY
    prices, rows = {args.model: price_of(args)}, {}
    prices |= {k: v for k, v in load_prices().items() if v["input"] and k != args.model}
    for model, price in prices.items():
        unanswered = []
        for path, asked in requests.items():
            asked = [request | {"model": model} for request in asked]
            unanswered += missing(refused_file(path), missing(path, asked, KEY), KEY)
        fitting = [r for r in unanswered if fits_context(r, price, args.max_tokens)]
        tokens_in = sum(map(prompt_bytes, fitting)) / BYTES_A_TOKEN
        tokens_out = len(fitting) * args.reply_tokens
        usd = cost_usd(tokens_in, tokens_out, price)
        usd = math.nan if usd is None else usd
        rows[model + ("" if price.get("served", True) else " (no longer served)")] = {
            "context": f"{price.get('context', math.nan):,}",
            "requests": f"{len(fitting):,}",
            "too long": f"{len(unanswered) - len(fitting):,}",
            "M tokens in": f"{tokens_in / 1e6:.2f}",
            "M tokens out": f"{tokens_out / 1e6:.2f}",
            "$": f"{usd:.2f}",
            "$ in batch": f"{usd * price.get('batch', 1):.2f}",
            "hours": f"{len(fitting) / rate / 3600:.1f}",
        }
    return (
        f"{markdown(pd.DataFrame.from_dict(rows, orient='index'))}\n\n"
        f"Estimates: {BYTES_A_TOKEN} bytes to a token in, {args.reply_tokens:,} tokens to a reply "
        f"(--reply-tokens), {rate:g} requests a second (--max-rate).\n{PRICES.name} has the prices "
        "and the terms on what a model writes. Nothing was asked."
    )


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--extracts", type=Path, default=Path("data/extracts"), help="folder")
    option("--output", type=Path, default=Path("data/replies"), help="folder")
    option("--splits", nargs="+", default=["train", "test"], choices=["train", "test"])
    option("--limit", type=positive, help="only the first N extracts of each split")
    teacher_options(parser)
    balance = "draw which summary is the longer one; without, it is the first (the original's way)"
    option("--balance", action=argparse.BooleanOptionalAction, default=True, help=balance)
    option("--seed", type=int, default=0, help="of that draw")
    option("--batch", action="store_true", help="ask through Together's batch API")
    option("--poll-seconds", type=float, default=30, help="between two looks at a batch")
    option("--plan", action="store_true", help="say what it would cost; nothing is asked")
    option("--reply-tokens", type=positive, default=1100, help="of a reply, for the plan")
    args = parser.parse_args()
    if args.plan:
        print(plan(args))
        return
    make_client(args)  # a missing key is said before anything is read
    ask = ask_batch if args.batch else ask_all
    left = 0
    for split in args.splits:
        path = args.output / f"{split}.jsonl"
        left += ask(teacher_requests(split, args), path, args, f"{split} replies")
    if left:
        sys.exit(f"error: {left} requests got no reply; run again to ask for them")


if __name__ == "__main__":
    run(main)
