"""Ask a chat endpoint many times: as fast as it allows, within a budget, nothing paid for lost.

Any OpenAI-compatible endpoint, through the `together` client. The client's own retries are off, as
each would wait for itself; here one `Pace` and one `Purse` serve all requests. A reply is on disk
before it counts. Endpoint and key come from TOGETHER_BASE_URL and TOGETHER_API_KEY.
"""

import argparse
import asyncio
import json
import math
import signal
import time
from collections import Counter, deque
from pathlib import Path
from typing import BinaryIO

import together
from tabulate import tabulate
from together import AsyncTogether
from tqdm import tqdm

from common import table
from common.cli import UserError, positive
from common.files import append_record, appending, read_records, write_records
from data_prep.teacher.client import (
    FINAL,
    FREE,
    make_client,
    price_of,
    said,
    split_by_length,
    to_record,
    worst_case_usd,
)
from data_prep.teacher.limits import Pace, Purse, wanted_wait

ATTEMPTS = 6  # for one request, at failures that are not about the rate
REFUSALS = 10  # in a row, of requests the endpoint will not take; then something is wrong
STRIKES = 10  # moments of failure in a row; then the endpoint is taken to be down
STRIKES_AT_FIRST = 4  # the same before any answer: then it was never there
LONGEST_WAIT = 600  # seconds that an endpoint may ask for
OVER_BUDGET, INTERRUPTED = "the budget is spent", "interrupted"


def teacher_options(parser: argparse.ArgumentParser) -> None:
    """Add what `ask_all` reads from `args`."""
    option = parser.add_argument
    option("--model", default="openai/gpt-oss-120b", help="the teacher")
    option("--concurrency", type=positive, default=64, help="most requests in flight")
    option("--budget-usd", type=float, help="ceiling for all that the output's folder ever cost")
    option("--max-rate", type=float, help="most requests a second (it adapts to the endpoint)")
    option("--max-tokens", type=positive, default=4096, help="longest reply")
    option("--temperature", type=float, default=0.7, help="of the model's sampling")
    option("--timeout", type=float, default=300, help="seconds to wait for an answer")
    option("--price", type=float, nargs=2, metavar=("IN", "OUT"), help="$ per million tokens")


def without_reply(requests: list[dict], path: Path, model: str) -> list[dict]:
    """The requests to which `path` holds no reply by this model."""
    replies = read_records(path, ("id", "model", "prompt_sha")) if path.exists() else ()
    done = {(reply["id"], reply["prompt_sha"]) for reply in replies if reply["model"] == model}
    return [request for request in requests if (request["id"], request["prompt_sha"]) not in done]


def write_reasons(path: Path, model: str, reasons: dict[str, str]) -> None:
    """Leave beside `path` why requests have no reply, as of the last run."""
    file = path.with_suffix(".missing.jsonl")
    if reasons:
        write_records(file, ({"id": k, "model": model, "reason": r} for k, r in reasons.items()))
    else:
        file.unlink(missing_ok=True)


def batch_state(path: Path) -> Path:
    """Where a batch under way for `path` is written down."""
    return path.with_suffix(".batch.json")


class Log:
    """Appends records; `add` returns when its record is on disk, many in one flush."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.waiting, self.lock = file, [], asyncio.Lock()
        self.added = self.flushed = 0

    async def add(self, record: dict) -> None:
        self.waiting.append(record)
        self.added += 1
        mine = self.added
        async with self.lock:
            if self.flushed < mine:
                records, self.waiting, last = self.waiting, [], self.added
                await asyncio.to_thread(append_record, self.file, *records)
                self.flushed = last


class Asking:
    """One run: the queue, what is in flight, and what came of it."""

    def __init__(self, requests: list[dict], args: argparse.Namespace, price: dict, purse: Purse):
        self.queue, self.args, self.price, self.purse = deque(requests), args, price, purse
        self.spent_before = purse.spent
        self.pace = Pace(args.concurrency, args.max_rate or math.inf)
        self.flying: set[asyncio.Task] = set()
        self.landing = asyncio.Event()
        self.count, self.attempts, self.refusals = Counter(), Counter(), 0
        self.reasons: dict[str, str] = {}
        self.why = ""  # nothing more is sent, but what is in flight is awaited
        self.broken: BaseException | None = None  # a full disk, a second Ctrl-C: nothing is awaited

    async def run(self, log: Log, bar: tqdm) -> None:
        """Ask until nothing is left or something is in the way; raise what broke it off."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self.interrupt)
        async with make_client(self.args) as client:
            while not self.broken and (self.flying or (self.queue and not self.why)):
                if (seconds := self.send_next(client, log)) is None:
                    await self.landing.wait()
                    self.landing.clear()
                else:
                    await asyncio.sleep(min(seconds, 0.2))
                self.show(bar)
            for task in self.flying:
                task.cancel()
        loop.remove_signal_handler(signal.SIGINT)
        if self.broken:
            raise self.broken

    def send_next(self, client: AsyncTogether, log: Log) -> float | None:
        """Send a request; or return the seconds until one may go, None if one must land first."""
        if not self.queue or self.why or len(self.flying) >= self.pace.room():
            return None
        if (seconds := self.pace.wait()) > 0:
            return seconds
        worst = worst_case_usd(self.queue[0], self.price, self.args.max_tokens)
        if not self.purse.reserve(worst):
            self.why = "" if self.flying else OVER_BUDGET
            return None if self.flying else 0
        task = asyncio.create_task(self.ask(client, self.queue.popleft(), worst, log))
        self.flying.add(task)
        task.add_done_callback(self.landed)
        return 0

    def landed(self, task: asyncio.Task) -> None:
        self.flying.discard(task)
        if not task.cancelled() and task.exception():
            self.broken = task.exception()
        self.landing.set()

    def interrupt(self) -> None:
        self.broken = KeyboardInterrupt() if self.why == INTERRUPTED else None
        self.why = INTERRUPTED
        tqdm.write(f"waiting for {len(self.flying)} replies in flight; Ctrl-C again to leave them")
        self.landing.set()

    async def ask(self, client: AsyncTogether, request: dict, worst: float, log: Log) -> None:
        """One request, its reply on disk or its failure dealt with. Raises OSError of the disk."""
        sent_at, args = self.pace.go(), self.args
        try:
            answer = await client.chat.completions.with_raw_response.create(
                model=args.model,
                messages=request["messages"],
                max_tokens=args.max_tokens,
                temperature=args.temperature,
            )
            body = json.loads(answer.http_response.content)
            record = to_record(request, body, args.model, self.price)
        except (together.APIError, ValueError) as error:
            unpaid = getattr(error, "status_code", None) in FREE
            self.purse.settle(worst, 0.0 if unpaid else None)
            return self.take_failure(request, error, sent_at)
        await log.add(record)
        self.purse.settle(worst, record["cost_usd"])
        self.pace.replied(sent_at)
        self.refusals = 0
        self.count += Counter(
            record["usage"], replies=1, length=record["finish_reason"] == "length"
        )

    def take_failure(self, request: dict, error: Exception, sent_at: float) -> None:
        """Ask again, note the reason, or stop, whichever fits the error."""
        key, status, stop = request["id"], getattr(error, "status_code", None), ""
        wanted = wanted_wait(error.response.headers, time.time()) if status else 0.0
        if status in FINAL:
            stop = FINAL[status].format(said=said(error), model=self.args.model)
        elif wanted > LONGEST_WAIT:
            stop = f"the endpoint asks to wait {wanted:,.0f} s ({said(error)})"
        elif status == 429:
            self.count["429s"] += 1
            self.pace.refused(sent_at, wanted)
            self.queue.appendleft(request)
        elif status is None or status >= 500 or status in (408, 409):
            self.count["failures"] += 1
            self.pace.failed(sent_at, wanted)
            self.attempts[key] += 1
            if self.attempts[key] < ATTEMPTS:
                self.queue.append(request)
            else:
                self.reasons[key] = f"{ATTEMPTS} times without an answer, the last: {said(error)}"
        else:
            self.reasons[key], self.refusals = said(error), self.refusals + 1
        patience = STRIKES if self.count["replies"] or status else STRIKES_AT_FIRST
        if self.refusals >= REFUSALS or self.pace.strikes >= patience:
            row = max(self.refusals, self.pace.strikes)
            stop = f"{row} requests in a row failed, the last with: {said(error)}; see the endpoint"
        self.why = self.why or stop

    def show(self, bar: tqdm) -> None:
        count, flying = self.count, len(self.flying)
        tokens = count["prompt_tokens"] + count["completion_tokens"]
        seen = f"{flying} in flight, {count['429s']} 429s, {tokens:,} tokens, {self.money()}"
        bar.set_postfix_str(seen, refresh=False)
        bar.update(count["replies"] - (bar.n - bar.initial))

    def money(self) -> str:
        if "input" not in self.price:
            return "cost unknown"
        of = "" if self.args.budget_usd is None else f" of ${self.args.budget_usd:,.2f}"
        return f"${self.purse.spent:,.4f}{of} spent"

    def table(self, left: int) -> str:
        count, purse = self.count, self.purse
        rows = {
            "replies": f"{count['replies']:,}, {count['length']:,} of them cut at the token limit",
            "still without a reply": f"{left:,}",
            "429s": f"{count['429s']:,}",
            "server errors, timeouts, broken answers": f"{count['failures']:,}",
            "tokens": f"{count['prompt_tokens']:,} in, {count['completion_tokens']:,} out",
            "this run": f"${purse.spent - self.spent_before:,.4f}",
            "this folder so far": self.money(),
            "of it for no reply, or perhaps none": f"${purse.unaccounted:,.4f}",
        }
        return tabulate(rows.items(), disable_numparse=True)


def ask_all(
    requests: list[dict],
    path: Path,
    args: argparse.Namespace,
    label: str,
    key=("id", "model", "prompt_sha"),
) -> int:
    """Append a reply to every request that has none by this model to this prompt.

    `requests`: {id, messages, prompt_sha, ...}; what else they hold goes into the record. Records:
    {id, model, prompt_sha, text, finish_reason, usage, cost_usd, created, ...}. Returns how many
    are still without a reply; those too long for the model's context are never asked, and not
    among them. The reasons are in `path` with .missing.jsonl. Raises UserError where asking on is
    of no use, KeyboardInterrupt after Ctrl-C; what came until then is on disk.
    """
    price = price_of(args)
    with appending(path) as file:
        if batch_state(path).exists():
            raise UserError(f"a batch is under way ({batch_state(path)}); finish it with --batch")
        asked = [{**request, "model": args.model} for request in requests]
        missing = [
            {k: v for k, v in request.items() if k != "model"}
            for request in table.missing(path, asked, key)
        ]
        fitting, reasons = split_by_length(missing, price, args.max_tokens)
        print(f"{label}: {len(requests):,} in all, {len(fitting):,} to ask", flush=True)
        asking = Asking(fitting, args, price, Purse(path, args.budget_usd))
        try:
            if fitting:
                done = len(requests) - len(missing)
                with tqdm(total=len(requests), initial=done, desc=label, unit="reply") as bar:
                    asyncio.run(asking.run(Log(file), bar))
        finally:
            write_reasons(path, args.model, reasons | asking.reasons)
    left = len(fitting) - asking.count["replies"]
    if fitting:
        print(asking.table(left))
    if asking.why == INTERRUPTED:
        raise KeyboardInterrupt
    if asking.why == OVER_BUDGET:
        print(f"{label}: {OVER_BUDGET}; {left:,} are left for a larger --budget-usd")
    elif asking.why:
        raise UserError(f"{asking.why}; {left:,} are left for another run")
    return left
