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
from itertools import accumulate
from pathlib import Path

import together
from together import AsyncTogether
from together.types import BatchJob
from tqdm import tqdm

from common.cli import UserError, one_line
from common.files import append_record, appending, replacing, write_text
from common.table import Key, missing
from data_prep.teacher.ask import (
    FATAL,
    KEY,
    append_refusals,
    batch_state,
    is_refusal,
    refused_file,
    select_requests,
)
from data_prep.teacher.client import (
    error_message,
    make_client,
    now,
    price_of,
    to_record,
    without_messages,
    worst_case_usd,
)
from data_prep.teacher.limits import Budget

MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of one file, by the API's limits


def batch_price(args: argparse.Namespace) -> dict:
    price = price_of(args)
    return price | {k: price[k] * price.get("batch", 1) for k in ("input", "output") if k in price}


def save(path: Path, state: dict) -> None:
    write_text(batch_state(path), json.dumps(state) + "\n")


def to_files(requests: list[dict], args: argparse.Namespace) -> list[list[bytes]]:
    """The lines of the files of a batch, each file within the API's limits."""
    body = {name: getattr(args, name) for name in ("model", "max_tokens", "temperature")}
    # The endpoint knows files by their content, also those whose upload was cut off.
    nonce, files, size = secrets.token_hex(4), [], MOST_BYTES
    for number, request in enumerate(requests):
        line = {"custom_id": f"{nonce}-{number}"}
        line["body"] = body | {"messages": request["messages"]}
        data = json.dumps(line).encode() + b"\n"
        if size + len(data) > MOST_BYTES or len(files[-1]) == MOST_REQUESTS:
            files.append([])
            size = 0
        files[-1].append(data)
        size += len(data)
    return files


async def upload(
    client: AsyncTogether, requests: list[dict], path: Path, args: argparse.Namespace
) -> list[dict]:
    """Upload the files of a new batch, which costs nothing; return its parts."""
    parts = []
    for lines in to_files(requests, args):
        with replacing(path.with_suffix(".batch-input.jsonl")) as temporary:
            temporary.write_bytes(b"".join(lines))
            answer = await client.files.upload(temporary, purpose="batch-api", check=False)
        parts.append({"file": answer.id, "requests": len(lines)})
    path.with_suffix(".batch-input.jsonl").unlink()
    return parts


async def start(client: AsyncTogether, path: Path, state: dict) -> None:
    """Start each part that an earlier run did not."""
    for part in state["parts"]:
        if "batch" not in part:
            # A run can be cut off after the endpoint made the batch, before we wrote it down.
            jobs = [job for job in await client.batches.list() if job.input_file_id == part["file"]]
            if not jobs:
                endpoint = "/v1/chat/completions"
                new = await client.batches.create(endpoint=endpoint, input_file_id=part["file"])
                jobs = [new.job]
            part["batch"] = jobs[0].id
            save(path, state)


async def finish(client: AsyncTogether, part: dict, label: str, seconds: float) -> BatchJob:
    """Poll a part until the endpoint is done with it."""
    with tqdm(total=100, desc=f"{label}, batch {part['batch']}", unit="%") as bar:
        while True:
            try:
                job = await client.batches.retrieve(part["batch"])
            except together.APIError as error:  # polling costs nothing: an outage is sat out
                if getattr(error, "status_code", None) in FATAL:
                    raise
                bar.set_postfix_str(error_message(error))
            else:
                bar.set_postfix_str(f"{job.status}, {part['requests']:,} requests", refresh=False)
                bar.update((job.progress or 0) - bar.n)
                if job.status not in ("VALIDATING", "IN_PROGRESS"):
                    return job
            await asyncio.sleep(seconds)


async def download(client: AsyncTogether, job: BatchJob) -> list[dict]:
    """The lines of a batch's output and of its file of errors."""
    lines = []
    for file in filter(None, (job.output_file_id, job.error_file_id)):
        async with client.files.with_streaming_response.content(file) as answer:
            lines += map(json.loads, (await answer.read()).splitlines())
    return lines


def read_result(line: dict, requests: list[dict], price: dict) -> tuple[dict, int]:
    """(record of a line of results, 200), or (record of why there is none, status or 0)."""
    request = requests[int(line["custom_id"].rpartition("-")[2])]
    answer = line.get("response") or {}
    status, body = answer.get("status_code") or 0, answer.get("body") or {}
    try:
        if status == 200:
            return to_record(request, body, price), status
        error = line.get("error") or body.get("error") or body or "no reason given"
    except ValueError as no_reply:
        status, error = 0, str(no_reply)
    reason = one_line(error.get("message", error) if isinstance(error, dict) else error)
    return request | {"reason": reason, "created": now()}, status


async def run_batch(
    requests: list[dict], path: Path, args: argparse.Namespace, budget: Budget, label: str
) -> tuple[dict, list[dict]]:
    """(state, lines of results) of the batch under way, or of a new one of as many of `requests`
    as the budget covers at their worst case. Raises UserError."""
    price = batch_price(args)
    async with make_client(args, retries=2) as client:
        if batch_state(path).exists():
            state = json.loads(batch_state(path).read_text())
            if state["model"] != args.model:
                raise UserError(f"a batch for {state['model']} is under way; finish it first")
        else:
            left = budget.left()
            sums = accumulate(worst_case_usd(r, price, args.max_tokens) for r in requests)
            costs = [usd for usd in sums if usd <= left]
            if not costs:
                raise UserError(f"${left:,.2f} are left of the budget, too few for one request")
            requests = requests[: len(costs)]
            parts = await upload(client, requests, path, args)
            if not budget.reserve(costs[-1]):
                raise UserError("another run has spent the budget meanwhile")
            kept = list(map(without_messages, requests))
            state = {"model": args.model, "usd": costs[-1], "requests": kept, "parts": parts}
            save(path, state)
        await start(client, path, state)
        lines = []
        for part in state["parts"]:
            job = await finish(client, part, label, args.poll_seconds)
            lines += await download(client, job)
            if job.status != "COMPLETED":
                print(f"batch {job.id} ended as {job.status}: {job.error or 'no reason given'}")
    return state, lines


def ask_batch(
    requests: list[dict], path: Path, args: argparse.Namespace, label: str, key: Key = KEY
) -> int:
    """`ask_all` through the batch API; `args.poll_seconds` between two looks. Raises UserError.

    Goes on with the batch under way if there is one.
    """
    price = batch_price(args)
    with appending(path) as file:
        wanted, answered = select_requests(requests, path, args, price, label, key)
        if not wanted and not batch_state(path).exists():
            return 0
        budget = Budget(path.parent, args.budget_usd)
        try:
            state, lines = asyncio.run(run_batch(wanted, path, args, budget, label))
        except together.APIError as error:
            message = error_message(error)
            raise UserError(f"{message}; the same command goes on with the batch") from None
        results = [read_result(line, state["requests"], price) for line in lines]
        replies = [record for record, status in results if status == 200]
        append_record(file, *missing(path, replies, key))
        refusals = [record for record, status in results if is_refusal(status)]
        if refusals and (answered or replies):
            append_refusals(path, refusals)
        # In this order a kill can leave the worst case counted, and never settles twice.
        usd, state["usd"] = state["usd"], 0.0
        save(path, state)
        if usd:
            budget.settle(usd, sum(reply["cost_usd"] or 0 for reply in replies))
        batch_state(path).unlink()
        left = missing(refused_file(path), missing(path, wanted, key), key)
    print(f"{label}: {len(replies):,} replies, {len(left):,} still without one")
    for reason, number in Counter(r["reason"] for r, status in results if status != 200).items():
        print(f"  {number:,}: {reason}")
    return len(left)
