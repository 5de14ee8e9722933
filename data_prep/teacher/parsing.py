"""Read a teacher's reply with regular expressions: two summaries, their scores, the better one.

The parser meets what models really write (labels in bold or as headings, scores as 17/18 or
5 + 5 + 3 + 4 = 17, code fences, <think> blocks). Where there is no honest reading it says why.
"""

import re
from dataclasses import dataclass, field

LOWEST, HIGHEST = 4, 18
CRITERIA = ("coherence", "consistency", "fluency", "relevance")

# What may stand before and behind a label: markup, never words.
_OPEN = r"^[ \t]*(?:(?:[#>*_<\[`]|[-•](?=[ \t]))[ \t]*)*"
_CLOSE = r"[ \t]*[*_>\])`]*"
# A note in parentheses, then a colon or the end of the line; `**Label:**` and `**Label** text` too.
_END = (
    rf"{_CLOSE}(?:[ \t]*\([^()\n]*\))?{_CLOSE}[ \t]*(?::[ \t]*[*_`]*|[-\u2013\u2014=](?=[ \t])|$)"
)
_SUMMARY = re.compile(
    rf"{_OPEN}summary[ \t]*(?:number|no\.?|#)?[ \t]*(?P<n>[12]|one|two){_END}[ \t]*"
    rf"|{_OPEN}(?:the[ \t]+)?(?P<nth>first|second)[ \t]+summary{_END}[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)
_FIELD = re.compile(
    rf"{_OPEN}(?P<name>coherence|consistency|fluency|relevance"
    r"|(?:total|overall|final)(?:[ \t]+(?:score|rating))?|score|rating|ratings|scores|evaluation"
    r"|explanation|justification|reasoning|rationale)"
    rf"(?:[ \t]+score)?(?:[ \t]+(?:for|of)[ \t]+summary[ \t]*[12])?{_END}(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_BEST = re.compile(
    rf"{_OPEN}(?:the[ \t]+)?(?:best|better|preferred|winner|winning)(?:[ \t]+(?:summary|one))?"
    rf"(?:{_END}|[ \t]+(?:is|=)[ \t]*[:]?)\s*(?P<rest>.*)$",
    re.IGNORECASE | re.MULTILINE,
)
_WHICH = re.compile(
    r"^[\W_]*(?:the[ \t]+)?(?:summary[ \t]*(?:number|no\.?|#)?[ \t]*)?[\W_]*"
    r"(?P<n>[12]|one|two|first|second)\b(?![/.]\d)(?P<rest>.*)$",
    re.IGNORECASE,
)
_NUMBER = r"\d+(?:\.\d+)?"
_SCORE = re.compile(
    rf"^[\s*_<(\[`]*(?:[\d.+\s]*=[\s*_<(\[`]*)?(?P<score>{_NUMBER})[\s*_>)\]`]*"
    rf"(?:(?:/|out[ \t]+of)[\s*_]*(?P<of>{_NUMBER})|points?)?[\s*_>)\]`.,;]*(?P<after>.*)$",
    re.IGNORECASE,
)
_ORDINAL = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2}
_THINKING = re.compile(
    r"<(think|thinking|reasoning)>.*?</\1>|^.*</(?:think|thinking|reasoning)>",
    re.DOTALL | re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$\n?", re.MULTILINE)


class ParseError(ValueError):
    """A reply without an honest reading; the message is the reason, in a few words."""


@dataclass(frozen=True)
class ParsedReply:
    """Two summaries in the order given, with totals of 4 to 18; `best` is 0 or 1."""

    summaries: tuple[str, str]
    scores: tuple[float, float]
    best: int
    criteria: tuple[dict[str, float], dict[str, float]] = field(default=({}, {}))


def parse_reply(reply: str) -> ParsedReply:
    """Read a reply. Raises ParseError with the reason where it cannot be read honestly."""
    first, second, best = _sections(_bare(reply))
    summaries = _read_summary(first), _read_summary(second)
    return ParsedReply(summaries, *_read_verdict(first, second, best))


def parse_verdict(reply: str) -> tuple[tuple[float, float], int]:
    """(totals, the better one as 0 or 1) of a reply without summaries, a judge's.

    Raises ParseError with the reason.
    """
    return _read_verdict(*_sections(_bare(reply)))[:2]


def _bare(reply: str) -> str:
    """A reply without code fences and thoughts."""
    text = _FENCE.sub("", _THINKING.sub("", reply.replace("\r\n", "\n"))).strip()
    if re.search(r"<(think|thinking|reasoning)>", text, re.IGNORECASE):
        raise ParseError("cut off while thinking")
    return text


def _read_verdict(first: str, second: str, best: int) -> tuple[tuple, int, tuple]:
    """(totals, best, criteria) from the parts under the two labels and the one named best."""
    scores, criteria = zip(*map(_read_scores, (first, second)), strict=True)
    if scores[0] != scores[1] and best != (scores[1] > scores[0]):
        raise ParseError("the best summary contradicts the scores")
    return scores, best, criteria


def _sections(text: str) -> tuple[str, str, int]:
    """The parts under "Summary 1" and "Summary 2", and which is named best (0 or 1)."""
    verdicts = [(m, _read_best(m["rest"])) for m in _BEST.finditer(text)]
    named = [(m, best) for m, best in verdicts if best is not None]
    end = named[-1][0].start() if named else len(text)
    labels = [(_ORDINAL[(m["n"] or m["nth"]).lower()], m) for m in _SUMMARY.finditer(text, 0, end)]
    numbers = [number for number, _ in labels]
    if not {1, 2} <= set(numbers):
        raise ParseError("no two summaries")
    if numbers != [1, 2]:
        raise ParseError("the summaries are labelled more than once or out of order")
    (_, first), (_, second) = labels
    if not named:
        raise ParseError("the best summary is not named" if verdicts else "no best summary")
    return text[first.end() : second.start()], text[second.end() : end], named[-1][1]


def _read_summary(section: str) -> str:
    """The summary's text, from the part under its label."""
    match = _FIELD.search(section)
    summary = _clean(section[: match.start()] if match else section)
    if not summary or re.fullmatch(
        r"[<(\[].{0,60}summary[^\n]{0,60}[>)\]]", summary, re.IGNORECASE
    ):
        raise ParseError("an empty summary")
    return summary


def _read_scores(section: str) -> tuple[float, dict[str, float]]:
    """The total and the criteria, from the part under a summary's label."""
    totals, criteria = [], {}
    for match in _FIELD.finditer(section):
        name = match["name"].lower()
        if name in CRITERIA:
            criteria[name] = _read_number(match["rest"])
        elif name.startswith(("total", "overall", "final")) or name in ("score", "rating"):
            totals.append(_read_number(match["rest"], scale=HIGHEST))
    if not totals or totals[-1] is None:
        raise ParseError("a score is missing or not a number")
    if not LOWEST <= totals[-1] <= HIGHEST:
        raise ParseError(f"a score outside {LOWEST} to {HIGHEST}")
    criteria = {name: value for name, value in criteria.items() if value is not None}
    if len(criteria) == len(CRITERIA) and sum(criteria.values()) != totals[-1]:
        raise ParseError("a total that is not the sum of its criteria")
    return totals[-1], criteria


def _read_number(rest: str, scale: int | None = None) -> float | None:
    """The number a field gives, unless it is a range or out of another scale."""
    match = _SCORE.match(rest)
    if not match or re.match(r"(?:to|or|-|\u2013)\s*\d", match["after"]):
        return None
    if scale and match["of"] and float(match["of"]) != scale:
        return None
    return float(match["score"])


def _read_best(rest: str) -> int | None:
    match = _WHICH.match(rest.strip()[:100])  # a bound on backtracking
    if not match or re.match(r"\s*(?:or|and|/)\s", match["rest"]):
        return None
    return _ORDINAL[match["n"].lower()] - 1


def _clean(text: str) -> str:
    """A summary without rules, quotes and emphasis around the whole of it."""
    text = re.sub(r"(?:^|\n)[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*(?=\n|$)", "\n", text).strip()
    for mark in ("**", "__", "*", '"'):
        inner = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text == f"{mark}{inner}{mark}" and mark not in inner:
            text = inner.strip()
    return re.sub(r"\n{3,}", "\n\n", text)


def read_better(text: str, task) -> int | None:
    """Stand-in until the teacher branch is merged."""
    for match in reversed(list(_BEST.finditer(_bare(text)))):
        rest = match["rest"].strip(" *_.")
        if rest == "0":
            return 0
        if (best := _read_best(rest)) is not None:
            return best + 1
    return None
