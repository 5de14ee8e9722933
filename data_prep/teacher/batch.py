"""Ask through Together's batch API: later, apart from the rate limit, cheaper for some models.

Uploads one file of requests, polls, downloads. From the moment that something can be paid for,
REPLIES.batch.json tells what is under way, so a run cut off anywhere goes on with the same batch.
"""

import asyncio
import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import together

from common.cli import UserError
from common.files import append_record, read_json, read_records, write_text
from common.table import Key, key_of
from data_prep.teacher import prices
from data_prep.teacher.client import AskOptions, to_record, to_reply
from data_prep.teacher.endpoints import make_client
from data_prep.teacher.failures import ABOUT_THE_TEXT, Failure, read_failure
from data_prep.teacher.read_reply import NoReply, parse_body, words_in
from data_prep.teacher.request_queue import RequestQueue

BATCH = ".batch.json"  # in place of the .jsonl of the replies
MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of a file, by the API's limits
ENDED = ("COMPLETED", "FAILED", "EXPIRED", "CANCELLED")  # any other status: it may yet be paid for
RETRIES = 10  # the client's own, of an upload or a look: some minutes of an outage


async def start(client: together.AsyncTogether, queue: RequestQueue, path: Path) -> dict:
    """Upload as many requests as a file takes; what is known of their batch. Raises UserError."""
    options = queue.options
    nonce = secrets.token_hex(4)  # the endpoint knows files by content, also half-uploaded ones
    file, asked, usd = path.with_suffix(".batch-input.jsonl"), [], 0.0
    with file.open("w", encoding="utf-8") as lines:
        for request in list(queue.waiting)[:MOST_REQUESTS]:
            body = {"model": options.model, "messages": request["messages"]} | options.sampling
            line = json.dumps({"custom_id": f"{nonce}-{len(asked)}", "body": body}) + "\n"
            if lines.tell() + len(line) > MOST_BYTES:
                break
            lines.write(line)
            worst = prices.worst_case_usd(request, queue.price, options.max_tokens)
            name = queue.endpoints[0].name
            asked.append(to_record(request, worst_usd=worst, endpoint=name))
            usd += worst
    print(f"  {len(asked):,} in this batch, {len(queue.waiting) - len(asked):,} left for another")
    uploaded = await client.files.upload(file, purpose="batch-api", check=False)
    file.unlink()
    if not queue.budget.reserve(usd):
        raise UserError(f"at worst this batch costs ${usd:,.2f}, which is over the budget")
    return {"price": queue.price, "usd": usd, "file": uploaded.id, "requests": asked}


async def fetch(queue: RequestQueue, path: Path) -> tuple[dict, list[bytes]]:
    """(what is known, lines) of the batch under way, or of a new one. Raises UserError."""
    file = path.with_suffix(BATCH)
    try:
        known = read_json(file)
    except UserError:
        raise UserError(f"{file} is not valid JSON; it tells the batch that is paid for") from None
    options, url = queue.options, queue.endpoints[0].url
    async with make_client(url, options.concurrency, options.timeout, RETRIES) as client:
        if not known:
            known = await start(client, queue, path)
            write_text(file, json.dumps(known))
        if "batch" not in known:  # perhaps an earlier run made it before it was cut off
            jobs = {job.input_file_id: job for job in await client.batches.list()}
            of = {"endpoint": "/v1/chat/completions", "input_file_id": known["file"]}
            job = jobs.get(known["file"]) or (await client.batches.create(**of)).job
            known["batch"] = job.id
            write_text(file, json.dumps(known))
        job = await client.batches.retrieve(known["batch"])
        while job.status not in ENDED:
            queue.outlet.bar.set_postfix_str(f"batch {job.status}, {job.progress or 0:.0f}%")
            await asyncio.sleep(options.poll_seconds)
            job = await client.batches.retrieve(job.id)
        names = [name for name in (job.output_file_id, job.error_file_id) if name]
        if job.status == "COMPLETED" and not names:
            hint = f"run again, or delete {file} to give its replies up"
            raise UserError(f"batch {job.id} is complete and names no file of replies yet; {hint}")
        lines = []
        for name in names:
            async with client.files.with_streaming_response.content(name) as answer:
                lines += (await answer.read()).splitlines()
    print(f"batch {job.id} ended as {job.status}, {job.error or 'no error'}")
    return known, [line for line in lines if line.strip()]


def read_line(line: bytes, known: dict, options: AskOptions) -> tuple[dict, dict | Failure]:
    """(request, the record of its reply or why there is none) of a line of a batch's output.

    Raises NoReply where the line does not say which request it answers.
    """
    told = parse_body(line)
    try:
        request = known["requests"][int(told["custom_id"].rpartition("-")[2])]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise NoReply(words_in(told) or "an answer to no request") from None
    answer = told.get("response")
    if not isinstance(answer, dict):
        answer = {"body": told}
    body = answer.get("body")
    try:
        reply = to_reply(request, body, known["price"], options)
    except NoReply as error:
        is_refusal = answer.get("status_code") in ABOUT_THE_TEXT
        words, status = words_in(body) or str(error), answer.get("status_code", 0)
        cost = 0.0
        if status == 200:  # made, and charged as elsewhere
            cost = prices.no_reply_cost(request, body, known["price"], options.max_tokens)
            if cost is None:
                cost = prices.worst_case_usd(request, known["price"], options.max_tokens)
        return request, Failure(words, "batch", cost, is_refusal=is_refusal)
    return request, reply | {"batch": known.get("batch")}


@dataclass
class Results:
    """What a batch's output holds, each request once."""

    replies_by_key: dict[str, dict] = field(default_factory=dict)  # the record of a reply
    refusals_by_key: dict[str, tuple[dict, str]] = field(default_factory=dict)  # request, words
    failures: list[str] = field(default_factory=list)  # the endpoint's words for no reply
    failed_usd: float = 0.0


def read_lines(lines: list[bytes], known: dict, key: Key, queue: RequestQueue) -> Results:
    """What the lines of a batch's output say of its requests."""
    results = Results()
    for line in lines:
        try:
            request, outcome = read_line(line, known, queue.options)
        except NoReply as error:
            results.failures.append(str(error))
            continue
        request_key = key_of(request, key)
        if isinstance(outcome, Failure):
            results.failures.append(outcome.words)
            results.failed_usd += outcome.cost_usd
            if outcome.is_refusal:
                results.refusals_by_key[request_key] = (request, outcome.words)
            continue
        before = results.replies_by_key.get(request_key)
        if not before or before.get("unusable"):
            results.replies_by_key[request_key] = outcome
    return results


async def run_batch(queue: RequestQueue, path: Path, key: Key) -> None:
    """Do for the queue what its own `run` does, in one batch. Raises UserError."""
    try:
        known, lines = await fetch(queue, path)
    except together.APIError as error:
        reason = read_failure(error).words
        raise UserError(f"{reason}; the same command goes on with the batch") from None
    endpoint, file = queue.endpoints[0], path.with_suffix(BATCH)
    results = read_lines(lines, known, key, queue)
    for request_key, (request, words) in results.refusals_by_key.items():
        if request_key not in results.replies_by_key:
            queue.give_up(endpoint, request, words)
    if results.failures:
        last = results.failures[-1]
        print(f"  {len(results.failures):,} without a reply, the last with: {last}")
    records = list(results.replies_by_key.values())
    for record in records:
        if "prompt" not in record:  # of a batch that an earlier version began
            record["created"] = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat()
    # A kill behind this line must not append the same replies twice.
    there = {key_of(r, (*key, "batch")) for r in read_records(path) if r.get("batch")}
    new = [record for record in records if key_of(record, (*key, "batch")) not in there]
    append_record(queue.outlet.replies, *new)
    for record in records:
        queue.take_reply(endpoint, record)
    await queue.save_refusals(endpoint)
    queue.lose_fruitless()
    # In this order a kill can leave the worst case counted as spent, but never settles twice.
    file.unlink()
    queue.usd = results.failed_usd + sum(record["cost_usd"] or 0 for record in records)
    queue.budget.settle(known["usd"], queue.usd)
