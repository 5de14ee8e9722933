"""The requests of one run, sent as fast as each endpoint allows, within one budget.

Several endpoints are one teacher: each takes the next request that waits, at a rate of its own and
with failures of its own, so that one that is busy or down holds up no other. What an endpoint could
not answer goes back to those that wait, for whichever is free.
"""

import asyncio
import random
import signal
from collections import Counter, deque
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from together import AsyncTogether
from tqdm import tqdm

from common.files import append_record
from data_prep.teacher import prices
from data_prep.teacher.client import AskOptions, to_record, to_reply
from data_prep.teacher.endpoints import endpoint_urls, make_client, name_of, post
from data_prep.teacher.failures import FATAL, FORBIDDEN, Failure, read_failure
from data_prep.teacher.limits import Budget, RateLimiter
from data_prep.teacher.read_reply import NoReply, parse_body

REFUSED = ".refused.jsonl"  # in place of the .jsonl of the replies
FIRST = 16  # requests before any whole reply; if none is answered, it is not about the texts
MOST_FAILURES = 9  # moments in a row, about a minute; then the endpoint is taken to be down
SAME_FAILURES = 3  # of one text, while others are answered; then it no longer stands in the way
TICK = 0.2  # seconds between two looks at whether a request may go out
SLACK = 2  # times --timeout: an answer that comes in drops, such as an endpoint's blank lines
OVER_BUDGET, INTERRUPTED = "the budget is spent", "interrupted"


@dataclass(frozen=True)
class Outlet:
    """Where a run's replies and refusals go, and the bar that shows how far it is."""

    replies: BinaryIO
    refused: BinaryIO
    bar: tqdm


@dataclass
class TextFailures:
    """How a text failed at an endpoint."""

    replies_before: int  # the endpoint's, when the text first failed
    kinds: list[str] = field(default_factory=list)


class Endpoint:
    """An address of the teacher: its rate, and what became of what it was asked in this run."""

    def __init__(self, url: str, options: AskOptions, has_answered: bool) -> None:
        self.url, self.name = url, name_of(url)
        self.client: AsyncTogether | None = None  # while it is asked
        self.concurrency = options.concurrency
        self.limiter = RateLimiter(options.concurrency, options.max_rate)
        self.has_answered = has_answered  # whole, and ever: in an earlier run, too
        self.in_flight = self.replies = self.busy = self.errors = self.refused = 0
        self.unusable: Counter[str] = Counter()  # replies that are no answer, by reason
        # (request, record) of refusals. They are on disk once the endpoint answered anything: until
        # then it may be at fault rather than the texts.
        self.held: list[tuple[dict, dict]] = []
        self.text_failures: dict[str, TextFailures] = {}  # by the request's id
        self.last_failure = ""
        self.fault = ""  # why it is asked nothing more in this run

    @property
    def is_down(self) -> bool:
        return self.limiter.failures >= MOST_FAILURES

    @property
    def trouble(self) -> str:
        """Why it cannot be counted on now, "" if it can."""
        if self.is_down:
            in_a_row = f"{self.limiter.failures} times in a row no reply, the last with"
            return self.fault or f"{in_a_row}: {self.last_failure}"
        return self.fault

    def has_room(self) -> bool:
        """Whether one more request may be in flight; one that is down is tried with one alone."""
        return self.in_flight < (1 if self.is_down else self.concurrency)

    def is_on_trial(self) -> bool:
        """Whether FIRST requests are out and none came back whole: until then no more go out."""
        asked = self.in_flight + self.refused + self.unusable.total()
        return not self.has_answered and asked >= FIRST

    def why_fruitless(self) -> str:
        """Why it is at fault, and not the texts, that nothing came back whole; "" if it is not, or
        if that cannot be said yet."""
        unusable = self.unusable.total()
        if self.has_answered:
            return ""
        if self.refused and not unusable:
            sent = f"all {self.refused} requests sent were refused, the last with"
            return f"{sent}: {self.held[-1][1]['reason']}; check the options"
        if self.refused + unusable >= FIRST:
            reasons = by_reason(self.unusable + Counter(refused=self.refused))
            said = f"none of the first {self.refused + unusable} replies is an answer ({reasons})"
            return f"{said}; check --model, --max-tokens and --extra-body"
        return ""

    def note_failure(self, key: str, kind: str, few_left: bool) -> bool:
        """Note a failure of a text; whether it is to be laid to the text, not to the endpoint.

        It is if the text failed before, each time in the same way, and others were answered since
        then; or if, of an endpoint that has answered before, hardly any other text is left to tell
        the two apart (`few_left`), and a minute has passed.
        """
        failures = self.text_failures.setdefault(key, TextFailures(self.replies))
        failures.kinds.append(kind)
        if len(set(failures.kinds)) > 1:
            return False
        is_long_silent = self.limiter.failures >= MOST_FAILURES - 1
        if is_long_silent and few_left and self.has_answered:
            return True
        return self.replies > failures.replies_before


@dataclass(frozen=True)
class Turn:
    """A request that may go out now."""

    request: dict
    endpoint: Endpoint
    worst_usd: float  # which is reserved
    sent_at: float


class RequestQueue:
    """What waits, what is in flight and what it costs; `run` asks until nothing is left."""

    def __init__(
        self,
        requests: list[dict],
        folder: Path,
        options: AskOptions,
        answered_by: set[str | None],
        outlet: Outlet,
    ) -> None:
        """`folder` is the one that the budget is of; `answered_by` names the endpoints that have
        answered before, None for a record that does not tell its own."""
        self.waiting, self.options, self.outlet = deque(requests), options, outlet
        self.endpoints = [
            Endpoint(url, options, bool(answered_by & {None, name_of(url)}))
            for url in endpoint_urls(options.base_url)
        ]
        self.price = prices.price_of(options.model, options.price, options.batch)
        self.budget = Budget(folder, prices.ceiling_of(options.budget_usd))
        self.usd = 0.0  # what this run cost
        self.tries: Counter[str] = Counter()  # of a request's id
        self.stop = ""  # the first reason to send no more; what is in flight is awaited
        self.interrupts = 0
        self.disk = asyncio.Lock()
        self.disk_error: OSError | None = None
        self.came_back = asyncio.Event()  # whenever a request is no longer in flight

    @property
    def in_flight(self) -> int:
        return sum(endpoint.in_flight for endpoint in self.endpoints)

    async def run(self) -> None:
        """Ask until nothing is left or something is in the way.

        Raises OSError of the disk, and CancelledError after a second Ctrl-C: what is in flight then
        stays booked at its worst case.
        """
        task = asyncio.current_task()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.interrupt, task)
        # In the order of the extracts, what failed in earlier runs would all come first in this one
        # and look like an endpoint that is down.
        random.shuffle(self.waiting)
        async with AsyncExitStack() as clients:
            for endpoint in self.endpoints:
                client = make_client(endpoint.url, self.options.concurrency, self.options.timeout)
                endpoint.client = await clients.enter_async_context(client)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for endpoint in self.endpoints:
                        tasks.create_task(self.feed(endpoint, tasks))
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None

    def interrupt(self, task: asyncio.Task) -> None:
        """Ctrl-C: the first one waits for what is in flight, the second one does not."""
        self.interrupts += 1
        if self.interrupts == 1:
            self.stop_for(INTERRUPTED)
            return
        in_flight = f"{self.in_flight} requests in flight are given up, booked at their worst case"
        tqdm.write(f"stopped at once; {in_flight}")
        task.cancel()

    def stop_for(self, reason: str) -> None:
        self.stop = self.stop or reason
        self.came_back.set()
        if self.in_flight:
            again = "; Ctrl-C again gives them up" if self.interrupts else ""
            tqdm.write(f"{reason}; waiting for {self.in_flight} replies in flight{again}")

    async def feed(self, endpoint: Endpoint, tasks: asyncio.TaskGroup) -> None:
        """Send an endpoint one request after the other, each as soon as it may go out."""
        while turn := await self.next_turn(endpoint):
            endpoint.in_flight += 1
            tasks.create_task(self.finish(turn))

    async def next_turn(self, endpoint: Endpoint) -> Turn | None:
        """The next request that may go out to an endpoint; None if none will."""
        while not self.stop and not endpoint.fault:
            if not self.waiting:
                if self.in_flight:  # which may come back, from another endpoint too
                    await self.rest()
                elif not self.lose_fruitless():
                    return None
            elif (seconds := endpoint.limiter.wait()) > 0:
                await asyncio.sleep(min(seconds, TICK))
            elif endpoint.is_on_trial() and not endpoint.in_flight:
                self.lose(endpoint, endpoint.why_fruitless())
            elif endpoint.is_on_trial() or not endpoint.has_room():
                await self.rest()
            elif turn := self.take_next(endpoint):
                return turn
            elif self.in_flight:  # whose money may be given back
                await self.rest()
            else:
                self.stop_for(OVER_BUDGET)
        return None

    async def rest(self) -> None:
        """Until a request comes back, a moment at most."""
        self.came_back.clear()
        with suppress(TimeoutError):
            await asyncio.wait_for(self.came_back.wait(), TICK)

    def take_next(self, endpoint: Endpoint) -> Turn | None:
        """Take the next request off the queue, its worst case set aside, and count it as sent; None
        if that would pass the budget."""
        worst = prices.worst_case_usd(self.waiting[0], self.price, self.options.max_tokens)
        if not self.budget.reserve(worst):
            return None
        return Turn(self.waiting.popleft(), endpoint, worst, endpoint.limiter.sent())

    async def finish(self, turn: Turn) -> None:
        """Ask a request, and see to what comes of it. Raises OSError of the disk."""
        endpoint = turn.endpoint
        outcome = await self.ask(turn)
        if isinstance(outcome, Failure):
            cost = outcome.cost_usd
            self.take_failure(turn, outcome)
        else:
            cost = outcome["cost_usd"]
            await self.save(self.outlet.replies, [outcome])
            self.take_reply(endpoint, outcome)
        await self.save_refusals(endpoint)
        # Only now, with the reply on disk: a kill before this leaves the worst case booked.
        cost = turn.worst_usd if cost is None else cost
        self.budget.settle(turn.worst_usd, cost)
        self.usd += cost
        endpoint.in_flight -= 1
        self.came_back.set()
        self.show_progress()

    async def ask(self, turn: Turn) -> dict | Failure:
        """The record of a reply, or why there is none; whatever happens to one request, the others
        go on."""
        options, endpoint = self.options, turn.endpoint
        request = turn.request | {"endpoint": endpoint.name}
        fields = {"model": options.model, "messages": request["messages"]} | options.sampling
        body = None
        try:
            async with asyncio.timeout(SLACK * options.timeout):
                content = await post(endpoint.client, f"{endpoint.url}/chat/completions", fields)
            # Off the loop: an answer of megabytes would keep the others waiting.
            body = await asyncio.to_thread(parse_body, content)
            return to_reply(request, body, self.price, options)
        except NoReply as error:
            cost = prices.no_reply_cost(request, body, self.price, options.max_tokens)
            return replace(read_failure(error), cost_usd=cost)
        except Exception as error:  # also what no one foresees: it must not end the other requests
            return read_failure(error)

    async def save(self, file: BinaryIO, records: list[dict]) -> None:
        """Append records. After an error of the disk, whose torn line the next run cuts off,
        nothing more is written behind it. Raises OSError."""
        async with self.disk:
            if self.disk_error:
                raise self.disk_error
            try:
                await asyncio.to_thread(append_record, file, *records)
            except OSError as error:
                self.disk_error = error
                raise

    async def save_refusals(self, endpoint: Endpoint) -> None:
        """Write down what an endpoint refused, once it has shown that it answers others."""
        if endpoint.has_answered and endpoint.held:
            records = [record for _, record in endpoint.held]
            endpoint.held.clear()
            await self.save(self.outlet.refused, records)

    def take_reply(self, endpoint: Endpoint, record: dict) -> None:
        """Count a reply; the endpoint is up, whatever it is worth."""
        endpoint.limiter.replied()
        if reason := record.get("unusable"):
            endpoint.unusable[reason] += 1
        else:
            endpoint.replies += 1
            endpoint.has_answered = True

    def take_failure(self, turn: Turn, failure: Failure) -> None:
        """Lose the endpoint, note that the text is not answered, or ask again later."""
        request, endpoint = turn.request, turn.endpoint
        fatal = FATAL.get(failure.status)
        if failure.status == 403 and not endpoint.has_answered:
            fatal = FORBIDDEN
        if fatal:
            self.waiting.append(request)
            self.lose(endpoint, fatal.format(reason=failure.words, model=self.options.model))
            return
        if failure.is_refusal:
            self.give_up(endpoint, request, failure.words)
            return
        endpoint.busy += failure.busy
        endpoint.errors += not failure.busy
        few_left = len(self.waiting) + self.in_flight <= 2 * FIRST
        if failure.may_be_the_text and endpoint.note_failure(request["id"], failure.kind, few_left):
            self.take_failure_of_text(turn, failure)
        else:
            self.take_failure_of_endpoint(turn, failure)

    def take_failure_of_text(self, turn: Turn, failure: Failure) -> None:
        """Ask again later, after the others; in the end give the text up."""
        request, endpoint = turn.request, turn.endpoint
        endpoint.limiter.failed(turn.sent_at, failure.wait, busy=False, counts=False)
        if len(endpoint.text_failures[request["id"]].kinds) < SAME_FAILURES:
            self.waiting.append(request)
        else:
            times = f"{SAME_FAILURES} times without a reply, the last with"
            self.give_up(endpoint, request, f"{times}: {failure.words}")

    def take_failure_of_endpoint(self, turn: Turn, failure: Failure) -> None:
        """Slow down, and put the request back."""
        endpoint, was_down = turn.endpoint, turn.endpoint.is_down
        endpoint.last_failure = failure.words
        endpoint.limiter.failed(turn.sent_at, failure.wait, failure.busy)
        self.ask_again(turn.request)
        if endpoint.is_down and not was_down:
            self.check_trouble(endpoint)

    def ask_again(self, request: dict) -> None:
        """Put a request back: once as the next, then as the last. Asked twice, a text tells more
        of an endpoint than two texts do, and costs less if the endpoint is at fault."""
        self.tries[request["id"]] += 1
        if self.tries[request["id"]] == 1:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def give_up(self, endpoint: Endpoint, request: dict, reason: str) -> None:
        """Note a text that gets no reply; it is not asked again without --retry-refused."""
        record = to_record(request, reason=reason, endpoint=endpoint.name)
        endpoint.refused += 1
        endpoint.held.append((request, record))

    def lose(self, endpoint: Endpoint, fault: str) -> None:
        """Ask an endpoint nothing more. What it alone refused may have been its own fault, and goes
        to the others."""
        held, endpoint.held = endpoint.held, []
        endpoint.fault = endpoint.fault or fault
        self.waiting.extend(request for request, _ in held)
        self.check_trouble(endpoint)
        if not self.stop:  # else nobody is left to ask them: they stay its refusals
            endpoint.refused -= len(held)

    def lose_fruitless(self) -> bool:
        """At the end: lose the endpoints of which nothing came back whole. Whether they leave
        anything to the others."""
        for endpoint in self.endpoints:
            if not endpoint.fault and (fault := endpoint.why_fruitless()):
                self.lose(endpoint, fault)
        return bool(self.waiting)

    def check_trouble(self, endpoint: Endpoint) -> None:
        """Stop where no endpoint is left; else say which one is in trouble."""
        troubles = {other.name: other.trouble for other in self.endpoints}
        if len(troubles) == 1:
            self.stop_for(endpoint.trouble)
        elif all(troubles.values()):
            self.stop_for("; ".join(f"{name}: {trouble}" for name, trouble in troubles.items()))
        else:
            tqdm.write(f"{endpoint.name}: {endpoint.trouble}; the others go on")

    def show_progress(self) -> None:
        bar = self.outlet.bar
        bar.set_postfix_str(f"{self.in_flight} in flight, {self.summary()}", refresh=False)
        done = sum(e.replies + e.unusable.total() + e.refused for e in self.endpoints)
        bar.update(bar.initial + done - bar.n)

    def summary(self) -> str:
        """What came of the requests, and what they cost."""
        counts = self.counts(self.endpoints)
        return f"{counts}, ${self.usd:,.4f} in this run, ${self.budget.spent:,.4f} ever"

    def counts(self, endpoints: list[Endpoint]) -> str:
        """What came of the requests to these endpoints."""
        unusable = sum((e.unusable for e in endpoints), Counter())
        counts = [f"{sum(e.replies for e in endpoints):,} replies"]
        if unusable:
            counts.append(f"{unusable.total():,} unusable ({by_reason(unusable)})")
        counts.append(f"{sum(e.refused for e in endpoints):,} refused (*{REFUSED})")
        counts.append(f"{sum(e.busy for e in endpoints):,} 429s")
        counts.append(f"{sum(e.errors for e in endpoints):,} errors")
        return ", ".join(counts)


def by_reason(reasons: Counter) -> str:
    """`3 empty, 1 filtered`, the commonest first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common() if n)
