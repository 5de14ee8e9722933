"""What a teacher costs: its prices and terms, the worst case of a request, what a reply cost."""

import math
import os
from pathlib import Path

import yaml

from common.cli import UserError
from data_prep.teacher.read_reply import read_usage

TEACHERS = Path(__file__).with_name("teachers.yaml")  # its comments say what each field is
PRICES: dict[str, dict] = yaml.safe_load(TEACHERS.read_text())  # by model
BYTES_A_TOKEN = 4  # of English text; the median of our documents is 4.3, by SmolLM2's tokenizer
# About how many tokens are written: in an answer, unless the task's are shorter; in the ratings of
# two; in a verdict.
ANSWER_TOKENS, RATING_TOKENS, VERDICT_TOKENS = 250, 600, 150
OVERHEAD = 256  # tokens, at most, that an endpoint's chat template adds to a prompt


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


def reply_tokens(answers: int, answer_tokens: int) -> int:
    """About how many tokens a reply of so many answers has (two are rated, none: a verdict)."""
    if not answers:
        return VERDICT_TOKENS
    return answers * answer_tokens + (RATING_TOKENS if answers == 2 else 0)


def estimate_usd(requests: list[dict], price: dict, answer_tokens: int) -> float | None:
    """About what the replies cost, as `just plan` says; None where no price is known."""
    tokens_in = sum(map(prompt_bytes, requests)) / BYTES_A_TOKEN
    reasoning = price.get("reasoning", 0)
    lengths = [reply_tokens(request.get("answers", 0), answer_tokens) for request in requests]
    tokens_out = sum(lengths) + reasoning * len(requests)
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
