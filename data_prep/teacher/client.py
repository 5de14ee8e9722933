"""What is known of a teacher's endpoint: its client, costs and terms, what its answers say."""

import argparse
import os
from datetime import UTC, datetime
from pathlib import Path

import yaml

from common.cli import UserError, one_line, warn

TEACHERS = Path(__file__).with_name("teachers.yaml")  # its comments say what each field is
PRICES: dict[str, dict] = yaml.safe_load(TEACHERS.read_text())  # by model
BYTES_A_TOKEN = 4  # of English text; the median of our documents is 4.3, by SmolLM2's tokenizer
OVERHEAD = 256  # tokens, at most, that an endpoint's chat template adds to a prompt
OPTIONS = ("model", "max_tokens", "temperature")  # of a request, by the names of our own
BUSY = (429, 503)  # the endpoint wants fewer requests; nothing was made
FATAL = {  # what is wrong with every request
    401: "the endpoint refuses the key ({reason}); check TOGETHER_API_KEY",
    402: "the endpoint wants payment ({reason})",
    404: "the endpoint does not know {model} ({reason}); check --model and TOGETHER_BASE_URL",
}


def make_client(args: argparse.Namespace, retries: int = 0):
    """A client of the endpoint in the environment. Raises UserError if there is none, or no key."""
    import httpx
    import together

    url, key = os.environ.get("TOGETHER_BASE_URL"), os.environ.get("TOGETHER_API_KEY")
    if not key and not url:
        raise UserError("no teacher to ask; set TOGETHER_API_KEY, or TOGETHER_BASE_URL to another")
    url = url and url.rstrip("/").removesuffix("/v1")  # the client adds it
    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    http = together.DefaultAioHttpClient(limits=httpx.Limits(max_connections=args.concurrency))
    options = {"timeout": args.timeout, "max_retries": retries, "http_client": http}
    return together.AsyncTogether(api_key=key or "none", base_url=url or None, **options)


def reason_in(error: object) -> str:
    """What the endpoint said, in one line; `error` is the body of its answer, or an exception."""
    found = getattr(error, "body", error)
    while isinstance(found, dict):
        found = found.get("error") or found.get("message")
    return one_line(found or getattr(error, "__cause__", None) or error, 200)


def retry_after(error: Exception) -> float:
    """Seconds that the endpoint asks to wait (RFC 9110, 10.2.3), 600 at most; 0 if none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        return min(max(0.0, float(headers.get("retry-after", 0))), 600)
    except ValueError:
        return 0.0


def is_refusal(status: int) -> bool:
    """Whether a status says that the same request will never be answered."""
    return 400 <= status < 500 and status not in (408, 409, 429)


def teacher_terms(model: str) -> str:
    """What a card says of the model's terms on what it writes."""
    return PRICES.get(model, {}).get("outputs", "See the model's licence and the provider's terms.")


def price_of(args: argparse.Namespace) -> dict:
    """`input` and `output`, if known. Raises UserError for a budget that could not be held."""
    price = dict(PRICES.get(args.model, {}))
    if args.price:
        price["input"], price["output"] = args.price
    if "input" not in price:
        unknown = f"{TEACHERS.name} has no price of {args.model}"
        if args.budget_usd is not None:
            raise UserError(f"{unknown}; for a budget pass --price IN OUT")
        warn(f"{unknown}: what this costs is not known here")
    elif args.batch:
        price |= {k: price[k] * price.get("batch", 1) for k in ("input", "output")}
    return price


def cost_usd(tokens_in: float, tokens_out: float, price: dict) -> float | None:
    """Dollars for so many tokens; None where no price is known."""
    if "input" not in price:
        return None
    return (tokens_in * price["input"] + tokens_out * price["output"]) / 1e6


def prompt_bytes(request: dict) -> int:
    return sum(len(message["content"].encode()) for message in request["messages"])


def worst_case_usd(request: dict, price: dict, max_tokens: int) -> float:
    """What a request can cost at most: byte-level tokenizers make no more tokens than bytes."""
    return cost_usd(prompt_bytes(request) + OVERHEAD, max_tokens, price) or 0.0


def to_record(request: dict, **found: object) -> dict:
    """What became of a request: all of it but its messages, with what was found."""
    record = {name: value for name, value in request.items() if name != "messages"}
    return record | found | {"created": datetime.now(UTC).isoformat(timespec="seconds")}


def to_reply(request: dict, body: dict, price: dict) -> dict:
    """The record of a reply, from the endpoint's JSON. Raises ValueError if it is no reply."""
    try:
        choice, usage = body["choices"][0], body.get("usage")
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        tokens = {k: int(usage[k]) if usage else 0 for k in ("prompt_tokens", "completion_tokens")}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"an answer that is no reply ({type(error).__name__})") from None
    cost = cost_usd(*tokens.values(), price) if usage else None
    return to_record(request, text=text, finish_reason=reason, usage=tokens, cost_usd=cost)
