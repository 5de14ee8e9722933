"""What an endpoint's JSON says: a whole reply, an unusable one with its reason, or nothing to keep.

An endpoint may answer with any JSON value at all, or with no JSON. Nothing here raises anything but
NoReply, and every text that is returned can be written as UTF-8.
"""

import json
import math
import re
from typing import NamedTuple

import regex

from common.cli import one_line
from common.text import whole

# What endpoints call the end of an answer, in lower case with `_` for `-`. Whatever stands in none
# of these sets, null and "" among it, does not say that the answer is whole.
WHOLE = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "end"}
ENDS = {
    "cut at the token limit": {
        "length",
        "max_tokens",
        "model_length",
        "max_length",
        "max_output_tokens",
        "incomplete",
    },
    "filtered": {
        "content_filter",
        "content_filtered",
        "sensitive",
        "safety",
        "recitation",
        "blocklist",
        "prohibited_content",
        "spii",
        "refusal",
        "guardrail_intervened",
        "moderation",
    },
    "tool calls, no text": {"tool_calls", "tool_call", "tool_use", "function_call"},
    "an error while it was written": {
        "error",
        "network_error",
        "engine_error",
        "abort",
        "aborted",
        "cancelled",
        "timeout",
    },
}
CUT = "cut at the token limit"
MOST_TOKENS = 100_000_000  # a count over this is no count
UNPRINTABLE = regex.compile(r"[\p{C}\p{Z}]")  # controls and all kinds of spaces
WORDS_IN = ("error", "message", "detail", "msg", "reason", "description", "title", "code")


class NoReply(ValueError):
    """An answer with nothing to keep; the message is the endpoint's own words, in one line."""


class Reply(NamedTuple):
    """A text and how it ended; `unusable` says why it is no answer, "" of a whole reply."""

    text: str
    finish_reason: str | None
    unusable: str


def without_surrogates(value: object) -> object:
    """`value`, JSON, with U+FFFD for every half of a surrogate pair, which no file can hold."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, list | tuple):
        return [without_surrogates(one) for one in value]
    if isinstance(value, dict):
        return {without_surrogates(name): without_surrogates(one) for name, one in value.items()}
    return value


def parse_body(content: bytes) -> object:
    """The JSON of an answer; counts with more than 18 digits are infinite. Raises NoReply."""

    def to_int(digits: str) -> float:
        return int(digits) if len(digits) < 19 else math.inf  # Python refuses 5,000 digits

    try:
        try:
            return json.loads(content, parse_int=to_int)
        except UnicodeDecodeError:  # one wrong byte in a text that was paid for
            return json.loads(content.decode("utf-8", "replace"), parse_int=to_int)
    except RecursionError:
        raise NoReply("JSON nested too deeply") from None
    except ValueError as error:
        said = words_in(content.decode("utf-8", "replace")) or "an empty answer"
        raise NoReply(f"not JSON ({one_line(error, 60)}): {said}") from None


def words_in(body: object, most: int = 200) -> str:
    """What the endpoint said, in one line: the innermost message of `body`, JSON or a text."""
    part = body
    for _ in range(20):  # {"error": {"message": "..."}}, [{"detail": [...]}]
        if isinstance(part, list) and part:
            part = part[0]
        elif isinstance(part, dict):
            named = [part[name] for name in WORDS_IN if part.get(name)]
            if not named:
                break
            part = named[0]
    if isinstance(part, dict | list):
        part = "an answer without words" if part else ""
    if part is None:
        return ""
    text = re.sub(r"(?s)<(style|script).*?</\1>|<[^<>]*>", " ", str(part)[: 50 * most])
    return one_line(UNPRINTABLE.sub(" ", without_surrogates(text)), most)


def read_reply(body: object, also_whole: tuple[str, ...] = (), cut_counts: bool = False) -> Reply:
    """What the endpoint's JSON is. `also_whole`: further finish reasons of a whole reply;
    `cut_counts`: so is what was cut at the limit. Raises NoReply: it may be asked again.
    """
    fields = body if isinstance(body, dict) else {}
    choices = fields.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        said = words_in(body if fields.get("error") else None)
        shown = one_line(without_surrogates(repr(body)[:200]), 120)
        raise NoReply(said or f"no message in the answer: {shown}")
    text, fault = read_content(message)
    finish = choice.get("finish_reason")
    finish = without_surrogates(finish) if isinstance(finish, str) else None
    error = fields.get("error") or choice.get("error")
    if error:
        return Reply(text, finish, "an error beside the message")
    if message.get("refusal"):
        return Reply(text, finish, "refused by the model")
    return Reply(text, finish, unusable_reason(text, finish, fault, also_whole, cut_counts))


def unusable_reason(
    text: str, finish: str | None, fault: str, also_whole: tuple = (), cut_counts: bool = False
) -> str:
    """Why a text with this end is no answer, "" if it is one; `fault` is what else is known."""
    end = (finish or "").strip().lower().replace("-", "_")
    for reason, names in ENDS.items():
        if end in names and not (reason == CUT and cut_counts and text.strip()):
            return reason
    if fault or not text.strip():
        return fault or "empty"
    known = end in WHOLE or any(end in names for names in ENDS.values())
    if known or (end or "null") in also_whole:
        return ""
    return f"no word of its end (finish_reason {one_line(end, 40) or 'null'})"


def read_content(message: dict) -> tuple[str, str]:
    """(text, what is wrong with it or "") of a message, whose content may be parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    texts, fault = [], ""
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str) and kind in ("text", "output_text"):
            texts.append(text)
        elif part is not None and kind not in ("thinking", "reasoning"):
            fault = "a part that is no text"
    text = without_surrogates("".join(texts))
    if text.strip() or fault:
        return text, fault
    if message.get("tool_calls") or message.get("function_call"):
        return text, "tool calls, no text"
    thoughts = message.get("reasoning_content") or message.get("reasoning")
    are_parts = isinstance(content, list) and content  # of thoughts, as no other has no text
    return text, "reasoning only" if thoughts or are_parts else ""


def read_usage(body: object) -> dict[str, int] | None:
    """Tokens in and out, with `billed_tokens` out where reasoning is counted beside; None where
    the endpoint does not say so in plain numbers over zero."""
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None
    counts = [_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    if None in counts or not counts[0]:
        return None
    beside = (_count(usage.get("total_tokens")) or 0) - counts[0]
    names = ("prompt_tokens", "completion_tokens", "billed_tokens")
    return dict(zip(names, (*counts, max(counts[1], beside)), strict=True))


def _count(value: object) -> int | None:
    """A number of tokens, None for what is none: null, true, NaN, negative, half a token."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value <= MOST_TOKENS and value == int(value) else None
