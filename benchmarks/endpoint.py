"""An OpenAI-compatible endpoint on loopback, with latency, a rate limit, faults and a ledger.

For benchmarks and tests; plain asyncio, so that it takes little of the machine. GET /ledger gives
what it saw: every request by outcome, replies by prompt, dollars charged, moments of admission.

    python -m benchmarks.endpoint --latency 1 --cap 50
"""

import argparse
import asyncio
import hashlib
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

REPLY = "\n".join(
    f"Summary {n}:\n{'A sentence of this summary that says something. ' * 40}\nCoherence: 5\n"
    f"Consistency: 4\nFluency: 3\nRelevance: {n}\nTotal score: {12 + n}\nExplanation: It fits.\n"
    for n in (1, 2)
)


class Endpoint:
    """`faults`: name -> probability; of 429, 500, 503, hang, truncate, garbage."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rng = args, random.Random(args.seed)
        self.faults = {k: float(v) for k, v in (f.split("=") for f in args.faults)}
        self.outcomes, self.prompts, self.charged = Counter(), Counter(), 0.0
        self.admitted, self.latencies, self.window = [], [], deque()
        self.last_reply = 0.0

    def ledger(self) -> dict:
        return {
            "outcomes": self.outcomes,
            "prompts": self.prompts,
            "charged": self.charged,
            "admitted": self.admitted,
            "latencies": self.latencies,
            "last_reply": self.last_reply,
        }

    def over_cap(self) -> bool:
        """Whether a second that ends now has already seen the cap's requests."""
        now = time.monotonic()
        while self.window and self.window[0] <= now - 1:
            self.window.popleft()
        if self.args.cap and len(self.window) >= self.args.cap:
            return True
        self.window.append(now)
        self.admitted.append(now)
        return False

    def fault(self) -> str | None:
        drawn = self.rng.random()
        for name, share in self.faults.items():
            if (drawn := drawn - share) < 0:
                return name
        return None

    async def answer(self, request: dict) -> tuple[int, bytes, str]:
        """(status, body, outcome); charges for what was made, whether or not it arrives."""
        fault = "429" if self.over_cap() else self.fault()
        if fault in ("429", "500", "503"):
            return int(fault), b'{"error": {"message": "not now"}}', fault
        self.latencies.append(self.args.latency * self.rng.uniform(0.5, 1.5))
        await asyncio.sleep(self.latencies[-1])
        prompt = request["messages"][-1]["content"]
        text = f"{REPLY}\nBest summary: 2"
        tokens_out = self.rng.randint(1, request["max_tokens"])
        usage = {"prompt_tokens": len(prompt.encode()), "completion_tokens": tokens_out}
        self.charged += (usage["prompt_tokens"] * 0.15 + tokens_out * 0.60) / 1e6
        self.prompts[hashlib.sha256(prompt.encode()).hexdigest()[:16]] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        body = {"id": "x", "choices": [choice | {"finish_reason": "stop"}], "usage": usage}
        return 200, json.dumps(body).encode(), fault or "200"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
                data = await reader.readexactly(int(headers.get("content-length", 0)))
                if head.startswith("GET"):
                    status, body, outcome = 200, json.dumps(self.ledger()).encode(), "ledger"
                else:
                    status, body, outcome = await self.answer(json.loads(data))
                    self.outcomes[outcome] += 1
                    self.last_reply = time.monotonic()
                if outcome == "hang":
                    await asyncio.sleep(3600)
                body = b"<html>oops</html>" if outcome == "garbage" else body
                retry = f"Retry-After: {self.args.retry_after}\r\n" if status == 429 else ""
                head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{retry}"
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
                writer.write(body[: len(body) // 2] if outcome == "truncate" else body)
                await writer.drain()
                if outcome == "truncate":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()


@contextmanager
def serving(*options: object) -> Iterator[tuple[str, Callable[[], dict]]]:
    """(url, function that reads the ledger) of an endpoint in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.endpoint", *map(str, options)]
    root = Path(__file__).parent.parent
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().strip()
        yield url, lambda: json.load(urllib.request.urlopen(url + "/ledger"))
    finally:
        process.kill()
        process.wait()


async def run(args: argparse.Namespace) -> None:
    server = await asyncio.start_server(Endpoint(args).serve, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--latency", type=float, default=0.0, help="mean seconds; half to one and a half"
    )
    parser.add_argument("--cap", type=int, default=0, help="requests in any second; 0: no cap")
    parser.add_argument("--retry-after", default="1", help="sent with every 429")
    parser.add_argument("--faults", nargs="*", default=[], help="e.g. 429=0.2 500=0.05 hang=0.01")
    parser.add_argument("--seed", type=int, default=0)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
