"""Ask for many replies through Together's batch API: later, apart from the rate limit, cheaper.

Uploads files of requests, polls, downloads, merges into the same replies file. Each step is written
down in REPLIES.batch.json once done, so a run cut off anywhere goes on with the same batch.
"""

import argparse
import asyncio
import json
import re
import secrets
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import together
from together import AsyncTogether
from together.types import BatchJob
from tqdm import tqdm

from common.cli import UserError
from common.files import append_record, appending, read_records, replacing
from data_prep.teacher.ask import batch_state, without_reply, write_reasons
from data_prep.teacher.client import (
    FINAL,
    make_client,
    price_of,
    said,
    split_by_length,
    to_record,
    worst_case_usd,
)
from data_prep.teacher.limits import Purse

MOST_REQUESTS, MOST_BYTES = 50_000, 100_000_000  # of one file, by the API's limits


def batch_price(args: argparse.Namespace) -> dict:
    price = price_of(args)
    return price | {k: price[k] * price.get("batch", 1) for k in ("input", "output") if k in price}


def save(path: Path, state: dict) -> None:
    with replacing(batch_state(path)) as temporary:
        temporary.write_text(json.dumps(state, indent=1) + "\n")


def start(requests: list[dict], path: Path, args: argparse.Namespace, usd: float) -> dict:
    """Write the files of a new batch and its state; `usd` is what it can cost at most."""
    body = {name: getattr(args, name) for name in ("model", "max_tokens", "temperature")}
    files, size = [], MOST_BYTES
    for request in requests:
        name = f"{request['id']}.{request['prompt_sha']}.00000000"
        line = {"custom_id": name, "body": body | {"messages": request["messages"]}}
        data = json.dumps(line).encode() + b"\n"
        if size + len(data) > MOST_BYTES or len(files[-1]) == MOST_REQUESTS:
            files.append([])
            size = 0
        files[-1].append(data)
        size += len(data)
    parts = []
    for number, lines in enumerate(files):
        parts.append({"input": f"{path.stem}.batch-{number}.jsonl", "requests": len(lines)})
        with replacing(path.with_name(parts[-1]["input"])) as temporary:
            temporary.write_bytes(b"".join(lines))
    state = {"model": args.model, "usd": usd, "parts": parts}
    save(path, state)
    return state


def renew(file: Path) -> Path:
    """Give a file of requests another nonce; return it.

    The endpoint knows files by content, also those whose upload was cut off, or of earlier batches.
    """
    nonce = b'.%s", "body"' % secrets.token_hex(4).encode()
    data = re.sub(rb'\.[0-9a-f]{8}", "body"', nonce, file.read_bytes())
    with replacing(file) as temporary:
        temporary.write_bytes(data)
    return file


async def submit(client: AsyncTogether, path: Path, state: dict) -> None:
    """Upload and start each part that an earlier run did not."""
    for part in state["parts"]:
        if "file" not in part:
            file = renew(path.with_name(part["input"]))
            part["file"] = (await client.files.upload(file, purpose="batch-api", check=False)).id
            save(path, state)
        if "batch" not in part:
            # A run can be cut off after the endpoint made the batch, before we wrote it down.
            jobs = [job for job in await client.batches.list() if job.input_file_id == part["file"]]
            if not jobs:
                endpoint = "/v1/chat/completions"
                made = await client.batches.create(endpoint=endpoint, input_file_id=part["file"])
                jobs = [made.job]
            part["batch"] = jobs[0].id
            save(path, state)


async def finished(client: AsyncTogether, part: dict, label: str, seconds: float) -> BatchJob:
    """Poll a part until the endpoint is done with it."""
    with tqdm(total=100, desc=f"{label}, batch {part['batch']}", unit="%") as bar:
        while True:
            try:
                job = await client.batches.retrieve(part["batch"])
            except together.APIError as error:  # polling costs nothing: an outage is sat out
                if getattr(error, "status_code", None) in FINAL:
                    raise
                bar.set_postfix_str(said(error))
            else:
                bar.set_postfix_str(f"{job.status}, {part['requests']:,} requests", refresh=False)
                bar.update((job.progress or 0) - bar.n)
                if job.status not in ("VALIDATING", "IN_PROGRESS"):
                    return job
            await asyncio.sleep(seconds)


async def results(client: AsyncTogether, job: BatchJob, folder: Path) -> list[dict]:
    """The lines of a batch's output and of its file of errors."""
    lines, target = [], folder / f".{job.id}.results"
    for file in filter(None, (job.output_file_id, job.error_file_id)):
        async with client.files.with_streaming_response.content(file) as answer:
            await answer.stream_to_file(target)
        lines += read_records(target, ("custom_id",))
        target.unlink()
    return lines


def read_result(line: dict, requests: dict, model: str, price: dict) -> dict:
    """The reply record of a line of results. Raises ValueError with the reason if it has none."""
    key, sha, _ = line["custom_id"].rsplit(".", 2)
    answer = line.get("response") or {}
    body = answer.get("body") or {}
    if answer.get("status_code") != 200:
        error = line.get("error") or body.get("error") or body or "no reason given"
        raise ValueError(str(error.get("message", error) if isinstance(error, dict) else error))
    return to_record(requests.get((key, sha), {"id": key, "prompt_sha": sha}), body, model, price)


async def run_batch(
    state: dict,
    path: Path,
    log: BinaryIO,
    requests: list[dict],
    args: argparse.Namespace,
    label: str,
) -> dict:
    """Take the batch from where it stands to its end; append the replies; return {id: why none}."""
    by_key = {(r["id"], r["prompt_sha"]): r for r in requests}
    price, reasons = batch_price(args), {}
    async with make_client(args, retries=2) as client:
        await submit(client, path, state)
        for part in state["parts"]:
            job = await finished(client, part, label, args.poll_seconds)
            records = []
            for line in await results(client, job, path.parent):
                try:
                    records.append(read_result(line, by_key, args.model, price))
                except ValueError as error:
                    reasons[line["custom_id"].rsplit(".", 2)[0]] = str(error)
            append_record(log, *without_reply(records, path, args.model))
            if job.status != "COMPLETED":
                print(f"batch {job.id} ended as {job.status}: {job.error or 'no reason given'}")
    return reasons


def ask_batch(requests: list[dict], path: Path, args: argparse.Namespace, label: str) -> int:
    """`ask_teacher.ask_all` through the batch API; `args.poll_seconds` between two looks.

    Goes on with the batch under way if there is one. Raises UserError.
    """
    price = batch_price(args)
    with appending(path) as log:
        missing = without_reply(requests, path, args.model)
        missing, reasons = split_by_length(missing, price, args.max_tokens)
        if batch_state(path).exists():
            state = json.loads(batch_state(path).read_text())
            if state["model"] != args.model:
                raise UserError(f"a batch for {state['model']} is under way; finish it first")
        elif missing:
            left = Purse(path, args.budget_usd).left()
            sums = accumulate(worst_case_usd(r, price, args.max_tokens) for r in missing)
            costs = [usd for usd in sums if usd <= left]
            print(f"{label}: {len(requests):,} in all, {len(costs):,} of {len(missing):,} to ask")
            if not costs:
                raise UserError(f"${left:,.2f} are left of the budget, too few for one request")
            state = start(missing[: len(costs)], path, args, costs[-1])
        else:
            write_reasons(path, args.model, reasons)
            return 0
        try:
            reasons |= asyncio.run(run_batch(state, path, log, requests, args, label))
        except together.APIError as error:
            raise UserError(f"{said(error)}; the same command goes on with the batch") from None
        write_reasons(path, args.model, reasons)
        batch_state(path).unlink()
        for part in state["parts"]:
            path.with_name(part["input"]).unlink(missing_ok=True)
        still = without_reply(missing, path, args.model)
    print(f"{label}: {len(missing) - len(still):,} replies, {len(still):,} still without one")
    return len(still)
