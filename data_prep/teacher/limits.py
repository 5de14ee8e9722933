"""How fast an endpoint may be asked, and for how much money."""

import fcntl
import json
import math
import os
import random
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

from common.files import read_records

SLOWEST = 0.5  # requests a second
DECREASE = 0.95  # of the rate, at a 429
INCREASE = 0.001  # requests a second, at each reply: what a 429 took is back in some 50 seconds
LATENESS = 0.02  # seconds of delay that are made up for


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the endpoint asks to wait (RFC 9110, 10.2.3), 0 if it asks nothing readable."""
    text = headers.get("retry-after", "")
    with suppress(ValueError):
        return max(0.0, float(text))
    with suppress(ValueError, OverflowError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


class RateLimiter:
    """When the next request may go out, and how many may be in flight, shared by all of them.

    Additive increase, multiplicative decrease (Chiu and Jain 1989), as in TCP: each reply adds one
    request a second until the first 429 (slow start) and a little afterwards; a 429 takes a
    part off the rate that was really sent. A failure that is not about the rate (a server error, a
    timeout) leaves it. When moment after moment brings no reply, waits double and the number in
    flight halves, so that a dead endpoint sees few requests.
    """

    def __init__(self, concurrency: int, max_rate: float | None = None) -> None:
        self.concurrency, self.max_rate = concurrency, max_rate or math.inf
        self.rate, self.increase = min(float(concurrency), self.max_rate), 1.0
        self.failures = 0  # moments in a row that brought a failure and no reply
        self.failed_at = self.next_at = -math.inf
        self.last_second: deque[float] = deque()  # when requests were sent in it

    def room(self) -> int:
        """How many requests may be in flight."""
        return max(1, self.concurrency >> self.failures)

    def wait(self) -> float:
        """Seconds until the next request may go out."""
        return self.next_at - time.monotonic()

    def sent(self) -> float:
        """Count a request as sent; return the moment."""
        now = time.monotonic()
        self.next_at = max(self.next_at, now - LATENESS) + 1 / self.rate
        self.last_second.append(now)
        while self.last_second[0] < now - 1:
            self.last_second.popleft()
        return now

    def replied(self, sent_at: float) -> None:
        """A reply came to what was sent at `sent_at`."""
        self.rate = min(self.rate + self.increase, self.max_rate)
        if sent_at > self.failed_at:
            self.failures = 0

    def refused(self, sent_at: float, asked: float) -> None:
        """A 429 came for what was sent at `sent_at`; the endpoint asks for a wait, or 0."""
        if self._is_new(sent_at):
            self.increase = INCREASE
            self.rate = max(SLOWEST, DECREASE * min(self.rate, len(self.last_second)))
            asked = asked or self._backoff()
        self._pause(asked)

    def failed(self, sent_at: float, asked: float) -> None:
        """A server error, a timeout or a broken answer came; one alone makes nobody wait."""
        if self._is_new(sent_at) and self.failures > 1:
            asked = asked or self._backoff()
        self._pause(asked)

    def _is_new(self, sent_at: float) -> bool:
        """Count a failure, unless it was sent before the last one and so tells nothing new."""
        new = sent_at > self.failed_at
        if new:
            self.failures, self.failed_at = self.failures + 1, time.monotonic()
        return new

    def _backoff(self) -> float:
        return min(60, 2**self.failures / 8) * random.uniform(0.5, 1.5)

    def _pause(self, seconds: float) -> None:
        """Send nothing for so long, and never quite as long as others who are told the same."""
        if seconds:
            self.next_at = max(self.next_at, time.monotonic() + seconds * random.uniform(1, 1.1))


class Budget:
    """A ceiling on the dollars that one folder's replies and batches ever cost.

    The sum stands in the folder's .spent_usd and is changed under a lock, so it holds over all
    processes that write there. The worst case of a request is reserved before it goes out; what a
    kill leaves in flight stays reserved, and so counts as spent.
    """

    def __init__(self, folder: Path, ceiling: float | None) -> None:
        self.ceiling = math.inf if ceiling is None else ceiling
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(folder / ".spent_usd", os.O_RDWR | os.O_CREAT, 0o644)
        self.reserved = 0.0  # by this process
        with self._locked() as spent:
            if spent is None:
                self._write(spent_before(folder))

    def spent(self) -> float:
        """What all processes spent, with the worst cases that the others have in flight."""
        with self._locked() as spent:
            return spent - self.reserved

    def left(self) -> float:
        return self.ceiling - self.spent() - self.reserved

    def reserve(self, usd: float) -> bool:
        """Set the worst case of a request aside, unless that would pass the ceiling."""
        with self._locked() as spent:
            fits = spent + usd <= self.ceiling
            if fits:
                self._write(spent + usd)
                self.reserved += usd
        return fits

    def settle(self, reserved: float, cost: float | None) -> None:
        """Put what a request cost in place of what was reserved; None: nobody knows, so all."""
        with self._locked() as spent:
            self._write(spent if cost is None else max(0.0, spent - reserved + cost))
            self.reserved -= reserved

    @contextmanager
    def _locked(self) -> Iterator[float | None]:
        """The sum on disk, None if there is none yet; nobody else changes it meanwhile."""
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)
        try:
            text = os.pread(self.descriptor, 99, 0).strip()
            yield float(text) if text else None
        finally:
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)

    def _write(self, usd: float) -> None:
        os.pwrite(self.descriptor, b"%20.9f\n" % usd, 0)  # always as long, so whole or not at all


def spent_before(folder: Path) -> float:
    """What a folder has cost that has no sum yet: replies, batches under way, notes of old."""
    replies = (reply for file in folder.glob("*.jsonl") for reply in read_records(file))
    batches = (json.loads(file.read_text()) for file in folder.glob("*.batch.json"))
    notes = (float(file.read_text() or 0) for file in folder.glob(".*.unaccounted_usd"))
    costs = (reply.get("cost_usd") or 0 for reply in replies)
    return sum(costs) + sum(batch["usd"] for batch in batches) + sum(notes)
