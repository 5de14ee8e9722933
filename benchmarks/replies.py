"""Ask a local endpoint for 3,000 replies, by our engine and in the plain way, side by side.

The endpoint runs in a process of its own: 1.0 s mean latency (half to one and a half), with a
cap of 50 requests in any second (429 and Retry-After: 1 over it) and with none. The plain way is
asyncio.gather under a semaphore with the client's own retries, as many in flight. Prints the rate
reached, 429s and replies lost of both.

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

from tabulate import tabulate

ROOT = Path(__file__).parent.parent
CONCURRENCY, CAP = 128, 50
REPLIES = "summarize/replies/train.jsonl"
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


def start(module: str, *options: object, url: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, options)],
        cwd=ROOT,
        env={"TOGETHER_BASE_URL": url, "TOGETHER_API_KEY": "local"},
        stdout=subprocess.DEVNULL,
    )


def ours(folder: Path, url: str) -> subprocess.Popen:
    options = ("--data", folder, "--splits", "train", "--budget-usd", 1000)
    more = ("--concurrency", CONCURRENCY)
    return start("data_prep.generate_replies", *options, *more, url=url)


async def plain_way(folder: Path) -> None:
    """Everything at once under a semaphore, what came of it written at the end."""
    from together import AsyncTogether

    from prompts.task import load_task

    extracts = map(json.loads, (folder / "extracts/train.jsonl").open())
    prompts = [load_task().render("teacher", text=one["text"], longer=1) for one in extracts]
    client, semaphore = AsyncTogether(), asyncio.Semaphore(CONCURRENCY)

    async def ask(prompt: str):
        messages = [{"role": "user", "content": prompt}]
        async with semaphore:
            return await client.chat.completions.create(
                model="openai/gpt-oss-120b", messages=messages, max_tokens=4096
            )

    answers = await asyncio.gather(*map(ask, prompts), return_exceptions=True)
    kept = [answer.to_json(indent=None) for answer in answers if not isinstance(answer, Exception)]
    (folder / REPLIES).parent.mkdir(parents=True)
    (folder / REPLIES).write_text("\n".join(kept) + "\n")


def ideal_seconds(latencies: list[float], cap: int) -> float:
    """At the cap, and in no slot's idle time, with these latencies in the order they were drawn."""
    if cap:
        return len(latencies) / cap + sum(latencies) / len(latencies)
    slots = [0.0] * CONCURRENCY
    for latency in latencies:
        heapq.heapreplace(slots, slots[0] + latency)
    return max(slots)


def measure(name: str, process: subprocess.Popen, folder: Path, ledger, cap: int) -> list:
    """A row of the table: seconds and rate as the endpoint saw them, 429s, replies kept."""
    started = time.monotonic()
    process.wait()
    wall, seen = time.monotonic() - started, ledger()
    ideal = ideal_seconds(seen["latencies"], cap)
    seconds = seen["last_reply"] - seen["admitted"][0]
    made, refused = seen["outcomes"]["200"], seen["outcomes"].get("429", 0)
    path = folder / REPLIES
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=3_000, help="extracts (default: 3000)")
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain:
        asyncio.run(plain_way(args.plain))
    else:
        print(side_by_side(args.n))


if __name__ == "__main__":
    main()
