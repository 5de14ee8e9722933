"""Ask a chat endpoint many times: as fast as it allows, within a budget, nothing paid for lost.

Any OpenAI-compatible endpoint, through the `together` client, its own retries off: one RateLimiter
and one Budget serve all requests. A reply is on disk before it counts. What the endpoint refuses
for good is remembered, with its reason, in REPLIES.refused.jsonl.
"""

import asyncio
import json
import signal
from argparse import ArgumentParser, Namespace
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO

import together
from tqdm import tqdm

from common.cli import UserError, positive
from common.files import append_record, appending
from common.table import Key, missing
from data_prep.teacher import client
from data_prep.teacher.batch import BATCH, run_batch
from data_prep.teacher.limits import Budget, RateLimiter

KEY = ("id", "model", "prompt_sha")  # what tells a reply from others, unless `ask_all` gets another
REFUSED = ".refused.jsonl"  # in place of the .jsonl of the replies
FIRST = 16  # requests before any reply; if all are refused, it is not about the texts
MOST_FAILURES = 9  # moments in a row, about a minute; then the endpoint is taken to be down
TICK = 0.2  # seconds between two looks at whether a request may go out
COUNTED = ("replies", "cut at the token limit", "429s", "errors")
OVER_BUDGET, INTERRUPTED = "the budget is spent", "interrupted"


def teacher_options(parser: ArgumentParser) -> None:
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
    option("--batch", action="store_true", help="through Together's batch API: later, cheaper")
    option("--poll-seconds", type=float, default=30, help="between two looks at a batch")
    option("--retry-refused", action="store_true", help="ask again for what was refused for good")


class RequestQueue:
    """One run: workers, each of which takes the next request once it may go out, and asks it."""

    def __init__(self, requests: list[dict], answered: bool, path: Path, args: Namespace):
        self.waiting, self.answered, self.args = deque(requests), answered, args
        self.limiter = RateLimiter(args.concurrency, args.max_rate)
        self.price, self.budget = client.price_of(args), Budget(path.parent, args.budget_usd)
        self.gate, self.disk, self.in_flight, self.usd = asyncio.Lock(), asyncio.Lock(), 0, 0.0
        self.count, self.refusals = dict.fromkeys(COUNTED, 0), []
        self.stop = ""  # the first reason to send no more; what is in flight is awaited

    async def run(self, replies: BinaryIO, bar: tqdm) -> None:
        """Ask until nothing is left or something is in the way. Raises OSError of the disk."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.stop_for, INTERRUPTED)
        async with client.make_client(self.args) as endpoint:
            create = endpoint.chat.completions.with_raw_response.create
            workers = min(self.args.concurrency, len(self.waiting))
            await asyncio.gather(*(self.work(create, replies, bar) for _ in range(workers)))

    def stop_for(self, reason: str) -> None:
        self.stop = self.stop or reason
        if self.in_flight:
            tqdm.write(f"{reason}; waiting for {self.in_flight} replies in flight")

    async def work(self, create: Callable, replies: BinaryIO, bar: tqdm) -> None:
        options = {name: getattr(self.args, name) for name in client.OPTIONS}
        while turn := await self.next_turn():
            request, worst, sent_at = turn
            self.in_flight += 1
            try:
                answer = await create(messages=request["messages"], **options)
                body = json.loads(answer.http_response.content)
                reply = client.to_reply(request, body, self.price)
            except (together.APIError, ValueError) as error:
                cost = self.take_failure(request, error, sent_at)
            else:
                async with self.disk:
                    await asyncio.to_thread(append_record, replies, reply)
                self.limiter.replied()
                self.answered, cost = True, reply["cost_usd"]
                self.count["replies"] += 1
                self.count["cut at the token limit"] += reply["finish_reason"] == "length"
            cost = worst if cost is None else cost  # where nobody knows
            self.budget.settle(worst, cost)
            self.usd += cost
            self.in_flight -= 1
            bar.set_postfix_str(f"{self.in_flight} in flight, {self.summary()}", refresh=False)
            bar.update(bar.initial + self.count["replies"] + len(self.refusals) - bar.n)

    async def next_turn(self) -> tuple[dict, float, float] | None:
        """(request, its worst case, moment) once the next may go out; None if none will."""
        async with self.gate:
            while self.waiting and not self.stop:
                worst = client.worst_case_usd(self.waiting[0], self.price, self.args.max_tokens)
                early = not self.answered and self.in_flight + len(self.refusals) >= FIRST
                if (seconds := self.limiter.wait()) > 0:
                    await asyncio.sleep(min(seconds, TICK))
                elif not early and self.budget.reserve(worst):
                    return self.waiting.popleft(), worst, self.limiter.sent()
                elif self.in_flight:  # a reply may yet come, or money be given back
                    await asyncio.sleep(TICK)
                elif early:
                    break
                else:
                    self.stop_for(OVER_BUDGET)
        return None

    def take_failure(self, request: dict, error: Exception, sent_at: float) -> float | None:
        """Stop, note the refusal, or ask again later; return what it cost, None if unknown."""
        status, reason = getattr(error, "status_code", 0), client.reason_in(error)
        busy = status in client.BUSY
        if status in client.FATAL:
            self.stop_for(client.FATAL[status].format(reason=reason, model=self.args.model))
        elif client.is_refusal(status):
            self.refusals.append(client.to_record(request, reason=reason))
        else:
            self.waiting.append(request)
            self.count["429s" if busy else "errors"] += 1
            self.limiter.failed(sent_at, client.retry_after(error), busy)
            if self.limiter.failures >= MOST_FAILURES:
                self.stop_for(f"{MOST_FAILURES} times in a row no reply, the last with: {reason}")
        return 0.0 if busy or client.is_refusal(status) else None

    def summary(self) -> str:
        counts = ", ".join(f"{n:,} {name}" for name, n in self.count.items())
        money = f"${self.usd:,.4f} in this run, ${self.budget.spent:,.4f} ever"
        return f"{counts}, {len(self.refusals):,} refused (*{REFUSED}), {money}"


def ask_all(requests: list, path: Path, args: Namespace, label: str, key: Key = KEY) -> int:
    """Append to `path` a reply to each request, {id, messages, ...}, that has none by its `key`.

    Returns how many have neither a reply nor were refused for good. Raises UserError where asking
    on is of no use, KeyboardInterrupt after Ctrl-C; what came until then is on disk.
    """
    requests = [{"model": args.model} | request for request in requests]
    batch, refused = path.with_suffix(BATCH), path.with_suffix(REFUSED)
    with appending(path) as replies:
        lacking = missing(path, requests, key)
        wanted = lacking if args.retry_refused else missing(refused, lacking, key)
        print(f"{label}: {len(wanted):,} of {len(requests):,} to ask", flush=True)
        if before := len(lacking) - len(wanted):
            print(f"  {before:,} refused before, see {refused}; --retry-refused asks again")
        if batch.exists() and not args.batch:
            raise UserError(f"{batch}: a batch is under way; finish it with --batch")
        if not wanted and not batch.exists():
            return 0
        queue = RequestQueue(wanted, len(lacking) < len(requests), path, args)
        with tqdm(total=len(requests), initial=len(requests) - len(wanted), desc=label) as bar:
            work = partial(run_batch, queue, path, key) if args.batch else queue.run
            asyncio.run(work(replies, bar))
        if queue.answered:
            with appending(refused) as file:
                append_record(file, *queue.refusals)
        elif queue.refusals:
            sent = f"all {len(queue.refusals)} requests sent were refused, the last with"
            queue.stop_for(f"{sent}: {queue.refusals[-1]['reason']}; check the options")
    left = len(missing(refused, missing(path, wanted, key), key))
    print(f"{label}: {queue.summary()}; {left:,} still to ask")
    if queue.stop == INTERRUPTED:
        raise KeyboardInterrupt
    if queue.stop == OVER_BUDGET:
        print(f"{label}: {OVER_BUDGET}; {left:,} are left for a larger --budget-usd")
    elif queue.stop:
        raise UserError(f"{queue.stop}; {left:,} are left for another run")
    return left
