"""What is known of a teacher's endpoint: its client, prices and context, what its answers say."""

import argparse
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import httpx
import together
import yaml
from together import AsyncTogether

from common.cli import UserError, warn

PRICES = Path(__file__).with_name("teachers.yaml")
BYTES_A_TOKEN = 4  # of English text; the median of our documents is 4.3, by SmolLM2's tokenizer
OVERHEAD = 256  # tokens, at most, that an endpoint's chat template adds to a prompt
KEY_REFUSED = "the endpoint refuses the key ({said}); check TOGETHER_API_KEY"
FINAL = {  # errors that asking again cannot mend
    401: KEY_REFUSED,
    402: "the endpoint wants payment ({said})",
    403: KEY_REFUSED,
    404: "the endpoint does not know {model} ({said}); check --model and TOGETHER_BASE_URL",
}
FREE = {*FINAL, 400, 413, 422, 429, 503}  # nothing was made, so nothing is paid


def make_client(args: argparse.Namespace, retries: int = 0) -> AsyncTogether:
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
    # aiohttp underneath: httpx's own pool looks at all its connections for each request, and stalls
    # for seconds with 128 of them on a busy machine (seen in `just bench replies`).
    limits = httpx.Limits(max_connections=args.concurrency)
    http, timeout = together.DefaultAioHttpClient(limits=limits), httpx.Timeout(args.timeout)
    options = {"timeout": timeout, "max_retries": retries, "http_client": http}
    return AsyncTogether(api_key=key or "none", base_url=base_url, **options)


def said(error: Exception) -> str:
    """What the endpoint said, in one line."""
    body = getattr(error, "body", None)
    inner = body.get("error", body) if isinstance(body, dict) else body
    text = inner.get("message") if isinstance(inner, dict) else None
    return " ".join(str(text or error.__cause__ or error).split())[:200]


def price_of(args: argparse.Namespace) -> dict:
    """`input` and `output` in dollars per million tokens, `context` in tokens, as far as known.

    Raises UserError for a budget that could not be held.
    """
    price = yaml.safe_load(PRICES.read_text()).get(args.model, {})
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


def split_by_length(requests: list[dict], price: dict, max_tokens: int) -> tuple[list[dict], dict]:
    """(requests that fit the model's context as far as known, {id: why not} of the others)."""
    context, fitting, reasons = price.get("context", math.inf), [], {}
    for request in requests:
        tokens = prompt_bytes(request) // BYTES_A_TOKEN + max_tokens
        if tokens <= context:
            fitting.append(request)
        else:
            reasons[request["id"]] = f"about {tokens:,} tokens, over the context of {context:,}"
    return fitting, reasons


def to_record(request: dict, body: dict, model: str, price: dict) -> dict:
    """The record of a reply, from the endpoint's JSON. Raises ValueError if it is no reply.

    An empty text (all tokens spent on thinking) is paid for and so kept.
    """
    try:
        choice, usage = body["choices"][0], body.get("usage")
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason")
        tokens = {k: int(usage[k]) if usage else 0 for k in ("prompt_tokens", "completion_tokens")}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"an answer that is no reply ({type(error).__name__})") from None
    return {
        "id": request["id"],
        "model": model,
        "prompt_sha": request["prompt_sha"],
        "text": text,
        "finish_reason": reason,
        "usage": tokens,
        "cost_usd": cost_usd(*tokens.values(), price) if usage else None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **{k: v for k, v in request.items() if k not in ("id", "messages", "prompt_sha")},
    }
