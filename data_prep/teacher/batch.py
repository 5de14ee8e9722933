"""Ask for many replies through Together's batch API: later, apart from the rate limit, cheaper.

Uploads files of requests, polls, downloads, appends to the same replies file. From the moment that
something can be paid for, REPLIES.batch.json tells what is under way, so a run cut off anywhere
goes on with the same batch.
"""

import argparse
import asyncio
import json
import secrets
from collections import Counter
from itertools import accumulate, chain
from pathlib import Path

import together
from together import AsyncTogether
from tqdm import tqdm

from common.cli import UserError, one_line
from common.files import append_record, appending, write_text
from common.table import Key, missing
from data_prep.teacher.ask import KEY, append_refusals, batch_state, refused_file, select_requests
from data_prep.teacher.client import (
    error_message,
    is_refusal,
    make_client,
    price_of,
    to_record,
    to_refusal,
    without_messages,
    worst_case_usd,
)
from data_prep.teacher.limits import Budget

MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of one file, by the API's limits
RETRIES = 10  # the client's own, of an upload or a look: some minutes of an outage


def save(path: Path, state: dict) -> None:
    write_text(batch_state(path), json.dumps(state) + "\n")


def to_files(requests: list[dict], args: argparse.Namespace) -> list[list[bytes]]:
    """The lines of the files of a batch, each file within the API's limits."""
    body = {name: getattr(args, name) for name in ("model", "max_tokens", "temperature")}
    # The endpoint knows files by their content, also those whose upload was cut off.
    nonce, files, size = secrets.token_hex(4), [], MOST_BYTES
    for number, request in enumerate(requests):
        body["messages"] = request["messages"]
        line = json.dumps({"custom_id": f"{nonce}-{number}", "body": body}).encode() + b"\n"
        if size + len(line) > MOST_BYTES or len(files[-1]) == MOST_REQUESTS:
            files.append([])
            size = 0
        files[-1].append(line)
        size += len(line)
    return files


async def upload(client: AsyncTogether, files: list[list[bytes]], path: Path) -> list[dict]:
    """Upload the files of a new batch, which costs nothing; return its parts."""
    parts, file = [], path.with_suffix(".batch-input.jsonl")
    try:
        for lines in files:
            file.write_bytes(b"".join(lines))
            answer = await client.files.upload(file, purpose="batch-api", check=False)
            parts.append({"file": answer.id, "requests": len(lines)})
    finally:
        file.unlink(missing_ok=True)
    return parts


async def start(client: AsyncTogether, part: dict) -> str:
    """The id of the part's batch, which an earlier run may have made before it was cut off."""
    jobs = [job for job in await client.batches.list() if job.input_file_id == part["file"]]
    if jobs:
        return jobs[0].id
    endpoint = "/v1/chat/completions"
    return (await client.batches.create(endpoint=endpoint, input_file_id=part["file"])).job.id


async def finish(client: AsyncTogether, part: dict, label: str, seconds: float) -> list[dict]:
    """Poll a part until the endpoint is done with it; the lines of its output and its errors."""
    with tqdm(total=100, desc=f"{label}, {part['requests']:,} in a batch", unit="%") as bar:
        job = await client.batches.retrieve(part["batch"])
        while job.status in ("VALIDATING", "IN_PROGRESS"):
            bar.set_postfix_str(job.status, refresh=False)
            bar.update((job.progress or 0) - bar.n)
            await asyncio.sleep(seconds)
            job = await client.batches.retrieve(part["batch"])
    if job.status != "COMPLETED":
        print(f"batch {job.id} ended as {job.status}: {job.error or 'no reason given'}")
    lines = []
    for file in filter(None, (job.output_file_id, job.error_file_id)):
        async with client.files.with_streaming_response.content(file) as answer:
            lines += map(json.loads, (await answer.read()).splitlines())
    return lines


async def run_batch(
    requests: list[dict], path: Path, args: argparse.Namespace, price: dict, label: str
) -> tuple[dict, list[dict]]:
    """(state, results) of the batch under way, or of a new one that the budget covers at its worst.

    Raises UserError.
    """
    async with make_client(args, retries=RETRIES) as client:
        if batch_state(path).exists():
            state = json.loads(batch_state(path).read_text())
            if state["model"] != args.model or "requests" not in state:
                was = f"a batch for {state['model']}, perhaps by an earlier version,"
                raise UserError(f"{was} is under way ({batch_state(path)}); finish it first")
        else:
            budget = Budget(path.parent, args.budget_usd)
            left = budget.left()
            sums = accumulate(worst_case_usd(r, price, args.max_tokens) for r in requests)
            costs = [usd for usd in sums if usd <= left]
            if not costs:
                raise UserError(f"${left:,.2f} are left of the budget, too few for one request")
            requests = requests[: len(costs)]
            parts = await upload(client, to_files(requests, args), path)
            if not budget.reserve(costs[-1]):
                raise UserError("another run has spent the budget meanwhile")
            bare = list(map(without_messages, requests))
            state = {"model": args.model, "usd": costs[-1], "requests": bare, "parts": parts}
            save(path, state)
        for part in state["parts"]:
            if "batch" not in part:
                part["batch"] = await start(client, part)
                save(path, state)
        parts = [await finish(client, part, label, args.poll_seconds) for part in state["parts"]]
    return state, list(chain.from_iterable(parts))


def read_result(line: dict, requests: list[dict], price: dict) -> tuple[int, dict]:
    """(200, reply) of a line of results, or (another status, 0 if there is none, refusal)."""
    request = requests[int(line["custom_id"].rpartition("-")[2])]
    answer = line.get("response") or {}
    status, body = answer.get("status_code") or 0, answer.get("body") or {}
    try:
        if status == 200:
            return status, to_record(request, body, price)
        error = line.get("error") or body.get("error") or body or "no reason given"
    except ValueError as no_reply:
        status, error = 0, no_reply
    reason = error.get("message", error) if isinstance(error, dict) else error
    return status, to_refusal(request, one_line(reason))


def ask_batch(
    requests: list[dict], path: Path, args: argparse.Namespace, label: str, key: Key = KEY
) -> int:
    """`ask_all` through the batch API; `args.poll_seconds` between two looks. Raises UserError.

    Goes on with the batch under way if there is one.
    """
    price = price_of(args)
    price |= {k: price[k] * price.get("batch", 1) for k in ("input", "output") if k in price}
    with appending(path) as file:
        wanted, answered = select_requests(requests, path, args, price, label, key)
        if not wanted and not batch_state(path).exists():
            return 0
        try:
            state, lines = asyncio.run(run_batch(wanted, path, args, price, label))
        except together.APIError as error:
            message = error_message(error)
            raise UserError(f"{message}; the same command goes on with the batch") from None
        results = [read_result(line, state["requests"], price) for line in lines]
        replies = [record for status, record in results if status == 200]
        append_record(file, *missing(path, replies, key))
        refusals = [record for status, record in results if is_refusal(status)]
        if refusals and (answered or replies):
            append_refusals(path, refusals)
        # In this order a kill can leave the worst case counted as spent, but never settles twice.
        usd, state["usd"] = state["usd"], 0.0
        save(path, state)
        if usd:
            cost = sum(reply["cost_usd"] or 0 for reply in replies)
            Budget(path.parent, args.budget_usd).settle(usd, cost)
        batch_state(path).unlink()
        left = missing(refused_file(path), missing(path, wanted, key), key)
    print(f"{label}: {len(replies):,} replies, {len(left):,} still without one")
    reasons = Counter(record["reason"] for status, record in results if status != 200)
    for reason, number in reasons.most_common(5):
        print(f"  {number:,}: {reason}")
    return len(left)
