"""Ask through Together's batch API: later, apart from the rate limit, cheaper for some models.

Uploads one file of requests, polls, downloads. From the moment that something can be paid for,
REPLIES.batch.json tells what is under way, so a run cut off anywhere goes on with the same batch.
"""

import asyncio
import json
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import together
from tqdm import tqdm

from common.cli import UserError
from common.files import append_record, read_json, read_records, write_text
from common.table import Key, key_of
from data_prep.teacher import client, prices
from data_prep.teacher.endpoints import make_client
from data_prep.teacher.failures import ABOUT_THE_TEXT, Failure, read_failure
from data_prep.teacher.read_reply import NoReply, parse_body, words_in

BATCH = ".batch.json"  # in place of the .jsonl of the replies
MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of a file, by the API's limits
ENDED = ("COMPLETED", "FAILED", "EXPIRED", "CANCELLED")  # any other status: it may yet be paid for
RETRIES = 10  # the client's own, of an upload or a look: some minutes of an outage


async def start(endpoint: together.AsyncTogether, queue, path: Path) -> dict:
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
            asked.append(client.to_record(request, worst_usd=worst))
            usd += worst
    print(f"  {len(asked):,} in this batch, {len(queue.waiting) - len(asked):,} left for another")
    uploaded = await endpoint.files.upload(file, purpose="batch-api", check=False)
    file.unlink()
    if not queue.budget.reserve(usd):
        raise UserError(f"at worst this batch costs ${usd:,.2f}, which is over the budget")
    return {"price": queue.price, "usd": usd, "file": uploaded.id, "requests": asked}


async def fetch(queue, path: Path, bar: tqdm) -> tuple[dict, list[bytes]]:
    """(what is known, lines) of the batch under way, or of a new one. Raises UserError."""
    file = path.with_suffix(BATCH)
    try:
        known = read_json(file)
    except ValueError:
        raise UserError(f"{file} is not valid JSON; it tells the batch that is paid for") from None
    async with make_client(queue.options, RETRIES) as endpoint:
        if not known:
            known = await start(endpoint, queue, path)
            write_text(file, json.dumps(known))
        if "batch" not in known:  # perhaps an earlier run made it before it was cut off
            jobs = {job.input_file_id: job for job in await endpoint.batches.list()}
            of = {"endpoint": "/v1/chat/completions", "input_file_id": known["file"]}
            job = jobs.get(known["file"]) or (await endpoint.batches.create(**of)).job
            known["batch"] = job.id
            write_text(file, json.dumps(known))
        job = await endpoint.batches.retrieve(known["batch"])
        while job.status not in ENDED:
            bar.set_postfix_str(f"batch {job.status}, {job.progress or 0:.0f}%")
            await asyncio.sleep(queue.options.poll_seconds)
            job = await endpoint.batches.retrieve(job.id)
        names = [name for name in (job.output_file_id, job.error_file_id) if name]
        if job.status == "COMPLETED" and not names:
            hint = f"run again, or delete {file} to give its replies up"
            raise UserError(f"batch {job.id} is complete and names no file of replies yet; {hint}")
        lines = []
        for name in names:
            async with endpoint.files.with_streaming_response.content(name) as answer:
                lines += (await answer.read()).splitlines()
    print(f"batch {job.id} ended as {job.status}, {job.error or 'no error'}")
    return known, [line for line in lines if line.strip()]


def read_line(line: bytes, known: dict, options: client.AskOptions) -> tuple[dict, dict | Failure]:
    """(request, the record of its reply or why there is none) of a line of a batch's output.

    Raises NoReply where the line does not say which request it answers.
    """
    found = parse_body(line)
    try:
        request = known["requests"][int(found["custom_id"].rpartition("-")[2])]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise NoReply(words_in(found) or "an answer to no request") from None
    answer = found.get("response")
    if not isinstance(answer, dict):
        answer = {"body": found}
    body = answer.get("body")
    try:
        reply = client.to_reply(request, body, known["price"], options)
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


async def run_batch(
    queue, path: Path, key: Key, replies: BinaryIO, refused: BinaryIO, bar: tqdm
) -> None:
    """Do for the queue what its own `run` does, in one batch. Raises UserError."""
    try:
        known, lines = await fetch(queue, path, bar)
    except together.APIError as error:
        reason = read_failure(error).words
        raise UserError(f"{reason}; the same command goes on with the batch") from None
    asked_at = path.with_suffix(BATCH).stat().st_mtime
    replies_by_key: dict[str, dict] = {}  # a request that is answered twice was asked once
    refusals, failed, failed_usd = [], [], 0.0
    for line in lines:
        try:
            request, outcome = read_line(line, known, queue.options)
        except NoReply as error:
            failed.append(str(error))
            continue
        if isinstance(outcome, dict):
            if "prompt" not in outcome:  # of a batch that an earlier version began
                outcome["created"] = datetime.fromtimestamp(asked_at, UTC).isoformat()
            before = replies_by_key.get(key_of(request, key))
            if not before or before.get("unusable"):
                replies_by_key[key_of(request, key)] = outcome
            continue
        failed.append(outcome.words)
        failed_usd += outcome.cost_usd
        if outcome.is_refusal:
            refusals.append((request, outcome.words))
    records = [*replies_by_key.values()]
    for request, words in refusals:
        if key_of(request, key) not in replies_by_key:
            queue.give_up(request, words)
    if failed:
        print(f"  {len(failed):,} without a reply, the last with: {failed[-1]}")
    # A kill behind this line must not append the same replies twice.
    there = {key_of(r, (*key, "batch")) for r in read_records(path) if r.get("batch")}
    append_record(replies, *(r for r in records if key_of(r, (*key, "batch")) not in there))
    for record in records:
        queue.take_reply(record)
    if queue.answered:
        append_record(refused, *queue.refusals)
    # In this order a kill can leave the worst case counted as spent, but never settles twice.
    path.with_suffix(BATCH).unlink()
    queue.usd = failed_usd + sum(record["cost_usd"] or 0 for record in records)
    queue.budget.settle(known["usd"], queue.usd)
