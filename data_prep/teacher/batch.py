"""Ask through Together's batch API: later, apart from the rate limit, cheaper for some models.

Uploads one file of requests, polls, downloads. From the moment that something can be paid for,
REPLIES.batch.json tells what is under way, so a run cut off anywhere goes on with the same batch.
"""

import asyncio
import json
import secrets
from pathlib import Path
from typing import BinaryIO

import together
from tqdm import tqdm

from common.cli import UserError
from common.files import append_record, read_json, write_text
from common.table import Key, missing
from data_prep.teacher import client

BATCH = ".batch.json"  # in place of the .jsonl of the replies
MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of a file, by the API's limits
RETRIES = 10  # the client's own, of an upload or a look: some minutes of an outage


async def start(endpoint: together.AsyncTogether, queue, path: Path) -> dict:
    """Upload as many requests as a file takes; what is known of their batch. Raises UserError."""
    body = {name: getattr(queue.args, name) for name in client.OPTIONS}
    nonce = secrets.token_hex(4)  # the endpoint knows files by content, also half-uploaded ones
    file, asked, usd = path.with_suffix(".batch-input.jsonl"), [], 0.0
    with file.open("w") as lines:
        for request in list(queue.waiting)[:MOST_REQUESTS]:
            body["messages"] = request["messages"]
            line = json.dumps({"custom_id": f"{nonce}-{len(asked)}", "body": body}) + "\n"
            if lines.tell() + len(line) > MOST_BYTES:
                break
            lines.write(line)
            asked.append(client.to_record(request))
            usd += client.worst_case_usd(request, queue.price, queue.args.max_tokens)
    print(f"  {len(asked):,} in this batch, {len(queue.waiting) - len(asked):,} left for another")
    uploaded = await endpoint.files.upload(file, purpose="batch-api", check=False)
    file.unlink()
    if not queue.budget.reserve(usd):
        raise UserError(f"at worst this batch costs ${usd:,.2f}, which is over the budget")
    return {"price": queue.price, "usd": usd, "file": uploaded.id, "requests": asked}


async def fetch(queue, path: Path, bar: tqdm) -> tuple[dict, list[dict]]:
    """(what is known, results) of the batch under way, or of a new one. Raises UserError."""
    file = path.with_suffix(BATCH)
    known = read_json(file)
    async with client.make_client(queue.args, RETRIES) as endpoint:
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
        while job.status in ("VALIDATING", "IN_PROGRESS"):
            bar.set_postfix_str(f"batch {job.status}, {job.progress or 0:.0f}%")
            await asyncio.sleep(queue.args.poll_seconds)
            job = await endpoint.batches.retrieve(job.id)
        lines = []
        for name in filter(None, (job.output_file_id, job.error_file_id)):
            async with endpoint.files.with_streaming_response.content(name) as answer:
                lines += map(json.loads, (await answer.read()).splitlines())
    print(f"batch {job.id} ended as {job.status}, {job.error or 'no error'}")
    return known, lines


async def run_batch(queue, path: Path, key: Key, replies: BinaryIO, bar: tqdm) -> None:
    """Do for the queue what its own `run` does, in one batch. Raises UserError."""
    try:
        known, lines = await fetch(queue, path, bar)
    except together.APIError as error:
        reason = client.reason_in(error)
        raise UserError(f"{reason}; the same command goes on with the batch") from None
    found, failed = [], []
    for line in lines:
        request = known["requests"][int(line["custom_id"].rpartition("-")[2])]
        answer = line.get("response") or {"body": line}
        try:
            found.append(client.to_reply(request, answer["body"], known["price"]))
        except ValueError:
            failed.append(client.reason_in(answer["body"]))
            if client.is_refusal(answer.get("status_code", 0)):
                queue.refusals.append(client.to_record(request, reason=failed[-1]))
    if failed:
        print(f"  {len(failed):,} without a reply, the last with: {failed[-1]}")
    append_record(replies, *missing(path, found, key))
    queue.count["replies"], queue.answered = len(found), queue.answered or bool(found)
    # In this order a kill can leave the worst case counted as spent, but never settles twice.
    path.with_suffix(BATCH).unlink()
    queue.usd = sum(reply["cost_usd"] or 0 for reply in found)
    queue.budget.settle(known["usd"], queue.usd)
