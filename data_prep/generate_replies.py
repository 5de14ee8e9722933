"""Ask the teacher about every extract: for two rated answers, or for one.

Reads DATA/extracts/{train,test}.jsonl, appends to DATA/TASK/replies/{train,test}.jsonl. A later run
asks only for what is missing for this model and prompt. The endpoint and the key come from
TOGETHER_BASE_URL and TOGETHER_API_KEY; --plan needs neither.

    TOGETHER_API_KEY=... python -m data_prep.generate_replies --budget-usd 50
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from common.cli import positive, run, script_parser
from common.files import share_of
from common.stats import markdown
from data_prep.load_extracts import load_extracts
from data_prep.teacher import client, prices
from data_prep.teacher.ask import KEY, REFUSED, ask_all, find_refusals, prepare, teacher_options
from data_prep.teacher.client import AskOptions
from data_prep.teacher.endpoints import check_endpoints
from data_prep.teacher.prices import PRICES, TEACHERS
from data_prep.teacher.reply_table import adopt_old, find_replies
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import Task, add_task_options, data_folder, task_of


def to_requests(prompts: TeacherPrompts, answers: int, balance: bool) -> list[dict]:
    """What to ask about each extract; `longer` is the answer, 1 or 2, that is asked to be the
    longer one."""
    task, requests = prompts.task, []
    template = "teacher_single" if answers < task.answers else "teacher"
    about = {"prompt_sha": task.sha(template), "answers": answers}
    for key in prompts.extracts:
        # By a key of its own: the extracts themselves were chosen by the share of their id.
        second = balance and share_of(f"longer {key}", 0) < 0.5
        longer = 2 if second else 1
        request = {"id": key, "text_digest": prompts.text_digest(key)} | about
        if answers == 2:
            request["longer"] = longer
        requests.append(request | {"messages": prompts.messages(template, key, longer)})
    return requests


@dataclass(frozen=True)
class ReplyOptions:
    """About which extracts the teacher is asked, and where they and the replies are."""

    task: Task
    extracts: Path  # a folder
    replies: Path
    splits: tuple[str, ...]
    limit: int | None  # of each split only so many
    balance: bool  # draw which of two answers is to be the longer one
    adopt_old: bool


@dataclass(frozen=True)
class Split:
    """A split's table of replies and what is asked about its extracts."""

    name: str
    replies: Path
    extracts: Path
    prompts: TeacherPrompts

    def adopt(self, table: Path, vouched: bool) -> None:
        adopt_old(table, self.extracts, self.prompts, vouched)


def read_split(options: ReplyOptions, name: str) -> Split:
    extracts = options.extracts / f"{name}.jsonl"
    prompts = TeacherPrompts(options.task, load_extracts(extracts)[: options.limit])
    return Split(name, options.replies / f"{name}.jsonl", extracts, prompts)


def lacking_of(split: Split, answers: int, balance: bool, asking: AskOptions) -> list[dict]:
    """The requests that a run would send now."""
    requests = prepare(to_requests(split.prompts, answers, balance), KEY, asking)
    replies = find_replies(split.replies, requests)
    refusals = find_refusals(split.replies.with_suffix(REFUSED), requests, KEY)
    return [r for r in requests if r["id"] not in replies and r["id"] not in refusals]


def lacking_requests(options: ReplyOptions, asking: AskOptions) -> dict[int, list[dict]]:
    """The requests whose replies the model lacks, by the number of answers that they ask for."""
    splits = [read_split(options, name) for name in options.splits]
    for split in splits:
        split.adopt(split.replies, options.adopt_old)
    lacking = {}
    for answers in range(options.task.answers, 0, -1):
        lacking[answers] = []
        for split in splits:
            lacking[answers] += lacking_of(split, answers, options.balance, asking)
    return lacking


def price_table(lacking: dict[int, list[dict]], asking: AskOptions) -> pd.DataFrame:
    """What requests would take of each model, by the number of answers that they ask for."""
    # Without the batch API's discount, which is shown beside it.
    price_by_model = {asking.model: prices.price_of(asking.model, asking.price)}
    for model, price in PRICES.items():
        if price.get("served", True):
            price_by_model.setdefault(model, price)
    rows = {}
    for answers, requests in lacking.items():
        tokens_in = sum(map(prices.prompt_bytes, requests)) / prices.BYTES_A_TOKEN
        for model, price in price_by_model.items():
            tokens_a_reply = prices.reply_tokens(answers, asking.answer_tokens)
            tokens_out = len(requests) * (tokens_a_reply + price.get("reasoning", 0))
            usd = prices.cost_usd(tokens_in, tokens_out, price)
            rows[f"{model} ({answers} a reply)"] = {
                "requests": f"{len(requests):,}",
                "M tokens in": f"{tokens_in / 1e6:.2f}",
                "M tokens out": f"{tokens_out / 1e6:.2f}",
                "$": "?" if usd is None else f"{usd:.2f}",
                "$ in batch": "?" if usd is None else f"{usd * price.get('batch', 1):.2f}",
                "$ for 1,000": "?" if usd is None else f"{1000 * usd / max(1, len(requests)):.2f}",
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def answer_tokens(task: Task) -> int:
    """Tokens of a teacher's answer, about."""
    return min(prices.ANSWER_TOKENS, task.max_new_tokens)


def explain_plan(task: Task, asking: AskOptions) -> str:
    """How the plan's numbers were estimated, as text."""
    one, two = (prices.reply_tokens(answers, asking.answer_tokens) for answers in (1, 2))
    answers = f"{one} tokens an answer"
    if task.answers == 2:
        answers = f"{two:,} tokens of two rated answers, {one} of one"
    reasoning = [f"{model} {p['reasoning']:,}" for model, p in PRICES.items() if "reasoning" in p]
    return (
        f"Estimates: 4 bytes to a token in; out {answers}, and for a teacher that reasons the\n"
        f"tokens of its reasoning, by the guesses of {TEACHERS.name}: {', '.join(reasoning)}.\n"
        f"Prices and terms: {TEACHERS.name}. Nothing was asked."
    )


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add_task_options(parser)
    option = parser.add_argument
    option("--splits", nargs="+", default=["train", "test"], choices=["train", "test"])
    option("--limit", type=positive, help="only the first N extracts of each split")
    option("--single", action="store_true", help="ask for one answer and no rating")
    teacher_options(parser)
    balance = "draw which answer is the longer one; without, it is the first (the original's way)"
    option("--balance", action=argparse.BooleanOptionalAction, default=True, help=balance)
    option("--adopt-old", action="store_true", help=ADOPT_OLD)
    option("--plan", action="store_true", help="say what it would cost; nothing is asked")
    return parser


ADOPT_OLD = "take replies of earlier versions as replies to today's texts and prompts"


def reply_options(args: argparse.Namespace) -> ReplyOptions:
    return ReplyOptions(
        task=task_of(args),
        extracts=data_folder(args, "extracts"),
        replies=data_folder(args, "replies"),
        splits=tuple(args.splits),
        limit=args.limit,
        balance=args.balance,
        adopt_old=args.adopt_old,
    )


def main() -> None:
    args = make_parser().parse_args()
    task = task_of(args)
    asking = client.ask_options(args, answer_tokens=answer_tokens(task))
    options = reply_options(args)
    if args.plan:
        print(markdown(price_table(lacking_requests(options, asking), asking)))
        print(explain_plan(task, asking))
        return
    check_endpoints(asking.base_url, asking.batch)  # before anything is read
    answers = 1 if args.single else task.answers
    left = 0
    for name in options.splits:
        split = read_split(options, name)
        for table in (split.replies, split.replies.with_suffix(REFUSED)):
            split.adopt(table, options.adopt_old)
        requests = to_requests(split.prompts, answers, options.balance)
        left += ask_all(requests, split.replies, asking, f"{name} replies")
    if left:
        hint = "run again, with a larger --budget-usd where it is spent"
        sys.exit(f"error: {left} requests got no reply; {hint}")


if __name__ == "__main__":
    run(main)
