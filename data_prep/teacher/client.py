"""How a teacher is asked, and the record of what it replied."""

import argparse
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from common.cli import UserError, one_line, warn
from data_prep.teacher.endpoints import endpoint_urls, is_own
from data_prep.teacher.prices import ANSWER_TOKENS, TEACHERS, ceiling_of, is_free, usage_cost
from data_prep.teacher.read_reply import read_reply, read_usage, without_surrogates

OURS = ("model", "messages", "max_tokens", "max_completion_tokens", "stream", "n")


@dataclass(frozen=True)
class AskOptions:
    """How a teacher is asked; `sampling` are the fields of a request beside model and messages."""

    model: str
    sampling: dict
    max_tokens: int
    answer_tokens: int = ANSWER_TOKENS  # that an answer has, about: for estimates alone
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


def ask_options(
    args: argparse.Namespace, cut_counts: bool = False, answer_tokens: int = ANSWER_TOKENS
) -> AskOptions:
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
        answer_tokens=answer_tokens,
    )


def json_object(text: str) -> dict:
    """Fields of a request, for argparse; those that have options of their own are refused."""
    try:
        fields = json.loads(text)
        json.dumps(fields, allow_nan=False)  # NaN, which no endpoint takes, is no JSON
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {one_line(error)}") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError('a JSON object is wanted, such as {"top_p": 0.9}')
    if ours := ", ".join(name for name in OURS if name in fields):
        raise argparse.ArgumentTypeError(f"{ours}: there is another option for it, or none")
    return fields


def check_ceiling(options: AskOptions, price: dict, estimate: float | None = None) -> None:
    """Refuse to ask what costs money without a ceiling. Raises UserError that says what to pass."""
    ceiling = ceiling_of(options.budget_usd)
    are_own = all(map(is_own, endpoint_urls(options.base_url)))
    if "input" not in price:
        unknown = f"{TEACHERS.name} has no price of {options.model}"
        if options.budget_usd is not None or not are_own:
            hint = "pass --price IN OUT, in $ per million tokens (0 0 if it costs nothing)"
            raise UserError(f"{unknown}; {hint}")
        warn(f"{unknown}: what this costs is not known here")
    elif ceiling is None and not is_free(price):
        about = "" if estimate is None else f" (about ${estimate:,.2f}, see `just plan`)"
        own = ", or --price 0 0" if are_own else ""
        raise UserError(f"asking {options.model} costs money{about}: pass --budget-usd, or set "
                        f"BUDGET_USD, as a ceiling{own}")  # fmt: skip


def to_record(request: dict, **outcome: object) -> dict:
    """What became of a request: all of it but its messages, with what came of it."""
    left_out = ("messages", "worst_usd")
    record = {name: value for name, value in request.items() if name not in left_out}
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return record | without_surrogates(outcome) | {"created": created}


def to_reply(request: dict, body: object, price: dict, options: AskOptions) -> dict:
    """The record of a reply, whole or `unusable`, from the endpoint's JSON. Raises NoReply."""
    reply, usage = read_reply(body, options.also_whole, options.cut_counts), read_usage(body)
    if usage and reply.text.strip() and not usage["completion_tokens"]:
        usage = None  # words from no tokens
    outcome = {"text": reply.text, "finish_reason": reply.finish_reason}
    outcome["usage"] = usage and {
        name: usage[name] for name in ("prompt_tokens", "completion_tokens")
    }
    outcome["cost_usd"] = usage_cost(request, usage, price, options.max_tokens)
    if reply.unusable:
        outcome["unusable"] = reply.unusable
    return to_record(request, **outcome)
