"""A fake OpenAI-compatible endpoint on loopback: for the demo's teacher, the tests, the benchmarks.

It answers chat completions after a latency, keeps to a rate limit, refuses or spoils answers on
request, and keeps a ledger of what it saw, which GET /ledger shows. Plain asyncio, so that it takes
little of the machine.

    python -m demo.endpoint --latency 1 --cap 50
"""

import asyncio
import itertools
import json
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

from common.cli import run, script_parser

FAULTS = ("429", "500", "503", "hang", "truncate", "garbage")
NOT_FOUND = {"error": {"message": "no such path"}}


class Endpoint:
    """An endpoint that serves from a thread of its own as long as the process lives, or `close`.

    `reply` makes a reply of a prompt; `status` the HTTP status of its answer, with `message` where
    it is not 200; `count_tokens` what (prompt, reply, max_tokens) are charged for. `latency` is the
    mean in seconds, from half to one and a half of it; `cap` the most requests in any second;
    `faults` the probability of each of FAULTS.
    """

    def __init__(  # noqa: PLR0913 (what an endpoint may do, each by its name)
        self,
        reply: Callable[[str], str | None],
        *,
        status: Callable[[str], int] = lambda prompt: 200,
        message: str = "no",
        count_tokens: Callable[[str, str, int], tuple[int, int]] | None = None,
        finish: Callable[[str], str] = lambda prompt: "stop",
        model: str | None = None,
        latency: float = 0.0,
        cap: int = 0,
        retry_after: object = 1,
        faults: Mapping[str, float] | None = None,
        port: int = 0,
    ) -> None:
        self.reply, self.status, self.message, self.finish = reply, status, message, finish
        self.count_tokens = count_tokens or self.any_count
        self.model, self.latency, self.cap, self.retry_after = model, latency, cap, retry_after
        self.faults, self.random = dict(faults or {}), random.Random(0)
        self.ledger: Counter = Counter()  # replies by prompt
        self.outcomes: Counter = Counter()  # answers by HTTP status or fault
        self.headers: list[dict[str, str]] = []  # of each request
        self.admitted, self.latencies, self.window = [], [], deque()
        self.charged, self.last_reply = 0.0, 0.0
        self.loop = asyncio.new_event_loop()
        serving = asyncio.start_server(self.serve, "127.0.0.1", port, backlog=1024)
        self.server = self.loop.run_until_complete(serving)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.server.close)
        asyncio.run_coroutine_threadsafe(self.hang_up(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    async def hang_up(self) -> None:
        """Leave the connections that are open."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def any_count(self, prompt: str, reply: str, most: int) -> tuple[int, int]:
        """As many tokens as bytes, and any number back that the request allows."""
        return len(prompt.encode()), self.random.randint(1, most)

    def over_cap(self) -> bool:
        """Whether the second that ends now has already seen the cap's requests."""
        now = time.monotonic()
        while self.window and self.window[0] <= now - 1:
            self.window.popleft()
        if self.cap and len(self.window) >= self.cap:
            return True
        self.window.append(now)
        self.admitted.append(now)
        return False

    def draw_fault(self) -> str | None:
        limits = itertools.accumulate(self.faults.values())
        drawn = self.random.random()
        faults = zip(self.faults, limits, strict=True)
        return next((fault for fault, limit in faults if drawn < limit), None)

    async def answer(self, request: dict) -> tuple[int, dict, str]:
        """(status, body, outcome); charges for what was made, whether or not it arrives."""
        prompt = request["messages"][-1]["content"]
        if self.model not in (None, request["model"]):
            return 404, {"error": {"message": f"no such model: {request['model']}"}}, "404"
        fault = "429" if self.over_cap() else self.draw_fault()
        status = int(fault) if fault and fault.isdigit() else self.status(prompt)
        if status != 200:
            await asyncio.sleep(0.004)  # a refusal is quick, but not at once
            return status, {"error": {"message": self.message}}, str(status)
        self.latencies.append(self.latency * self.random.uniform(0.5, 1.5))
        await asyncio.sleep(self.latencies[-1])
        text = await asyncio.to_thread(self.reply, prompt)
        counts = self.count_tokens(prompt, text or "", request.get("max_tokens") or 1)
        self.charged += (counts[0] * 0.15 + counts[1] * 0.60) / 1e6  # the default teacher's prices
        self.ledger[prompt] += 1
        message = {"role": "assistant", "content": text}
        usage = dict(zip(("prompt_tokens", "completion_tokens"), counts, strict=True))
        body = {
            "id": "local",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": self.finish(prompt)}],
            "usage": usage | {"total_tokens": sum(counts)},
        }
        return 200, body, fault or "200"

    def show_ledger(self) -> dict:
        names = ("outcomes", "charged", "admitted", "latencies", "last_reply")
        return {name: getattr(self, name) for name in names}

    async def respond(self, head: str, data: bytes) -> tuple[int, dict, str]:
        if head.startswith("GET /ledger"):
            return 200, self.show_ledger(), "ledger"
        if "/v1/chat/completions " not in head.split("\r\n")[0]:
            return 404, NOT_FOUND, "404"
        lines = (line.split(": ", 1) for line in head.split("\r\n")[1:-2])
        self.headers.append({name.title(): value for name, value in lines})
        status, body, outcome = await self.answer(json.loads(data))
        self.outcomes[outcome] += 1
        self.last_reply = time.monotonic()
        return status, body, outcome

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode():
                _, _, length = head.lower().partition("content-length: ")
                data = await reader.readexactly(int(length.split("\r\n")[0] or 0))
                status, body, outcome = await self.respond(head, data)
                if outcome == "hang":
                    await asyncio.sleep(3600)
                answer = b"<html>oops</html>" if outcome == "garbage" else json.dumps(body).encode()
                retry = f"Retry-After: {self.retry_after}\r\n" if status == 429 else ""
                head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{retry}"
                writer.write(f"{head}Content-Length: {len(answer)}\r\n\r\n".encode())
                writer.write(answer[: len(answer) // 2] if outcome == "truncate" else answer)
                await writer.drain()
                if outcome == "truncate":
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client went away
        finally:
            writer.close()


def fault_share(text: str) -> tuple[str, float]:
    """NAME=SHARE, for argparse."""
    name, _, share = text.partition("=")
    if name not in FAULTS:
        raise ValueError
    return name, float(share)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--latency", type=float, default=0.0, help="mean seconds; half to one and a half of it")
    option("--cap", type=int, default=0, help="requests in any second; 0: no cap")
    option("--retry-after", default="1", help="sent with every 429")
    option("--reply-bytes", type=int, default=4000, help="length of a reply")
    faults = f"shares of {', '.join(FAULTS)}, e.g. 429=0.2 hang=0.01"
    option("--faults", nargs="*", type=fault_share, default=[], help=faults)
    args = parser.parse_args()
    text = "A reply. " * (args.reply_bytes // 9)
    options = {"latency": args.latency, "cap": args.cap, "retry_after": args.retry_after}
    endpoint = Endpoint(lambda prompt: text, faults=dict(args.faults), **options)
    print(endpoint.url, flush=True)
    endpoint.thread.join()


if __name__ == "__main__":
    run(main)
