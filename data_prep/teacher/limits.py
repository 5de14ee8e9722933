"""How fast an endpoint may be asked and for how much money: one pace and one purse for all."""

import json
import math
import os
import random
import re
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

from common.files import read_records

SLOWEST = 0.5  # requests a second
LATENESS = 0.02  # seconds of delay that the pace makes up for
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "": 1}


def wanted_wait(headers: Mapping[str, str], now: float) -> float:
    """Seconds the endpoint asks to wait, 0 if it asks nothing that can be read; `now`: Unix time.

    From Retry-After (RFC 9110, 10.2.3), else from x-ratelimit-reset where nothing remains: seconds
    (Together), a duration like 6m0s (OpenAI), or a Unix time.
    """
    waits, after = [0.0], headers.get("retry-after", "")
    with suppress(ValueError):
        waits.append(float(after))
    with suppress(ValueError, OverflowError):
        waits.append(parsedate_to_datetime(after).timestamp() - now)
    for kind in ("", "-requests", "-tokens") if not after else ():
        if headers.get(f"x-ratelimit-remaining{kind}") in ("0", "0.0"):
            reset = headers.get(f"x-ratelimit-reset{kind}", "")
            parts = re.findall(r"(\d+\.?\d*)(ms|[smh]?)", reset)
            seconds = sum(float(number) * UNITS[unit] for number, unit in parts)
            waits.append(seconds - now if seconds > 1e9 else seconds)
    return max(waits)


class Pace:
    """When the next request may go out, and how many may be in flight, shared by all of them.

    The rate, in requests a second, follows additive increase and multiplicative decrease (Chiu and
    Jain 1989): it doubles every quarter of a second until the first 429; each later one, at most
    one a moment, takes off 15%; it then climbs fast to just under where it was refused, and on from
    there slowly at first. A failure with no reply to anything sent since the one before is a
    strike: waits double and the number in flight halves, so a dead endpoint sees single requests.
    Server errors and timeouts are strikes alone, since they say nothing of our rate.
    """

    def __init__(self, concurrency: int, max_rate: float = math.inf) -> None:
        self.concurrency, self.max_rate = concurrency, max_rate
        self.rate, self.refused_at = min(float(concurrency), max_rate), math.inf
        self.strikes, self.struck_at = 0, -math.inf
        self.next_at = self.last_at = -math.inf
        self.sent: deque[float] = deque()  # moments of the last second

    def room(self) -> int:
        return max(1, self.concurrency >> self.strikes)

    def wait(self) -> float:
        """Seconds until the next request may go out."""
        return self.next_at - time.monotonic()

    def go(self) -> float:
        """Count a request as sent; return the moment."""
        now = time.monotonic()
        if self.next_at > now - LATENESS:  # the pace, not the room in flight, held it back
            self._grow(min(now - self.last_at, 2 / self.rate), now - self.struck_at)
        self.next_at = max(self.next_at, now - LATENESS) + 1 / self.rate
        self.last_at = now
        self.sent.append(now)
        while self.sent[0] < now - 1:
            self.sent.popleft()
        return now

    def _grow(self, seconds: float, quiet: float) -> None:
        slope = 0.2 if self.rate < 0.95 * self.refused_at else 5e-5 * quiet
        first = self.refused_at == math.inf
        more = self.rate * (16**seconds - 1) if first else slope * self.refused_at * seconds
        self.rate = min(self.rate + more, self.max_rate)

    def replied(self, sent_at: float) -> None:
        if sent_at > self.struck_at:
            self.strikes = 0

    def refused(self, sent_at: float, wanted: float) -> None:
        """A 429 came for what was sent at `sent_at`; the endpoint wants a wait, or 0."""
        new = self._strike(sent_at)
        if new:
            known = 0.25 * self.refused_at + 0.75 * self.rate  # a 429 can come for other reasons
            self.refused_at = known if known < math.inf else 0.95 * len(self.sent)
            self.rate = max(SLOWEST, 0.85 * min(self.rate, self.refused_at))
        else:
            self.refused_at = max(SLOWEST, self.refused_at - 0.95)  # one more that was not taken
        self._hold(wanted, new)

    def failed(self, sent_at: float, wanted: float) -> None:
        """A server error, a timeout or a broken answer came; one alone makes nobody wait."""
        self._hold(wanted, self._strike(sent_at) and self.strikes > 1)

    def _strike(self, sent_at: float) -> bool:
        new = sent_at > self.struck_at
        if new:
            self.strikes, self.struck_at = self.strikes + 1, time.monotonic()
        return new

    def _hold(self, wanted: float, back_off: bool) -> None:
        """Send nothing for as long as wanted, or back off; never quite as long as others do."""
        if not wanted and back_off:
            wanted = min(60, 2**self.strikes / 8) * random.uniform(0.5, 1.5)
        if wanted:
            self.next_at = max(self.next_at, time.monotonic() + wanted * random.uniform(1, 1.1))


class Purse:
    """Dollars spent, and those that the requests in flight can cost at most, under a ceiling.

    What no reply accounts for (in flight at a kill, timed out) is kept in a file beside the replies
    and counts as spent. The ceiling is for all that the folder's replies and batches ever cost.
    """

    def __init__(self, path: Path, ceiling: float | None) -> None:
        self.ceiling, folder = math.inf if ceiling is None else ceiling, path.parent
        note = path.with_name(f".{path.stem}.unaccounted_usd")
        notes = {file: float(file.read_text() or 0) for file in folder.glob(".*.unaccounted_usd")}
        replies = (reply for file in folder.glob("*.jsonl") for reply in read_records(file))
        batches = (json.loads(file.read_text())["usd"] for file in folder.glob("*.batch.json"))
        self.spent = sum(reply.get("cost_usd") or 0 for reply in replies)
        self.spent += sum(notes.values()) + sum(batches)
        self.unaccounted, self.reserved = notes.get(note, 0.0), 0.0
        self.descriptor = os.open(note, os.O_RDWR | os.O_CREAT, 0o644)

    def left(self) -> float:
        return self.ceiling - self.spent - self.reserved

    def reserve(self, dollars: float) -> bool:
        """Set the worst case of a request aside, unless that could pass the ceiling."""
        fits = dollars <= self.left()
        if fits:
            self._note(dollars, 0.0)
        return fits

    def settle(self, reserved: float, cost: float | None) -> None:
        """Give a reservation back; `cost` None: nobody knows what it cost, so all of it."""
        self.spent += reserved if cost is None else cost
        self._note(-reserved, reserved if cost is None else 0.0)

    def _note(self, reserved: float, unaccounted: float) -> None:
        self.reserved = max(0.0, self.reserved + reserved)
        self.unaccounted += unaccounted
        os.pwrite(self.descriptor, b"%20.9f\n" % (self.unaccounted + self.reserved), 0)
