"""How fast an endpoint may be asked, and for how much money."""

import fcntl
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, one_line
from common.files import read_records

SLOWEST = 0.5  # requests a second
DECREASE = 0.95  # of the rate, when told to slow down
INCREASE = 0.001  # requests a second, at each reply, shortly after that
PROBING = 30  # seconds until the increase has doubled; it grows as in CUBIC (Ha et al. 2008)
BACKOFF = 1 / 8  # seconds; doubled at each failure in a row
LONGEST_PAUSE = 600  # seconds; of an endpoint that is down while others go on
LATENESS = 0.02  # seconds of delay that are made up for


class RateLimiter:
    """When the next request may go out, by additive increase and multiplicative decrease.

    Chiu and Jain 1989, as in TCP: each reply adds to the rate, the more the longer ago the last
    failure was; a 429 takes a part off the rate that was really sent. Then all wait as long as the
    endpoint asks, or longer from one failure to the next.
    """

    def __init__(self, rate: float, max_rate: float | None = None) -> None:
        self.max_rate = max_rate or math.inf
        self.rate, self.failures = min(rate, self.max_rate), 0  # moments in a row without a reply
        self.failed_at = self.next_at = -math.inf
        self.last_second: deque[float] = deque()  # when requests were sent in it

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

    def replied(self) -> None:
        quiet = time.monotonic() - self.failed_at
        increase = min(1.0, INCREASE * (1 + (quiet / PROBING) ** 2))
        self.rate, self.failures = min(self.rate + increase, self.max_rate), 0

    def failed(self, sent_at: float, asked: float, busy: bool, counts: bool = True) -> None:
        """Slow down for a request that was sent at `sent_at` and failed.

        `asked`: seconds that the endpoint asks to wait. `busy`: it was too fast (a 429), so the
        rate falls. Without `counts` the request itself is at fault, which tells nothing of the
        endpoint.
        """
        if counts and sent_at > self.failed_at:  # else it tells nothing new
            self.failures, self.failed_at = self.failures + 1, time.monotonic()
            if busy:
                self.rate = max(SLOWEST, DECREASE * min(self.rate, len(self.last_second)))
            if busy or self.failures > 1:  # one server error alone makes nobody wait
                asked = max(asked, min(BACKOFF * 2**self.failures, LONGEST_PAUSE))
        pause = asked * random.uniform(1, 1.1)  # never quite as long as others are told
        self.next_at = max(self.next_at, time.monotonic() + pause)


@dataclass
class Total:
    """The sum in a folder's file while it is changed."""

    usd: float


class Budget:
    """A ceiling on the dollars that one folder's replies and batches ever cost.

    The sum stands in the folder's .spent_usd and is changed under a lock, so it holds over all
    processes that write there. The worst case of a request is reserved before it goes out; what a
    kill leaves in flight stays reserved, and so counts as spent. Raises UserError where the file
    holds no sum.
    """

    def __init__(self, folder: Path, ceiling: float | None) -> None:
        self.folder, self.ceiling = folder, math.inf if ceiling is None else ceiling
        self.spent = 0.0  # by all runs, as last seen
        self.in_flight = 0.0  # reserved by this run, and in no record yet
        with self._locked_total():
            pass

    def reserve(self, usd: float) -> bool:
        """Set the worst case of a request aside; False if that would pass the ceiling."""
        with self._locked_total() as total:
            if total.usd + usd > self.ceiling:
                return False
            total.usd += usd
            self.in_flight += usd
            return True

    def settle(self, reserved: float, cost: float) -> None:
        """Put what a request cost in place of what was reserved for it."""
        with self._locked_total() as total:
            total.usd += cost - reserved
            self.in_flight = max(0.0, self.in_flight - reserved)

    @contextmanager
    def _locked_total(self) -> Iterator[Total]:
        """The sum, `usd`, to be changed; nobody else reads or writes it meanwhile."""
        path = self.folder / ".spent_usd"
        path.touch()
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            total = Total(self._read(path, file.read()))
            yield total
            # Settling takes back what was reserved, unless somebody lowered the sum by hand.
            self.spent = max(0.0, total.usd)
            file.seek(0)
            file.write(b"%20.9f\n" % self.spent)  # always as long, so whole or not at all

    def _read(self, path: Path, content: bytes) -> float:
        """Dollars by the file's content; where it is empty, as after it was deleted, what the
        folder's records cost and what is in flight."""
        if not content.strip():
            return sum(self._costs()) + self.in_flight
        try:
            usd = float(content)
        except ValueError:
            usd = math.nan
        if not 0 <= usd < math.inf:
            said = one_line(content.decode("utf-8", "replace"), 40)
            hint = (
                "write the dollars spent into it, or delete it: they are counted from the replies"
            )
            raise UserError(f"{path} holds no sum of dollars but {said!r}; {hint}")
        return usd

    def _costs(self) -> Iterator[float]:
        for table in self.folder.glob("*.jsonl"):
            for record in read_records(table):
                cost = record.get("cost_usd")
                if isinstance(cost, int | float) and 0 <= cost < math.inf:
                    yield cost
