"""What is known of a teacher's endpoint: its client, costs and context, what its answers say."""

import argparse
import math
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from common.cli import UserError, one_line, warn
from data_prep.teacher.prices import PRICES, load_prices
from data_prep.teacher.prices import teacher_terms as teacher_terms

if TYPE_CHECKING:
    from together import AsyncTogether

BYTES_A_TOKEN = 4  # of English text; the median of our documents is 4.3, by SmolLM2's tokenizer
OVERHEAD = 256  # tokens, at most, that an endpoint's chat template adds to a prompt
FATAL = {  # what is wrong with every request
    401: "the endpoint refuses the key ({reason}); check TOGETHER_API_KEY",
    402: "the endpoint wants payment ({reason})",
    404: "the endpoint does not know {model} ({reason}); check --model and TOGETHER_BASE_URL",
}


def make_client(args: argparse.Namespace, retries: int = 0) -> "AsyncTogether":
    """A client of the endpoint in the environment. Raises UserError if there is none, or no key."""
    base_url = os.environ.get("TOGETHER_BASE_URL") or None
    key = os.environ.get("TOGETHER_API_KEY")
    if not key and not base_url:
        raise UserError(
            "no teacher to ask: set TOGETHER_API_KEY to your key, or TOGETHER_BASE_URL "
            "to an OpenAI-compatible endpoint (without /v1)"
        )
    if base_url and base_url.rstrip("/").endswith("/v1"):
        raise UserError(f"TOGETHER_BASE_URL is {base_url}; leave out /v1, the client adds it")
    import httpx
    import together

    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    limits = httpx.Limits(max_connections=args.concurrency)
    http, timeout = together.DefaultAioHttpClient(limits=limits), httpx.Timeout(args.timeout)
    options = {"timeout": timeout, "max_retries": retries, "http_client": http}
    return together.AsyncTogether(api_key=key or "none", base_url=base_url, **options)


def error_message(error: Exception) -> str:
    """What the endpoint said, in one line."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message") if isinstance(inner, dict) else None
    return one_line(text or error.__cause__ or error, 200)


def is_refusal(status: int) -> bool:
    """Whether a status says that the same request will never be answered."""
    return 400 <= status < 500 and status not in (408, 409, 429)


def price_of(args: argparse.Namespace) -> dict:
    """`input` and `output` in dollars per million tokens, `context` in tokens, as far as known.

    Raises UserError for a budget that could not be held.
    """
    price = dict(load_prices().get(args.model, {}))
    if args.price:
        price |= dict(zip(("input", "output"), args.price, strict=True))
    if "input" not in price:
        unknown = f"no price for {args.model} in {PRICES.name}"
        if args.budget_usd is not None:
            raise UserError(f"{unknown}, so no budget can be held; pass --price IN OUT")
        warn(f"{unknown}: what this costs is not known here")
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


def fits_context(request: dict, price: dict, max_tokens: int) -> bool:
    """Whether prompt and reply fit the model's context, as far as it is known."""
    tokens = prompt_bytes(request) // BYTES_A_TOKEN + max_tokens
    return tokens <= price.get("context", math.inf)


def to_record(request: dict, body: dict, price: dict) -> dict:
    """The record of a reply, from the endpoint's JSON. Raises ValueError if it is no reply.

    An empty text (all tokens spent on thinking) is paid for and so kept.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage")
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        tokens = {k: int(usage[k]) if usage else 0 for k in ("prompt_tokens", "completion_tokens")}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"an answer that is no reply ({type(error).__name__})") from None
    return without_messages(request) | {
        "text": text,
        "finish_reason": reason,
        "usage": tokens,
        "cost_usd": cost_usd(*tokens.values(), price) if usage else None,
        "created": now(),
    }


def to_refusal(request: dict, reason: str) -> dict:
    """The record of a request that was refused for good."""
    return without_messages(request) | {"reason": reason, "created": now()}


def without_messages(request: dict) -> dict:
    """What of a request goes into the record of its reply, or of its refusal."""
    return {name: value for name, value in request.items() if name != "messages"}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
