"""What the failures of a teacher's endpoint mean, for the request and for the others."""

import asyncio
import math
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from data_prep.teacher.read_reply import NoReply, parse_body, words_in

BUSY = (429, 503, 529)  # the endpoint wants fewer requests; nothing was made
# Behind these a gateway lost the answer of the endpoint, which may have made and charged it.
LOST = (502, 504, 520, 522, 524)
ABOUT_THE_TEXT = (400, 413, 422, 451)  # if the endpoint itself says so, in JSON
FATAL = {  # what is wrong with every request
    401: "the endpoint refuses the key ({reason}); check TOGETHER_API_KEY",
    402: "the endpoint wants payment ({reason})",
    404: "the endpoint does not know {model} ({reason}); check --model and TOGETHER_BASE_URL",
}
# Nothing was ever answered, so a 403 is about the account or a gateway; later it may be a text's.
FORBIDDEN = "the endpoint forbids it ({reason}); check the key, the account and the address"
# Of aiohttp and httpx: no byte of the request can have left this machine, or none was taken.
NEVER_SENT = {
    "ClientConnectorError",
    "ClientConnectorDNSError",
    "ClientConnectorCertificateError",
    "ClientConnectorSSLError",
    "ConnectionTimeoutError",
    "InvalidURL",
    "InvalidUrlClientError",
    "NonHttpUrlClientError",
    "UnsupportedProtocol",
    "UnicodeEncodeError",
    "LocalProtocolError",
    "gaierror",
    "ConnectionRefusedError",
    "ClientProxyConnectionError",
}


@dataclass(frozen=True)
class Failure:
    """Why a request has no reply, and what that means for it and for the others."""

    words: str  # the endpoint's own, in one line
    kind: str  # failures of one kind are alike
    cost_usd: float | None = 0.0  # None where nobody knows
    status: int = 0
    wait: float = 0.0  # seconds that the endpoint asks for
    is_refusal: bool = False  # of this text, for good
    may_be_the_text: bool = False

    @property
    def busy(self) -> bool:
        return self.status in BUSY


def read_failure(error: Exception) -> Failure:
    """What an exception of `post`, or NoReply of what it returned, means."""
    if getattr(error, "response", None) is not None:
        return _read_status(error)
    if isinstance(error, NoReply):
        return Failure(str(error), "no reply", None, may_be_the_text=True)
    causes = _causes(error)
    first = causes[-1]
    words = words_in(str(first)) or type(first).__name__
    if NEVER_SENT & {type(cause).__name__ for cause in causes}:
        return Failure(words, "not reached")
    # By what it came from: httpx calls a connection that was lost a timeout too.
    is_late = isinstance(first, TimeoutError | asyncio.CancelledError)
    if is_late or "Timeout" in type(first).__name__:
        return Failure("no answer in time (--timeout)", "timeout", None, may_be_the_text=True)
    return Failure(words, type(first).__name__, None, may_be_the_text=True)


def _causes(error: BaseException) -> list[BaseException]:
    """The exception and those that it came from, the first one last."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) and cause not in causes:
        causes.append(cause)
    return causes


def _read_status(error: Exception) -> Failure:
    """What an answer with a status of failure means."""
    response = error.response
    status, content = response.status_code, response.content
    try:
        body, is_json = parse_body(content), True
    except NoReply:
        body, is_json = content.decode("utf-8", "replace"), False
    words = words_in(body) or words_in(response.headers.get("location")) or "no words"
    if status not in FATAL:
        words = words if is_json and status in ABOUT_THE_TEXT else f"HTTP {status}: {words}"
    return Failure(
        words,
        kind=f"HTTP {status}",
        cost_usd=None if status in LOST else 0.0,  # an error is no completion, and not charged
        status=status,
        wait=retry_after(error),
        is_refusal=is_json and status in ABOUT_THE_TEXT,
        may_be_the_text=status not in (*BUSY, *LOST, *FATAL, 408, 409, 425),
    )


def retry_after(error: Exception) -> float:
    """Seconds that the endpoint asks to wait (RFC 9110, 10.2.3), 600 at most; 0 if none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    asked = headers.get("retry-after", "0")
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, OverflowError):
            seconds = 0.0
    return min(max(0.0, seconds), 600) if math.isfinite(seconds) else 0.0
