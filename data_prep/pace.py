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
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path

from data_prep.records import read_records

SLOWEST = 0.5  # requests a second
LATENESS = 0.05  # seconds of delay that the pace makes up for
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "": 1}


def wanted_wait(headers: Mapping[str, str], now: float) -> float:
    """Seconds the endpoint asks to wait, 0 if it asks nothing that can be read; `now`: Unix time.

    From Retry-After (RFC 9110, 10.2.3), else from x-ratelimit-reset where nothing remains: seconds
    (Together), a duration like 6m0s (OpenAI), or a Unix time.
    """
    waits, after = [0.0], headers.get("retry-after", "")
    with suppress(ValueError):
        waits.append(float(after))
    with suppress(ValueError):
        waits.append(parsedate_to_datetime(after).timestamp() - now)
    for kind in ("", "-requests", "-tokens") if not after else ():
        if headers.get(f"x-ratelimit-remaining{kind}") in ("0", "0.0"):
            reset = re.findall(
                r"(\d+\.?\d*)(ms|[smh]?)", headers.get(f"x-ratelimit-reset{kind}", "")
            )
            seconds = sum(float(number) * UNITS[unit] for number, unit in reset)
            waits.append(seconds - now if seconds > 1e9 else seconds)
    return max(waits)


@dataclass
class Pace:
    """When the next request may go out, and how many may be in flight, shared by all of them.

    The rate, in requests a second, follows additive increase and multiplicative decrease (Chiu and
    Jain 1989): it doubles every quarter of a second until the first 429; each later one, at most
    one a moment, takes off 15%; it then climbs fast to just under where it was refused, and slowly
    on from there. A failure with no reply to anything sent since the one before is a strike: waits
    double and the number in flight halves, so a dead endpoint sees single requests. Server errors
    and timeouts are strikes alone, since they say nothing of our rate.
    """

    concurrency: int
    max_rate: float = math.inf
    refused_at: float = math.inf
    strikes: int = 0
    struck_at: float = -math.inf
    next_at: float = -math.inf
    last_at: float = -math.inf
    sent: deque = field(default_factory=deque)  # moments of the last second

    def __post_init__(self) -> None:
        self.rate = min(float(self.concurrency), self.max_rate)

    def room(self) -> int:
        return max(1, self.concurrency >> self.strikes)

    def wait(self) -> float:
        """Seconds until the next request may go out."""
        return self.next_at - time.monotonic()

    def go(self) -> float:
        """Count a request as sent; return the moment."""
        now = time.monotonic()
        if self.next_at > now - LATENESS:  # the pace, not the room in flight, held it back
            self._grow(min(now - self.last_at, 2 / self.rate))
        self.next_at = max(self.next_at, now - LATENESS) + 1 / self.rate
        self.last_at = now
        self.sent.append(now)
        while self.sent[0] < now - 1:
            self.sent.popleft()
        return now

    def _grow(self, seconds: float) -> None:
        if self.refused_at == math.inf:
            rate = self.rate * 16**seconds
        else:
            slope = 0.2 if self.rate < 0.95 * self.refused_at else 0.001
            rate = self.rate + slope * self.refused_at * seconds
        self.rate = min(rate, self.max_rate)

    def replied(self, sent_at: float) -> None:
        if sent_at > self.struck_at:
            self.strikes = 0

    def refused(self, sent_at: float, wanted: float) -> None:
        """A 429 came for what was sent at `sent_at`; the endpoint wants a wait, or 0."""
        if self._strike(sent_at):
            first = self.refused_at == math.inf
            self.refused_at = len(self.sent) if first else (self.refused_at + self.rate) / 2
            self.rate = max(SLOWEST, 0.85 * min(self.rate, self.refused_at))
            wanted = wanted or self._back_off()
        self._hold(wanted)

    def failed(self, sent_at: float, wanted: float) -> None:
        """A server error, a timeout or a broken answer came; one alone makes nobody wait."""
        if self._strike(sent_at) and self.strikes > 1:
            wanted = wanted or self._back_off()
        self._hold(wanted)

    def _strike(self, sent_at: float) -> bool:
        if sent_at <= self.struck_at:
            return False
        self.strikes, self.struck_at = self.strikes + 1, time.monotonic()
        return True

    def _back_off(self) -> float:
        return min(60, 2**self.strikes / 8) * random.uniform(0.5, 1.5)

    def _hold(self, seconds: float) -> None:
        if seconds > 0:  # a little longer, so that clients do not return as one
            until = time.monotonic() + seconds * random.uniform(1, 1.1)
            self.next_at = max(self.next_at, until)


class Purse:
    """Dollars spent, and those that the requests in flight can cost at most, under a ceiling.

    What no reply accounts for (in flight at a kill, timed out) is kept in a file beside the replies
    and counts as spent. A ceiling counts all that the folder's replies ever cost.
    """

    def __init__(self, path: Path, ceiling: float | None) -> None:
        self.ceiling = math.inf if ceiling is None else ceiling
        file = path.with_name(f".{path.stem}.unaccounted_usd")
        notes = {p: float(p.read_text() or 0) for p in path.parent.glob(".*.unaccounted_usd")}
        self.unaccounted, self.reserved = notes.get(file, 0.0), 0.0
        self.spent = sum(notes.values())
        for replies in path.parent.glob("*.jsonl"):
            self.spent += sum(reply.get("cost_usd") or 0 for reply in read_records(replies))
        for batch in path.parent.glob("*.batch.json"):  # under way: all that it can cost
            self.spent += json.loads(batch.read_text())["usd"]
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)

    def left(self) -> float:
        return self.ceiling - self.spent - self.reserved

    def reserve(self, dollars: float) -> bool:
        """Set the worst case of a request aside, unless that could pass the ceiling."""
        if dollars > self.left():
            return False
        self._note(dollars, 0.0)
        return True

    def settle(self, reserved: float, cost: float | None) -> None:
        """Give a reservation back; `cost` None: nobody knows what it cost, so all of it."""
        self.spent += reserved if cost is None else cost
        self._note(-reserved, reserved if cost is None else 0.0)

    def _note(self, reserved: float, unaccounted: float) -> None:
        self.reserved = max(0.0, self.reserved + reserved)
        self.unaccounted += unaccounted
        os.pwrite(self.descriptor, b"%20.9f\n" % (self.unaccounted + self.reserved), 0)
