"""Ask a local endpoint for 3,000 replies, by our engine and in the plain way, side by side.

The endpoint runs in a process of its own: 1.0 s mean latency (half to one and a half), with a
cap of 50 requests in any second (429 and Retry-After: 1 over it) and with none. The plain way is
asyncio.gather under a semaphore with the client's own retries, as many in flight. Prints the rate
reached, 429s and replies lost of both; then the peak memory of our command line on 20,500 rows.

    python -m benchmarks.replies
"""

import argparse
import asyncio
import heapq
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from tabulate import tabulate

ROOT = Path(__file__).parent.parent
CONCURRENCY, CAP = 128, 50
TEXT = "The harbour was built beside the salt marshes and has been dredged ever since. " * 80


@contextmanager
def serving(*options: object) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(url, function that reads the ledger) of an endpoint in a process of its own."""
    command = [sys.executable, "-m", "demo.endpoint", *map(str, options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        yield url, lambda: json.load(urllib.request.urlopen(url + "/ledger"))
    finally:
        process.kill()
        process.wait()


def write_extracts(folder: Path, n: int) -> None:
    (folder / "extracts").mkdir(parents=True)
    with (folder / "extracts/train.jsonl").open("w") as file:
        for i in range(n):
            file.write(json.dumps({"id": f"{i:016x}", "text": f"{TEXT} {i:06}"}) + "\n")


def start(module: str, *options: object, url: str) -> psutil.Popen:
    return psutil.Popen(
        [sys.executable, "-m", module, *map(str, options)],
        cwd=ROOT,
        env={"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": "local"},
        stdout=subprocess.DEVNULL,
    )


def ours(folder: Path, url: str) -> psutil.Popen:
    options = ("--extracts", folder / "extracts", "--output", folder / "replies")
    more = ("--splits", "train", "--concurrency", CONCURRENCY, "--budget-usd", 1000)
    return start("data_prep.generate_replies", *options, *more, url=url)


async def plain_way(folder: Path) -> None:
    """Everything at once under a semaphore, what came of it written at the end."""
    from together import AsyncTogether

    from data_prep.generate_replies import to_request

    extracts = map(json.loads, (folder / "extracts/train.jsonl").open())
    requests = [to_request(extract, True, 0) for extract in extracts]
    client, semaphore = AsyncTogether(), asyncio.Semaphore(CONCURRENCY)

    async def ask(request: dict):
        async with semaphore:
            return await client.chat.completions.create(
                model="openai/gpt-oss-120b", messages=request["messages"], max_tokens=4096
            )

    answers = await asyncio.gather(*map(ask, requests), return_exceptions=True)
    kept = [answer.to_json(indent=None) for answer in answers if not isinstance(answer, Exception)]
    (folder / "replies").mkdir()
    (folder / "replies/train.jsonl").write_text("\n".join(kept) + "\n")


def ideal_seconds(latencies: list[float], cap: int) -> float:
    """At the cap, and in no slot's idle time, with these latencies in the order they were drawn."""
    if cap:
        return len(latencies) / cap + sum(latencies) / len(latencies)
    slots = [0.0] * CONCURRENCY
    for latency in latencies:
        heapq.heapreplace(slots, slots[0] + latency)
    return max(slots)


def measure(name: str, process: psutil.Popen, folder: Path, ledger, cap: int) -> list:
    """A row of the table: seconds and rate as the endpoint saw them, 429s, replies kept."""
    started = time.monotonic()
    process.wait()
    wall, seen = time.monotonic() - started, ledger()
    ideal = ideal_seconds(seen["latencies"], cap)
    seconds = seen["last_reply"] - seen["admitted"][0]
    made, refused = seen["outcomes"]["200"], seen["outcomes"].get("429", 0)
    path = folder / "replies/train.jsonl"
    kept = sum(1 for _ in path.open()) if path.exists() else 0
    n = sum(1 for _ in (folder / "extracts/train.jsonl").open())
    return [
        name,
        f"{seconds:.1f}",
        f"{wall:.1f}",
        f"{made / (seen['admitted'][-1] - seen['admitted'][0]):.1f}",
        f"{ideal / seconds:.1%}",
        f"{refused:,} ({refused / (made + refused):.1%})",
        f"{n - kept:,}",
    ]


def side_by_side(n: int) -> str:
    rows = []
    for cap in (CAP, 0):
        for name in ("ours", "plain"):
            with (
                tempfile.TemporaryDirectory() as temporary,
                serving("--latency", 1.0, "--cap", cap) as (url, ledger),
            ):
                folder = Path(temporary)
                write_extracts(folder, n)
                if name == "ours":
                    process = ours(folder, url)
                else:
                    process = start("benchmarks.replies", "--plain", folder, url=url)
                rows.append(measure(f"{name}, {cap or 'no'} cap", process, folder, ledger, cap))
    headers = ["way", "s", "s with start", "admitted/s", "of the ideal", "429s", "replies lost"]
    return tabulate(rows, headers=headers, disable_numparse=True)


def memory(n: int) -> str:
    """Resident MiB of our command line, at a tenth of the replies and at most."""
    with tempfile.TemporaryDirectory() as temporary, serving("--latency", 0.3) as (url, _):
        folder = Path(temporary)
        write_extracts(folder, n)
        process, early, peak = ours(folder, url), 0, 0
        replies = folder / "replies/train.jsonl"
        one = 4_600  # bytes of a reply record, about
        while process.poll() is None:
            try:
                resident = process.memory_info().rss
            except psutil.NoSuchProcess:
                break
            peak = max(peak, resident)
            if replies.exists() and replies.stat().st_size < n * one / 10:
                early = max(early, resident)
            time.sleep(0.5)
        kept = sum(1 for _ in replies.open())
    return (
        f"{kept:,} rows: {early / 2**20:.0f} MiB by a tenth of them, {peak / 2**20:.0f} MiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=3_000, help="extracts (default: 3000)")
    parser.add_argument("--rows", type=int, default=20_500, help="for the memory; 0: leave it out")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        return asyncio.run(plain_way(args.plain))
    print(side_by_side(args.n))
    if args.rows:
        print(memory(args.rows))
    return None


if __name__ == "__main__":
    main()
