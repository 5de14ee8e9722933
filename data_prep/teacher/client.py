"""What is known of a teacher's endpoint: its client, costs and terms, what its failures mean."""

import argparse
import asyncio
import ipaddress
import json
import math
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import yaml

from common.cli import UserError, one_line, warn
from data_prep.teacher.read_reply import (
    NoReply,
    clean,
    parse_body,
    read_reply,
    read_usage,
    words_in,
)

TEACHERS = Path(__file__).with_name("teachers.yaml")  # its comments say what each field is
PRICES: dict[str, dict] = yaml.safe_load(TEACHERS.read_text())  # by model
BYTES_A_TOKEN = 4  # of English text; the median of our documents is 4.3, by SmolLM2's tokenizer
REPLY_TOKENS = {2: 1100, 1: 250, 0: 150}  # of a reply with so many answers, 0: of a verdict, about
OVERHEAD = 256  # tokens, at most, that an endpoint's chat template adds to a prompt
TOGETHER = "https://api.together.ai/v1"
NO_TEACHER = "no teacher to ask; set TOGETHER_API_KEY, or TOGETHER_BASE_URL to another"
OURS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "n")

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


@dataclass(frozen=True)
class AskOptions:
    """How a teacher is asked; `sampling` are the fields of a request beside model and messages."""

    model: str
    sampling: dict
    max_tokens: int
    concurrency: int = 64
    max_rate: float | None = None
    budget_usd: float | None = None
    timeout: float = 300
    price: tuple[float, float] | None = None
    base_url: str | None = None
    batch: bool = False
    poll_seconds: float = 30
    retry_refused: bool = False
    retry_unusable: bool = False
    also_whole: tuple[str, ...] = ()
    cut_counts: bool = False


def ask_options(args: argparse.Namespace, cut_counts: bool = False) -> AskOptions:
    """The options of a command line with `teacher_options`, or of one with some of them."""
    given = vars(args)
    names = AskOptions.__dataclass_fields__.keys() - {"sampling", "also_whole", "cut_counts"}
    extra, limit = given.get("extra_body") or {}, given.get("max_tokens_field", "max_tokens")
    if limit in extra or limit in ("", "temperature", "model", "messages", "stream", "n"):
        # What a request costs at most is reckoned from --max-tokens.
        raise UserError(f"--max-tokens-field {limit!r} is another field, or is in --extra-body too")
    sampling = {limit: args.max_tokens, "temperature": args.temperature} | extra
    return AskOptions(
        **{name: given[name] for name in names if name in given},
        sampling={name: value for name, value in sampling.items() if value is not None},
        also_whole=tuple(given.get("also_whole") or ()),
        cut_counts=cut_counts,
    )


def json_object(text: str) -> dict:
    """Fields of a request, for argparse; those that have options of their own are refused."""
    try:
        found = json.loads(text)
        json.dumps(found, allow_nan=False)  # NaN, which no endpoint takes, is no JSON
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError('a JSON object is wanted, such as {"top_p": 0.9}')
    if ours := ", ".join(name for name in OURS if name in found):
        raise argparse.ArgumentTypeError(f"{ours}: there is another option for it, or none")
    return found


def endpoint_url(base_url: str | None = None) -> str:
    """The address to which `/chat/completions` is added: `base_url` as it is, or
    TOGETHER_BASE_URL with /v1 where it lacks that, or Together's. Raises UserError."""
    set_there = os.environ.get("TOGETHER_BASE_URL")
    url, name = base_url, "--base-url"
    if not base_url and set_there:
        url, name = set_there.rstrip("/").removesuffix("/v1") + "/v1", "TOGETHER_BASE_URL"
    url = (url or TOGETHER).rstrip("/")
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        (parts.hostname or "").encode("idna")  # UnicodeError, a ValueError: no name of a host
    except ValueError:
        is_address = False
    if not is_address or not url.isprintable() or " " in url:
        raise UserError(f"{name} {clean(url)!r} is no address such as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        hint = "the key goes into TOGETHER_API_KEY, and no ? or # can stand in it"
        raise UserError(f"{name} is an address with more than host and path: {hint}")
    return url


def is_own(url: str) -> bool:
    """Whether an endpoint is on this machine or network, and so costs nothing that we know of."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return host == "localhost" or host.endswith((".localhost", ".local")) or "." not in host


def make_client(options: AskOptions, retries: int = 0):
    """A client of the endpoint. Raises UserError if there is none, or no key."""
    import httpx
    import together

    key, url = os.environ.get("TOGETHER_API_KEY"), endpoint_url(options.base_url)
    if not key and url == TOGETHER:
        raise UserError(NO_TEACHER)
    if key and not (key.isascii() and key.isprintable()):
        raise UserError("TOGETHER_API_KEY holds characters that no key has; set it again")
    if options.batch and not url.endswith("/v1"):
        raise UserError(f"--batch is for Together's API, which {url} is not")
    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    limits = httpx.Limits(max_connections=options.concurrency)
    return together.AsyncTogether(
        api_key=key or "none",
        base_url=url.removesuffix("/v1"),  # the client adds it, for files and batches
        timeout=options.timeout,
        max_retries=retries,
        http_client=together.DefaultAioHttpClient(limits=limits),
    )


async def post(endpoint, url: str, body: dict) -> bytes:
    """The endpoint's answer to a request. Raises what the client raises."""
    import httpx
    import together

    for tries_left in (2, 1, 0):
        try:
            answer = await endpoint.post(
                url, cast_to=httpx.Response, body=body, options={"follow_redirects": False}
            )
            return answer.content
        except together.APIStatusError as error:
            # 307 and 308 say to send the same again. Any other redirect would turn the request
            # into a GET, and what answers that has never seen the prompt.
            there = urljoin(url, error.response.headers.get("location", ""))
            is_same_host = urlsplit(there).hostname == urlsplit(url).hostname
            if error.status_code not in (307, 308) or not is_same_host or not tries_left:
                raise
            url = there


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


# Of aiohttp and httpx: no byte of the request can have left this machine, or none was taken.
NEVER_SENT = {
    *("ClientConnectorError", "ClientConnectorDNSError", "ClientConnectorCertificateError"),
    *("ClientConnectorSSLError", "ConnectionTimeoutError", "InvalidURL", "InvalidUrlClientError"),
    *("NonHttpUrlClientError", "UnsupportedProtocol", "UnicodeEncodeError", "LocalProtocolError"),
    *("gaierror", "ConnectionRefusedError", "ClientProxyConnectionError"),
}


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


def teacher_terms(model: str) -> str:
    """What a card says of the model's terms on what it writes."""
    return PRICES.get(model, {}).get("outputs", "See the model's licence and the provider's terms.")


def price_of(model: str, given: tuple[float, float] | None, batch: bool = False) -> dict:
    """`input` and `output` in dollars per million tokens, if known, with what else is known."""
    price = dict(PRICES.get(model, {}))
    if given:
        price["input"], price["output"] = given
    if batch and "input" in price:
        price |= {k: price[k] * price.get("batch", 1) for k in ("input", "output")}
    return price


def ceiling_of(budget_usd: float | None) -> float | None:
    """--budget-usd, or BUDGET_USD of the environment, None if neither. Raises UserError."""
    given = os.environ.get("BUDGET_USD", "")
    if budget_usd is not None or not given.strip():
        return budget_usd
    try:
        budget = float(given)
    except ValueError:
        budget = math.nan
    if not 0 <= budget < math.inf:
        raise UserError(f"BUDGET_USD={given} is no number of dollars")
    return budget


def is_free(price: dict) -> bool:
    return price.get("input") == 0 and price.get("output") == 0


def check_ceiling(options: AskOptions, price: dict, estimate: float | None = None) -> None:
    """Refuse to ask what costs money without a ceiling. Raises UserError that says what to pass."""
    ceiling = ceiling_of(options.budget_usd)
    if "input" not in price:
        unknown = f"{TEACHERS.name} has no price of {options.model}"
        if options.budget_usd is not None or not is_own(endpoint_url(options.base_url)):
            hint = "pass --price IN OUT, in $ per million tokens (0 0 if it costs nothing)"
            raise UserError(f"{unknown}; {hint}")
        warn(f"{unknown}: what this costs is not known here")
    elif ceiling is None and not is_free(price):
        about = "" if estimate is None else f" (about ${estimate:,.2f}, see `just plan`)"
        own = ", or --price 0 0" if is_own(endpoint_url(options.base_url)) else ""
        raise UserError(f"asking {options.model} costs money{about}: pass --budget-usd, or set "
                        f"BUDGET_USD, as a ceiling{own}")  # fmt: skip


def estimate_usd(requests: list[dict], price: dict) -> float | None:
    """About what the replies cost, as `just plan` says; None where no price is known."""
    tokens_in = sum(map(prompt_bytes, requests)) / BYTES_A_TOKEN
    reasoning = price.get("reasoning", 0)
    tokens_out = sum(REPLY_TOKENS.get(r.get("answers", 0), 0) + reasoning for r in requests)
    return cost_usd(tokens_in, tokens_out, price)


def cost_usd(tokens_in: float, tokens_out: float, price: dict) -> float | None:
    """Dollars for so many tokens; None where no price is known."""
    if "input" not in price:
        return None
    return (tokens_in * price["input"] + tokens_out * price["output"]) / 1e6


def prompt_bytes(request: dict) -> int:
    return sum(len(message["content"].encode()) for message in request.get("messages", ()))


def worst_case_usd(request: dict, price: dict, max_tokens: int) -> float:
    """What a request can cost at most: byte-level tokenizers make no more tokens than bytes."""
    if "worst_usd" in request:  # of a batch, which does not keep the messages
        return request["worst_usd"]
    return cost_usd(prompt_bytes(request) + OVERHEAD, max_tokens, price) or 0.0


def to_record(request: dict, **found: object) -> dict:
    """What became of a request: all of it but its messages, with what was found."""
    left_out = ("messages", "worst_usd")
    record = {name: value for name, value in request.items() if name not in left_out}
    return record | clean(found) | {"created": datetime.now(UTC).isoformat(timespec="seconds")}


def to_reply(request: dict, body: object, price: dict, options: AskOptions) -> dict:
    """The record of a reply, whole or `unusable`, from the endpoint's JSON. Raises NoReply."""
    reply, usage = read_reply(body, options.also_whole, options.cut_counts), read_usage(body)
    if usage and reply.text.strip() and not usage["completion_tokens"]:
        usage = None  # words from no tokens
    found = {"text": reply.text, "finish_reason": reply.finish_reason}
    found["usage"] = usage and {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens")
    }
    found["cost_usd"] = usage_cost(request, usage, price, options.max_tokens)
    if reply.unusable:
        found["unusable"] = reply.unusable
    return to_record(request, **found)


def usage_cost(request: dict, usage: dict | None, price: dict, max_tokens: int) -> float | None:
    """What an answer cost by its `usage`, at worst where that is None; None: no price is known."""
    if "input" not in price:
        return None
    if usage is None:
        return worst_case_usd(request, price, max_tokens)
    return cost_usd(usage["prompt_tokens"], usage["billed_tokens"], price)


def no_reply_cost(request: dict, body: object, price: dict, max_tokens: int) -> float | None:
    """What an answer cost that is no reply; None where nobody knows."""
    usage = read_usage(body)
    if usage:
        return usage_cost(request, usage, price, max_tokens)
    is_error = isinstance(body, dict) and body.get("error") and not body.get("choices")
    return 0.0 if is_error else None  # it says itself that nothing was made
