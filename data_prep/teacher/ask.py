"""Ask a chat endpoint many times: as fast as it allows, within a budget, nothing paid for lost.

Any OpenAI-compatible endpoint, through the `together` client. The client's own retries are off, as
each would wait for itself; here one `RateLimiter` and one `Budget` serve all requests. A reply is
on disk before it counts. What the endpoint refuses for good is remembered with its reason in
REPLIES.refused.jsonl. Endpoint and key come from TOGETHER_BASE_URL and TOGETHER_API_KEY.
"""

import argparse
import asyncio
import json
import signal
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import together
from tqdm import tqdm

from common.cli import UserError, positive
from common.files import append_record, appending
from common.table import Key, missing
from data_prep.teacher.client import (
    FATAL,
    error_message,
    fits_context,
    is_refusal,
    make_client,
    price_of,
    to_record,
    to_refusal,
    worst_case_usd,
)
from data_prep.teacher.limits import Budget, RateLimiter, retry_after

KEY = ("id", "model", "prompt_sha")  # what tells a reply from others, unless `ask_all` gets another
ATTEMPTS = 6  # for one request, at failures that are not about the rate
MOST_REFUSALS = 10  # before any reply; then what is in flight must tell whether any gets through
MOST_FAILURES = 10  # moments of failure in a row; then the endpoint is taken to be down
MOST_FAILURES_AT_FIRST = 4  # the same where nobody ever answered; then it was never there
LONGEST_WAIT = 600  # seconds that an endpoint may ask for
TICK = 0.2  # seconds between two looks at what is in flight
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
    option("--retry-refused", action="store_true", help="ask again for what was refused for good")


def refused_file(path: Path) -> Path:
    """Where the refusals of requests for `path` are remembered."""
    return path.with_suffix(".refused.jsonl")


def batch_state(path: Path) -> Path:
    """Where a batch under way for `path` is written down."""
    return path.with_suffix(".batch.json")


def append_refusals(path: Path, refusals: list[dict]) -> None:
    with appending(refused_file(path)) as file:
        append_record(file, *refusals)


def select_requests(
    requests: list[dict], path: Path, args: argparse.Namespace, price: dict, label: str, key: Key
) -> tuple[list[dict], bool]:
    """(requests to ask, whether others of them have a reply); says what is left out and why."""
    requests = [{"model": args.model} | request for request in requests]
    unanswered = missing(path, requests, key)
    fitting = [one for one in unanswered if fits_context(one, price, args.max_tokens)]
    wanted = fitting if args.retry_refused else missing(refused_file(path), fitting, key)
    print(f"{label}: {len(requests):,} in all, {len(wanted):,} to ask", flush=True)
    if long := len(unanswered) - len(fitting):
        print(f"  {long:,} too long for the model's context of {price['context']:,} tokens")
    if refused := len(fitting) - len(wanted):
        print(f"  {refused:,} refused before, see {refused_file(path)}; --retry-refused asks again")
    return wanted, len(unanswered) < len(requests)


class RequestQueue:
    """One run: what is still to ask, what is in flight, and what came of it.

    `answered`: the endpoint has answered others of these requests before, so a refusal is about the
    one request. If not, refusals count only once a reply came: a wrong option refuses everything.
    """

    def __init__(
        self,
        requests: list[dict],
        answered: bool,
        path: Path,
        price: dict,
        args: argparse.Namespace,
    ) -> None:
        self.waiting, self.total, self.answered = deque(requests), len(requests), answered
        self.path, self.price, self.args = path, price, args
        self.limiter = RateLimiter(args.concurrency, args.max_rate)
        self.budget, self.usd = Budget(path.parent, args.budget_usd), 0.0
        self.in_flight: set[asyncio.Task] = set()
        self.disk = asyncio.Lock()
        self.count, self.attempts, self.failures = Counter(), Counter(), Counter()
        self.refusals: list[dict] = []  # those not yet remembered
        self.stop = ""  # the first reason to send no more; what is in flight is awaited
        self.interrupts = 0  # at the second nothing is awaited

    async def run(self, replies: BinaryIO, bar: tqdm) -> None:
        """Ask until nothing is left or something is in the way. Raises OSError of the disk."""
        self.replies = replies
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt)
        async with make_client(self.args) as self.client:
            while self.interrupts < 2 and (self.in_flight or (self.waiting and not self.stop)):
                if (seconds := self.limiter.wait()) > 0:
                    await self.land(min(seconds, TICK))
                elif not self.send():
                    await self.land(TICK)
                self.show(bar)
        if self.refusals:
            self.stop_with(self.all_refused())

    def interrupt(self) -> None:
        self.interrupts += 1
        self.stop_with(INTERRUPTED)
        flying = len(self.in_flight)
        tqdm.write(f"waiting for {flying} replies in flight; Ctrl-C again to leave them")

    def stop_with(self, reason: str) -> None:
        self.stop = self.stop or reason

    def all_refused(self) -> str:
        many, why = self.count["refused"], self.last_refusal
        return f"all {many} requests sent were refused, the last with: {why}; check the options"

    def send(self) -> bool:
        """Send the next request if it may go out now; if none ever will, `stop` says why."""
        if self.stop or not self.waiting or len(self.in_flight) >= self.limiter.room():
            return False
        worst = worst_case_usd(self.waiting[0], self.price, self.args.max_tokens)
        if self.count["refused"] >= MOST_REFUSALS and not self.count["replies"]:
            obstacle = self.all_refused()
        else:
            obstacle = "" if self.budget.reserve(worst) else OVER_BUDGET
        if not obstacle:
            asking = self.ask(self.waiting.popleft(), worst, self.limiter.sent())
            self.in_flight.add(asyncio.create_task(asking))
        elif not self.in_flight:  # else a reply may yet come, or money be given back
            self.stop_with(obstacle)
        return not obstacle

    async def land(self, seconds: float) -> None:
        """Wait for an answer, at most so long. Raises OSError if it could not be written."""
        if not self.in_flight:
            await asyncio.sleep(seconds)
            return
        done, self.in_flight = await asyncio.wait(
            self.in_flight, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        for task in done:
            task.result()

    async def ask(self, request: dict, worst: float, sent_at: float) -> None:
        """One request, its reply on disk or its failure dealt with. Raises OSError of the disk."""
        try:
            answer = await self.client.chat.completions.with_raw_response.create(
                model=self.args.model,
                messages=request["messages"],
                max_tokens=self.args.max_tokens,
                temperature=self.args.temperature,
            )
            record = to_record(request, json.loads(answer.http_response.content), self.price)
        except (together.APIError, ValueError) as error:
            status = getattr(error, "status_code", 0)
            free = is_refusal(status) or status in (429, 503)  # nothing was made
            self.settle(worst, 0.0 if free else None)
            await self.take_failure(request, error, status, sent_at)
            return
        await self.write(append_record, self.replies, record)
        self.settle(worst, record["cost_usd"])
        self.limiter.replied(sent_at)
        length = record["finish_reason"] == "length"
        self.count += Counter(record["usage"], replies=1, length=length)
        await self.remember_refusals()

    async def write(self, append: Callable, *what: object) -> None:
        """One after the other, and on return it is on disk."""
        async with self.disk:
            await asyncio.to_thread(append, *what)

    def settle(self, worst: float, cost: float | None) -> None:
        self.budget.settle(worst, cost)
        self.usd += worst if cost is None else cost

    async def take_failure(
        self, request: dict, error: Exception, status: int, sent_at: float
    ) -> None:
        """Ask again, remember the refusal, or stop, whichever fits the error."""
        reason = error_message(error)
        asked = retry_after(error.response.headers) if status else 0.0
        if status in FATAL:
            self.stop_with(FATAL[status].format(reason=reason, model=self.args.model))
        elif asked > LONGEST_WAIT:
            self.stop_with(f"the endpoint asks to wait {asked:,.0f} s ({reason})")
        elif is_refusal(status):
            self.count["refused"] += 1
            self.last_refusal = reason
            self.refusals.append(to_refusal(request, reason))
            await self.remember_refusals()
        elif status == 429:
            self.count["429s"] += 1
            self.limiter.refused(sent_at, asked)
            self.waiting.appendleft(request)
        else:
            self.count["failures"] += 1
            self.limiter.failed(sent_at, asked)
            self.attempts[request["id"]] += 1
            if self.attempts[request["id"]] < ATTEMPTS:
                self.waiting.append(request)
            else:
                self.failures[reason] += 1
        in_a_row, there = self.limiter.failures, status or self.count["replies"]
        if in_a_row >= (MOST_FAILURES if there else MOST_FAILURES_AT_FIRST):
            self.stop_with(f"{in_a_row} requests in a row failed, the last with: {reason}")

    async def remember_refusals(self) -> None:
        """Write them down once it is known that the endpoint answers others."""
        if self.refusals and (self.answered or self.count["replies"]):
            refusals, self.refusals = self.refusals, []
            await self.write(append_refusals, self.path, refusals)

    def left(self) -> int:
        """How many of the requests have neither a reply nor a final reason."""
        return self.total - self.count["replies"] - self.count["refused"] + len(self.refusals)

    def show(self, bar: tqdm) -> None:
        bar.set_postfix_str(f"{len(self.in_flight)} in flight, {self.summary()}", refresh=False)
        bar.update(bar.initial + self.count["replies"] + self.count["refused"] - bar.n)

    def summary(self) -> str:
        count, money = self.count, "cost unknown"
        if "input" in self.price:
            of = "" if self.args.budget_usd is None else f" of ${self.args.budget_usd:,.2f}"
            money = f"${self.usd:,.4f} this run, ${self.budget.spent():,.4f}{of} spent"
        return (
            f"{count['replies']:,} replies ({count['length']:,} cut at the token limit), "
            f"{count['refused']:,} refused, {count['429s']:,} 429s, {count['failures']:,} errors, "
            f"{count['prompt_tokens']:,} tokens in, {count['completion_tokens']:,} out, {money}"
        )


def ask_all(
    requests: list[dict], path: Path, args: argparse.Namespace, label: str, key: Key = KEY
) -> int:
    """Append to `path` a reply to each request that has none there by its `key`.

    `requests`: {id, messages, ...}; what else they hold goes into the record, beside model, text,
    finish_reason, usage, cost_usd and created. Returns how many are left to ask again; those too
    long for the model's context and those refused for good are not among them. Raises UserError
    where asking on is of no use, KeyboardInterrupt after Ctrl-C; what came until then is on disk.
    """
    price = price_of(args)
    with appending(path) as replies:
        if batch_state(path).exists():
            raise UserError(f"a batch is under way ({batch_state(path)}); finish it with --batch")
        wanted, answered = select_requests(requests, path, args, price, label, key)
        if not wanted:
            return 0
        queue = RequestQueue(wanted, answered, path, price, args)
        done = len(requests) - len(wanted)
        with tqdm(total=len(requests), initial=done, desc=label, unit="reply") as bar:
            asyncio.run(queue.run(replies, bar))
    print(f"{label}: {queue.summary()}; {queue.left():,} still to ask")
    for reason, number in queue.failures.most_common(5):
        print(f"  {number:,}: {ATTEMPTS} times without an answer, the last: {reason}")
    if queue.count["refused"] > len(queue.refusals):
        print(f"  the reasons of the refusals: {refused_file(path)}")
    if queue.stop == INTERRUPTED:
        raise KeyboardInterrupt
    if queue.stop == OVER_BUDGET:
        print(f"{label}: {OVER_BUDGET}; {queue.left():,} are left for a larger --budget-usd")
    elif queue.stop:
        raise UserError(f"{queue.stop}; {queue.left():,} are left for another run")
    return queue.left()
