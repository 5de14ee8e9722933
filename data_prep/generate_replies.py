"""Ask the teacher for two rated summaries of every extract, and a judge for a second rating.

Reads data/extracts/{train,test}.jsonl, appends to data/replies/{train,test}.jsonl, and with --judge
to judge.jsonl. A later run asks only for what is missing for this model and prompt. The endpoint
and the key come from TOGETHER_BASE_URL and TOGETHER_API_KEY; --plan needs neither.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --budget-usd 50
"""

import argparse
import sys
from itertools import islice
from pathlib import Path

import pandas as pd

from common.cli import UserError, positive, run, script_parser
from common.files import read_records, share_of
from common.report import markdown
from common.table import missing
from data_prep.teacher.ask import KEY, ask_all, refused_file, teacher_options
from data_prep.teacher.batch import ask_batch
from data_prep.teacher.client import (
    BYTES_A_TOKEN,
    PRICES,
    cost_usd,
    fits_context,
    load_teachers,
    make_client,
    price_of,
    prompt_bytes,
)
from data_prep.teacher.parsing import ParseError, parse_reply
from prompts import load_task, render, template_sha

TEACHER, JUDGE = map(load_task().template, ("teacher", "judge"))
JUDGE_KEY = (*KEY, "of")  # a judge's reply is told from others also by whose replies it rates
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
    path = args.extracts / f"{split}.jsonl"
    extracts = islice(read_records(path, ("id", "text"), "just extracts"), args.limit)
    requests = [to_request(extract, args.balance, args.seed) for extract in extracts]
    if not requests:
        raise UserError(f"{path} holds no usable record; make it with `just extracts`")
    return requests


def judge_requests(args: argparse.Namespace) -> list[dict]:
    """A request for each readable training reply of this teacher to this prompt, order swapped."""
    extracts = read_records(args.extracts / "train.jsonl", ("id", "text"), "just extracts")
    texts = {extract["id"]: extract["text"] for extract in islice(extracts, args.limit)}
    of = {"model": args.model, "prompt_sha": template_sha(TEACHER)}
    requests = []
    for reply in read_records(args.output / "train.jsonl", ("id", "text", *of)):
        if any(reply[name] != value for name, value in of.items()) or reply["id"] not in texts:
            continue
        try:
            first, second = parse_reply(reply["text"]).summaries
        except ParseError:
            continue
        prompt = render(JUDGE, text=texts[reply["id"]], summaries=(second, first))
        requests.append(
            {
                "id": reply["id"],
                "prompt_sha": template_sha(JUDGE),
                "messages": [{"role": "user", "content": prompt}],
                "of": of,
                "order": [2, 1],
            }
        )
    return requests


def plan_row(requests: dict[str, list[dict]], price: dict, args: argparse.Namespace) -> dict:
    """What the missing replies of `args.model` would take."""
    asked = []
    for split, of_split in requests.items():
        path = args.output / f"{split}.jsonl"
        wanted = [{"model": args.model} | request for request in of_split]
        asked += missing(refused_file(path), missing(path, wanted, KEY), KEY)
    fitting = [request for request in asked if fits_context(request, price, args.max_tokens)]
    tokens_in = sum(map(prompt_bytes, fitting)) / BYTES_A_TOKEN
    tokens_out = len(fitting) * args.reply_tokens
    usd = cost_usd(tokens_in, tokens_out, price) or 0.0
    rate = args.max_rate or args.concurrency / SECONDS_A_REPLY
    return {
        "teacher": args.model + ("" if price.get("served", True) else " (no longer served)"),
        "context": f"{price['context']:,}" if "context" in price else "?",
        "$ in, out": f"{price['input']:.2f}, {price['output']:.2f}" if "input" in price else "?",
        "requests": f"{len(fitting):,}",
        "too long": f"{len(asked) - len(fitting):,}",
        "M tokens in": f"{tokens_in / 1e6:.2f}",
        "M tokens out": f"{tokens_out / 1e6:.2f}",
        "$": f"{usd:.2f}" if "input" in price else "?",
        "$ in batch": f"{usd * price.get('batch', 1):.2f}" if "input" in price else "?",
        "hours": f"{len(fitting) / rate / 3600:.1f}",
    }


def plan(args: argparse.Namespace) -> str:
    """A table of what the missing replies would take, of the chosen model first."""
    requests = {split: teacher_requests(split, args) for split in args.splits}
    others = {k: price for k, price in load_teachers().items() if price["input"]}
    prices = {args.model: price_of(args)} | {k: v for k, v in others.items() if k != args.model}
    rows = []
    for model, price in prices.items():
        rows.append(plan_row(requests, price, argparse.Namespace(**vars(args) | {"model": model})))
    rate = args.max_rate or args.concurrency / SECONDS_A_REPLY
    return (
        f"{markdown(pd.DataFrame(rows).set_index('teacher'))}\n\n"
        f"Estimates: {BYTES_A_TOKEN} bytes to a token in, {args.reply_tokens:,} tokens to a reply "
        f"(--reply-tokens), {rate:g} requests a second (--max-rate).\nPrices are per million "
        f"tokens; {PRICES.name} has them, and the terms on what a model writes. Nothing was asked."
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
    judge = "then have the training pairs rated in swapped order, by the teacher or by MODEL"
    option("--judge", metavar="MODEL", nargs="?", const="", help=judge)
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
    if args.judge is not None:
        requests, path = judge_requests(args), args.output / "judge.jsonl"
        args.model = args.judge or args.model
        left += ask(requests, path, args, "judge's replies", JUDGE_KEY)
    if left:
        sys.exit(f"error: {left} requests got no reply; run again to ask for them")


if __name__ == "__main__":
    run(main)
