"""Ask a chat endpoint many times: as fast as it allows, within a budget, nothing paid for lost.

Any OpenAI-compatible endpoint, through the `together` client, its own retries off: one RateLimiter
and one Budget serve all requests. A reply is on disk before it counts, also one that is no answer
(`unusable`: its reason). What the endpoint refuses for good, or fails at every time, is remembered
with its reason in REPLIES.refused.jsonl.
"""

import asyncio
import random
import signal
from argparse import ArgumentParser, Namespace
from collections import Counter, deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from common.cli import UserError, not_negative, over_zero, positive
from common.files import append_record, appending
from common.table import Key, key_of
from data_prep.teacher import client
from data_prep.teacher.batch import BATCH, run_batch
from data_prep.teacher.client import AskOptions, Failure
from data_prep.teacher.limits import Budget, RateLimiter
from data_prep.teacher.read_reply import NoReply, clean, parse_body
from data_prep.teacher.reply_table import KEY, find_replies
from data_prep.teacher.teacher_prompts import prompt_digest

REFUSED = ".refused.jsonl"  # in place of the .jsonl of the replies
FIRST = 16  # requests before any whole reply; if none is answered, it is not about the texts
MOST_FAILURES = 9  # moments in a row, about a minute; then the endpoint is taken to be down
SAME_FAILURES = 3  # of one text, while others are answered; then it no longer stands in the way
TICK = 0.2  # seconds between two looks at whether a request may go out
SLACK = 2  # times --timeout: an answer that comes in drops, such as an endpoint's blank lines
OVER_BUDGET, INTERRUPTED = "the budget is spent", "interrupted"


def teacher_options(parser: ArgumentParser) -> None:
    """Add what `ask_all` reads from `args`."""
    option = parser.add_argument
    option("--model", default="openai/gpt-oss-120b", help="the teacher")
    option("--base-url", help="of the endpoint, taken as it is: /chat/completions is added")
    option("--concurrency", type=positive, default=64, help="most requests in flight")
    budget = "ceiling for all that the output's folder ever cost (default: BUDGET_USD)"
    option("--budget-usd", type=not_negative, help=budget)
    option("--max-rate", type=over_zero, help="most requests a second (it adapts to the endpoint)")
    option("--max-tokens", type=positive, default=4096, help="longest reply, reasoning with it")
    field = "what the endpoint calls that, such as max_completion_tokens"
    option("--max-tokens-field", default="max_tokens", metavar="NAME", help=field)
    option("--temperature", type=not_negative, default=0.7, help="of the model's sampling")
    extra = 'JSON object of further fields of a request, e.g. {"top_p": 0.9}; null leaves one out'
    option("--extra-body", type=client.json_object, metavar="JSON", help=extra)
    whole = "finish reasons of a whole reply, over the usual ones; null where there is none"
    option("--also-whole", nargs="+", default=[], metavar="REASON", help=whole)
    option("--timeout", type=over_zero, default=300, help="seconds to wait for an answer")
    price = "$ per million tokens; 0 0 of an endpoint of your own"
    option("--price", type=not_negative, nargs=2, metavar=("IN", "OUT"), help=price)
    option("--batch", action="store_true", help="through Together's batch API: later, cheaper")
    option("--poll-seconds", type=over_zero, default=30, help="between two looks at a batch")
    option("--retry-refused", action="store_true", help="ask again for what was refused for good")
    again = "ask again for what got a reply that is no answer: cut, empty, filtered"
    option("--retry-unusable", action="store_true", help=again)


class Turn(NamedTuple):
    """A request that may go out now."""

    request: dict
    worst_usd: float  # which is reserved
    sent_at: float


class RequestQueue:
    """One run: workers, each of which takes the next request once it may go out, and asks it."""

    def __init__(self, requests: list[dict], answered: bool, path: Path, options: AskOptions):
        self.waiting, self.options, self.refused_path = deque(requests), options, path
        self.answered = answered  # whether the endpoint ever gave a whole reply
        self.limiter = RateLimiter(options.concurrency, options.max_rate)
        self.price = client.price_of(options.model, options.price, options.batch)
        self.budget = Budget(path.parent, client.ceiling_of(options.budget_usd))
        self.gate, self.disk, self.in_flight, self.usd = asyncio.Lock(), asyncio.Lock(), 0, 0.0
        self.replies, self.busy, self.errors = 0, 0, 0
        self.unusable: Counter[str] = Counter()  # replies that are no answer, by reason
        self.refusals: list[dict] = []  # of this run; on disk once anything was answered
        self.unsaved: list[dict] = []
        self.disk_error: OSError | None = None
        # By a request's id: how many replies there were when it first failed, and the kinds of its
        # failures.
        self.replies_before: dict[str, int] = {}
        self.failures: dict[str, list[str]] = {}
        self.tries: Counter[str] = Counter()
        self.stop = ""  # the first reason to send no more; what is in flight is awaited

    async def run(self, replies: BinaryIO, refused: BinaryIO, bar: tqdm) -> None:
        """Ask until nothing is left or something is in the way. Raises OSError of the disk."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self.stop_for, INTERRUPTED)
        # In the order of the extracts, what failed in earlier runs would all come first in this one
        # and look like an endpoint that is down.
        random.shuffle(self.waiting)
        async with client.make_client(self.options) as endpoint:
            workers = min(self.options.concurrency, len(self.waiting))
            work = (self.work(endpoint, replies, refused, bar) for _ in range(workers))
            await asyncio.gather(*work)

    def stop_for(self, reason: str) -> None:
        self.stop = self.stop or reason
        if self.in_flight:
            tqdm.write(f"{reason}; waiting for {self.in_flight} replies in flight")

    async def work(self, endpoint, replies: BinaryIO, refused: BinaryIO, bar: tqdm) -> None:
        while turn := await self.next_turn():
            self.in_flight += 1
            outcome = await self.ask(endpoint, turn.request)
            if isinstance(outcome, Failure):
                cost = outcome.cost_usd
                self.take_failure(turn, outcome)
            else:
                cost = outcome["cost_usd"]
                await self.save(replies, [outcome])
                self.take_reply(outcome)
            if self.answered and self.unsaved:
                unsaved, self.unsaved = self.unsaved, []
                await self.save(refused, unsaved)
            # Only now, with the reply on disk: a kill before this leaves the worst case booked.
            cost = turn.worst_usd if cost is None else cost
            self.budget.settle(turn.worst_usd, cost)
            self.usd += cost
            self.in_flight -= 1
            bar.set_postfix_str(f"{self.in_flight} in flight, {self.summary()}", refresh=False)
            done = self.replies + self.unusable.total() + len(self.refusals)
            bar.update(bar.initial + done - bar.n)

    async def ask(self, endpoint, request: dict) -> dict | Failure:
        """The record of a reply, or why there is none; whatever happens to one request, the others
        go on."""
        options = self.options
        url = f"{client.endpoint_url(options.base_url)}/chat/completions"
        fields = {"model": options.model, "messages": request["messages"]} | options.sampling
        body = None
        try:
            async with asyncio.timeout(SLACK * options.timeout):
                content = await client.post(endpoint, url, fields)
            # Off the loop: an answer of megabytes would keep the others waiting.
            body = await asyncio.to_thread(parse_body, content)
            return client.to_reply(request, body, self.price, options)
        except NoReply as error:
            cost = client.no_reply_cost(request, body, self.price, options.max_tokens)
            return replace(client.read_failure(error), cost_usd=cost)
        except Exception as error:  # also what no one foresees: it must not end the other requests
            return client.read_failure(error)

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

    async def next_turn(self) -> Turn | None:
        """The next request once it may go out; None if none will."""
        async with self.gate:
            while self.waiting and not self.stop:
                request = self.waiting[0]
                worst = client.worst_case_usd(request, self.price, self.options.max_tokens)
                unanswered = self.in_flight + len(self.refusals) + self.unusable.total()
                early = not self.answered and unanswered >= FIRST
                if (seconds := self.limiter.wait()) > 0:
                    await asyncio.sleep(min(seconds, TICK))
                elif not early and self.budget.reserve(worst):
                    return Turn(self.waiting.popleft(), worst, self.limiter.sent())
                elif self.in_flight:  # a reply may yet come, or money be given back
                    await asyncio.sleep(TICK)
                elif early:
                    break
                else:
                    self.stop_for(OVER_BUDGET)
        return None

    def take_reply(self, record: dict) -> None:
        """Count a reply; the endpoint is up, whatever it is worth."""
        self.limiter.replied()
        if reason := record.get("unusable"):
            self.unusable[reason] += 1
        else:
            self.replies += 1
            self.answered = True

    def take_failure(self, turn: Turn, failure: Failure) -> None:
        """Stop, note that the text is not answered, or ask again later."""
        request, words = turn.request, failure.words
        fatal = client.FATAL.get(failure.status)
        if failure.status == 403 and not self.answered:
            fatal = client.FORBIDDEN
        if fatal:
            self.waiting.append(request)
            self.stop_for(fatal.format(reason=words, model=self.options.model))
            return
        if failure.is_refusal:
            self.give_up(request, words)
            return
        self.busy += failure.busy
        self.errors += not failure.busy
        if not failure.may_be_the_text or not self.is_at_fault(request, failure.kind):
            self.limiter.failed(turn.sent_at, failure.wait, failure.busy)
            self.ask_again(request)
            if self.limiter.failures >= MOST_FAILURES:
                self.stop_for(f"{MOST_FAILURES} times in a row no reply, the last with: {words}")
            return
        self.limiter.failed(turn.sent_at, failure.wait, busy=False, counts=False)
        if len(self.failures[request["id"]]) < SAME_FAILURES:
            self.waiting.append(request)
        else:
            self.give_up(request, f"{SAME_FAILURES} times without a reply, the last with: {words}")

    def ask_again(self, request: dict) -> None:
        """Put a request back: once as the next, then as the last. Asked twice, a text tells more
        of an endpoint than two texts do, and costs less if the endpoint is at fault."""
        self.tries[request["id"]] += 1
        if self.tries[request["id"]] == 1:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def is_at_fault(self, request: dict, kind: str) -> bool:
        """Whether a failure is to be laid to the text rather than to the endpoint.

        It is if the text failed before, each time in the same way, and others were answered since
        then; or if, of an endpoint that has answered before, hardly any other text is left to tell
        the two apart, and a minute has passed.
        """
        key = request["id"]
        self.replies_before.setdefault(key, self.replies)
        kinds = self.failures.setdefault(key, [])
        kinds.append(kind)
        if len(set(kinds)) > 1:
            return False
        is_down = self.limiter.failures >= MOST_FAILURES - 1
        few_left = len(self.waiting) + self.in_flight <= 2 * FIRST
        return self.replies > self.replies_before[key] or (is_down and few_left and self.answered)

    def give_up(self, request: dict, reason: str) -> None:
        """Note a text that gets no reply; it is not asked again without --retry-refused."""
        record = client.to_record(request, reason=reason)
        self.refusals.append(record)
        self.unsaved.append(record)

    def summary(self) -> str:
        counts = [f"{self.replies:,} replies", f"{len(self.refusals):,} refused (*{REFUSED})"]
        if self.unusable:
            counts.insert(1, f"{self.unusable.total():,} unusable ({by_reason(self.unusable)})")
        counts += [f"{self.busy:,} 429s", f"{self.errors:,} errors"]
        money = f"${self.usd:,.4f} in this run, ${self.budget.spent:,.4f} ever"
        return f"{', '.join(counts)}, {money}"

    def check_any_whole(self) -> None:
        """Stop where none of the requests of this run, and none before, got a whole reply."""
        refusals, unusable = len(self.refusals), self.unusable.total()
        if self.answered or (unusable and refusals + unusable < FIRST):
            return
        if refusals and not unusable:
            sent = f"all {refusals} requests sent were refused, the last with"
            self.stop_for(f"{sent}: {self.refusals[-1]['reason']}; check the options")
        elif unusable:
            reasons = by_reason(self.unusable + Counter(refused=refusals))
            said = f"none of the first {refusals + unusable} replies is an answer ({reasons})"
            self.stop_for(f"{said}; check --model, --max-tokens and --extra-body")


def by_reason(reasons: Counter) -> str:
    """`3 empty, 1 filtered`, the commonest first."""
    return ", ".join(f"{n:,} {reason}" for reason, n in reasons.most_common() if n)


def prepare(requests: list[dict], key: Key, options: AskOptions) -> list[dict]:
    """The requests with all that their records tell of them, no key twice."""
    prepared = {}
    for request in requests:
        messages = clean(request["messages"])
        about = {"model": options.model, "prompt": prompt_digest(messages)}
        request = about | request | {"id": str(clean(request["id"])), "messages": messages}
        request["sampling"] = options.sampling
        prepared.setdefault(key_of(request, key), request)
    return list(prepared.values())


def select(
    requests: list[dict], path: Path, key: Key, options: AskOptions, label: str
) -> tuple[list[dict], bool]:
    """(requests to ask, whether any has a whole reply); says what is left out, and why."""
    found, refused = find_replies(path, requests, key), path.with_suffix(REFUSED)
    unusable = Counter(r["unusable"] for r in found.values() if r.get("unusable"))
    lacking = [r for r in requests if r["id"] not in found]
    if options.retry_unusable:
        lacking = [r for r in requests if found.get(r["id"], {"unusable": True}).get("unusable")]
    noted = {} if options.retry_refused else find_refusals(refused, lacking, key)
    wanted = [request for request in lacking if request["id"] not in noted]
    print(f"{label}: {len(wanted):,} of {len(requests):,} to ask", flush=True)
    if before := len(lacking) - len(wanted):
        print(f"  {before:,} refused before, see {refused}; --retry-refused asks again")
    if unusable and not options.retry_unusable:
        hint = "--retry-unusable asks again, with a larger --max-tokens where they were cut"
        print(f"  {unusable.total():,} got no usable reply ({by_reason(unusable)}); {hint}")
    return wanted, len(found) > unusable.total()


def find_refusals(path: Path, wanted: list[dict], key: Key) -> dict[str, dict]:
    """id -> the record of each of `wanted` that was refused for good. A gateway's page, which 0.3.7
    took for a refusal, is none."""
    found = find_replies(path, wanted, key)
    is_page = [i for i, r in found.items() if str(r.get("reason")).lstrip().startswith("<")]
    return {i: record for i, record in found.items() if i not in is_page}


def ask_all(
    requests: list,
    path: Path,
    args: Namespace | AskOptions,
    label: str,
    key: Key = KEY,
    cut_counts=False,
) -> int:
    """Append to `path` a reply to each request, {id, messages, ...}, that has none by its `key`.

    `cut_counts`: what is cut at the token limit is an answer too, as in an evaluation. Returns how
    many have neither a reply, usable or not, nor were refused for good. Raises UserError where
    asking on is of no use or would cost money without a ceiling, KeyboardInterrupt after Ctrl-C;
    what came until then is on disk.
    """
    options = args if isinstance(args, AskOptions) else client.ask_options(args, cut_counts)
    requests = prepare(requests, key, options)
    batch, refused = path.with_suffix(BATCH), path.with_suffix(REFUSED)
    with appending(path) as replies:
        wanted, answered = select(requests, path, key, options, label)
        if batch.exists() and not options.batch:
            raise UserError(f"{batch}: a batch is under way; finish it with --batch")
        if not wanted and not batch.exists():
            return 0
        if wanted:
            price = client.price_of(options.model, options.price, options.batch)
            client.check_ceiling(options, price, client.estimate_usd(wanted, price))
        queue = RequestQueue(wanted, answered, path, options)
        bar = tqdm(total=len(requests), initial=len(requests) - len(wanted), desc=label)
        with appending(refused) as noted, bar:
            work = partial(run_batch, queue, path, key) if options.batch else queue.run
            asyncio.run(work(replies, noted, bar))
    left = count_left(wanted, path, key)
    queue.check_any_whole()
    print(f"{label}: {queue.summary()}; {left:,} still to ask")
    if queue.stop == INTERRUPTED:
        raise KeyboardInterrupt
    if queue.stop == OVER_BUDGET:
        print(f"{label}: {OVER_BUDGET}; {left:,} are left for a larger --budget-usd")
    elif queue.stop:
        raise UserError(f"{queue.stop}; {left:,} are left for another run")
    return left


def count_left(wanted: list[dict], path: Path, key: Key) -> int:
    """How many of the requests have neither a reply nor a reason for none."""
    replied = find_replies(path, wanted, key)
    refused = find_refusals(path.with_suffix(REFUSED), wanted, key)
    return sum(request["id"] not in replied and request["id"] not in refused for request in wanted)
