"""Ask the teacher for two rated summaries of every extract, and a judge for a second rating.

Reads data/extracts/{train,test}.jsonl, appends to data/replies/{train,test}.jsonl, and with --judge
to judge.jsonl. A later run asks only for what is missing for this model and prompt. The endpoint
and the key come from TOGETHER_BASE_URL and TOGETHER_API_KEY; --plan needs neither.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --budget-usd 50
"""

import argparse
import hashlib
import sys
from itertools import islice
from pathlib import Path

import yaml
from tabulate import tabulate

from common.cli import UserError, positive, run, script_parser
from common.files import read_records
from data_prep.clean_documents import share_of
from data_prep.teacher.ask import ask_all, teacher_options, without_reply
from data_prep.teacher.batch import ask_batch
from data_prep.teacher.client import (
    BYTES_A_TOKEN,
    PRICES,
    cost_usd,
    make_client,
    prompt_bytes,
    split_by_length,
)
from data_prep.teacher.parsing import ParseError, parse_reply
from prompts import render, template_sha

TEACHER = "summarize/teacher.jinja"
JUDGE = "summarize/judge.jinja"
SECONDS_A_REPLY = 10  # of a large model on a serverless endpoint, for the plan's hours


def to_request(extract: dict, balance: bool, seed: int) -> dict:
    """What to ask about an extract; `longer` is the summary, 1 or 2, asked to be the longer one."""
    # By a key of its own: the extracts themselves were chosen by the share of their id.
    longer = 2 if balance and share_of(f"longer {extract['id']}", seed) < 0.5 else 1
    prompt = render(TEACHER, text=extract["text"], longer=longer)
    return {
        "id": extract["id"],
        "messages": [{"role": "user", "content": prompt}],
        "prompt_sha": template_sha(TEACHER),
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
    sha = template_sha(TEACHER)
    extracts = read_records(args.extracts / "train.jsonl", ("id", "text"), "just extracts")
    texts = {extract["id"]: extract["text"] for extract in islice(extracts, args.limit)}
    of = {"model": args.model, "prompt_sha": sha}
    asked = f"{template_sha(JUDGE)} of {args.model} {sha}"  # other replies are judged anew
    requests = []
    for reply in read_records(args.output / "train.jsonl", ("id", "text", "model", "prompt_sha")):
        if (reply["model"], reply["prompt_sha"]) != (args.model, sha) or reply["id"] not in texts:
            continue
        try:
            first, second = parse_reply(reply["text"]).summaries
        except ParseError:
            continue
        prompt = render(JUDGE, text=texts[reply["id"]], summaries=(second, first))
        requests.append(
            {
                "id": reply["id"],
                "messages": [{"role": "user", "content": prompt}],
                "prompt_sha": hashlib.sha256(asked.encode()).hexdigest()[:12],
                "of": of,
                "order": [2, 1],
            }
        )
    return requests


def plan(args: argparse.Namespace) -> str:
    """A table of what the missing replies would take, for every model in the price file."""
    prices = {k: v for k, v in yaml.safe_load(PRICES.read_text()).items() if v["input"]}
    requests = {split: teacher_requests(split, args) for split in args.splits}
    rate = args.max_rate or args.concurrency / SECONDS_A_REPLY
    rows = []
    for model, price in prices.items():
        missing = []
        for split, asked in requests.items():
            missing += without_reply(asked, args.output / f"{split}.jsonl", model)
        fitting, long = split_by_length(missing, price, args.max_tokens)
        tokens_in = sum(map(prompt_bytes, fitting)) / BYTES_A_TOKEN
        tokens_out = len(fitting) * args.reply_tokens
        usd = cost_usd(tokens_in, tokens_out, price)
        rows.append(
            {
                "teacher": model + ("" if price.get("served", True) else " (no longer served)"),
                "context": f"{price['context']:,}" if "context" in price else "?",
                "$ in": f"{price['input']:.2f}",
                "$ out": f"{price['output']:.2f}",
                "requests": f"{len(fitting):,}",
                "too long": f"{len(long):,}",
                "M tokens in": f"{tokens_in / 1e6:.2f}",
                "M tokens out": f"{tokens_out / 1e6:.2f}",
                "$": f"{usd:.2f}",
                "$ in batch": f"{usd * price.get('batch', 1):.2f}",
                "hours": f"{len(fitting) / rate / 3600:.1f}",
            }
        )
    return (
        f"{tabulate(rows, headers='keys', disable_numparse=True, colalign=('left',))}\n\n"
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
    option(
        "--balance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw which summary is the longer one; without, the original's prompt: the first",
    )
    option("--seed", type=int, default=0, help="of that draw")
    option(
        "--judge",
        metavar="MODEL",
        nargs="?",
        const="",
        help="then have the training pairs rated in swapped order, by the teacher or by MODEL",
    )
    option("--batch", action="store_true", help="ask through Together's batch API")
    option("--poll-seconds", type=float, default=30, help="between two looks at a batch")
    option("--plan", action="store_true", help="say what it would cost; nothing is asked")
    option("--reply-tokens", type=positive, default=1100, help="of a reply, for the plan")
    args = parser.parse_args()
    if args.plan:
        print(plan(args))
        return
    make_client(args)
    ask = ask_batch if args.batch else ask_all
    left = 0
    for split in args.splits:
        path = args.output / f"{split}.jsonl"
        left += ask(teacher_requests(split, args), path, args, f"{split} replies")
    if args.judge is not None:
        judge = argparse.Namespace(**vars(args))
        judge.model = args.judge or args.model
        left += ask(judge_requests(args), args.output / "judge.jsonl", judge, "judge's replies")
    if left:
        sys.exit(f"error: {left} requests got no reply; run again to ask for them")


if __name__ == "__main__":
    run(main)
