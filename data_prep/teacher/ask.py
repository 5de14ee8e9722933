"""Ask a chat endpoint many times: as fast as it allows, within a budget, nothing paid for lost.

Any OpenAI-compatible endpoint, or several as one teacher, through the `together` client, its own
retries off: a RateLimiter each and one Budget serve all requests. A reply is on disk before it
counts, also one that is no answer (`unusable`: its reason). What the endpoint refuses for good, or
fails at every time, is remembered with its reason in REPLIES.refused.jsonl.
"""

import asyncio
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, not_negative, over_zero, positive
from common.files import appending
from common.table import Key, key_of
from data_prep.teacher import client, prices
from data_prep.teacher.batch import BATCH, run_batch
from data_prep.teacher.client import AskOptions
from data_prep.teacher.endpoints import check_endpoints
from data_prep.teacher.read_reply import without_surrogates
from data_prep.teacher.reply_table import KEY, find_replies
from data_prep.teacher.request_queue import (
    INTERRUPTED,
    OVER_BUDGET,
    REFUSED,
    Outlet,
    RequestQueue,
    by_reason,
)
from data_prep.teacher.teacher_prompts import prompt_digest


def teacher_options(parser: ArgumentParser) -> None:
    """Add what `client.ask_options` reads from a command line."""
    option = parser.add_argument
    option("--model", default="openai/gpt-oss-120b", help="the teacher")
    option("--base-url", help="of the endpoint, or of several with commas between, taken as "
           "they are: /chat/completions is added")  # fmt: skip
    option("--concurrency", type=positive, default=64, help="most requests in flight at each")
    budget = "ceiling for all that the output's folder ever cost (default: BUDGET_USD)"
    option("--budget-usd", type=not_negative, help=budget)
    option("--max-rate", type=over_zero, help="most requests a second to each (it adapts to them)")
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


def prepare(requests: list[dict], key: Key, options: AskOptions) -> list[dict]:
    """The requests with all that their records tell of them, no key twice."""
    prepared = {}
    for request in requests:
        messages = without_surrogates(request["messages"])
        about = {"model": options.model, "prompt": prompt_digest(messages)}
        request_id = str(without_surrogates(request["id"]))
        request = about | request | {"id": request_id, "messages": messages}
        request["sampling"] = options.sampling
        prepared.setdefault(key_of(request, key), request)
    return list(prepared.values())


def select(
    requests: list[dict], path: Path, key: Key, options: AskOptions, label: str
) -> tuple[list[dict], set[str | None]]:
    """(requests to ask, endpoints that gave a whole reply); says what is left out, and why."""
    records_by_id, refused = find_replies(path, requests, key), path.with_suffix(REFUSED)
    unusable = {i: record for i, record in records_by_id.items() if record.get("unusable")}
    answered_by = {r.get("endpoint") for i, r in records_by_id.items() if i not in unusable}
    if options.retry_unusable:
        lacking = [r for r in requests if r["id"] not in records_by_id or r["id"] in unusable]
    else:
        lacking = [r for r in requests if r["id"] not in records_by_id]
    refusals = {} if options.retry_refused else find_refusals(refused, lacking, key)
    wanted = [request for request in lacking if request["id"] not in refusals]
    print(f"{label}: {len(wanted):,} of {len(requests):,} to ask", flush=True)
    if before := len(lacking) - len(wanted):
        print(f"  {before:,} refused before, see {refused}; --retry-refused asks again")
    if unusable and not options.retry_unusable:
        reasons = by_reason(Counter(record["unusable"] for record in unusable.values()))
        hint = "--retry-unusable asks again, with a larger --max-tokens where they were cut"
        print(f"  {len(unusable):,} got no usable reply ({reasons}); {hint}")
    return wanted, answered_by


def find_refusals(path: Path, wanted: list[dict], key: Key) -> dict[str, dict]:
    """id -> the record of each of `wanted` that was refused for good. A gateway's page, which 0.3.7
    took for a refusal, is none."""
    records_by_id = find_replies(path, wanted, key)
    return {
        i: record
        for i, record in records_by_id.items()
        if not str(record.get("reason")).lstrip().startswith("<")
    }


def ask_all(
    requests: list[dict], path: Path, options: AskOptions, label: str, key: Key = KEY
) -> int:
    """Append to `path` a reply to each request, {id, messages, ...}, that has none by its `key`.

    Returns how many have neither a reply, usable or not, nor were refused for good. Raises
    UserError where asking on is of no use or would cost money without a ceiling, KeyboardInterrupt
    after Ctrl-C; what came until then is on disk.
    """
    requests = prepare(requests, key, options)
    batch = path.with_suffix(BATCH)
    with appending(path) as replies:
        wanted, answered_by = select(requests, path, key, options, label)
        if batch.exists() and not options.batch:
            raise UserError(f"{batch}: a batch is under way; finish it with --batch")
        if not wanted and not batch.exists():
            return 0
        if wanted:
            price = prices.price_of(options.model, options.price, options.batch)
            about = prices.estimate_usd(wanted, price, options.answer_tokens)
            client.check_ceiling(options, price, about)
        check_endpoints(options.base_url, options.batch)
        bar = tqdm(total=len(requests), initial=len(requests) - len(wanted), desc=label)
        with appending(path.with_suffix(REFUSED)) as refused, bar:
            outlet = Outlet(replies, refused, bar)
            queue = RequestQueue(wanted, path.parent, options, answered_by, outlet)
            run(queue, path, key)
    left = count_left(wanted, path, key)
    report(queue, label, left)
    return left


def run(queue: RequestQueue, path: Path, key: Key) -> None:
    """Ask all in `queue`. Raises KeyboardInterrupt where that was given up."""
    work = run_batch(queue, path, key) if queue.options.batch else queue.run()
    try:
        asyncio.run(work)
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def report(queue: RequestQueue, label: str, left: int) -> None:
    """Say what came of the requests. Raises what ended the run early."""
    print(f"{label}: {queue.summary()}; {left:,} still to ask")
    if len(queue.endpoints) > 1:
        for endpoint in queue.endpoints:
            trouble = f"; {endpoint.trouble}" if endpoint.trouble else ""
            print(f"  {endpoint.name}: {queue.counts([endpoint])}{trouble}")
    if queue.stop == INTERRUPTED:
        raise KeyboardInterrupt
    if queue.stop == OVER_BUDGET:
        print(f"{label}: {OVER_BUDGET}; {left:,} are left for a larger --budget-usd")
    elif queue.stop:
        raise UserError(f"{queue.stop}; {left:,} are left for another run")


def count_left(wanted: list[dict], path: Path, key: Key) -> int:
    """How many of the requests have neither a reply nor a reason for none."""
    replied = find_replies(path, wanted, key)
    refused = find_refusals(path.with_suffix(REFUSED), wanted, key)
    return sum(request["id"] not in replied and request["id"] not in refused for request in wanted)
