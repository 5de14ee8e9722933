"""Read a teacher's reply with regular expressions: two answers, their scores, the better one.

The readers meet what models really write (labels in bold or as headings, scores as 17/18 or
5 + 5 + 3 + 4 = 17, code fences, <think> blocks). What an answer is called and what it is rated on
comes from the task. Where there is no honest reading they say why.
"""

import re
from functools import cache
from typing import NamedTuple

from prompts import Task, load_task

# What may stand before and behind a label: markup, never words.
_OPEN = r"^[ \t]*(?:(?:[#>*_<\[`]|[-•](?=[ \t]))[ \t]*)*"
_CLOSE = r"[ \t]*[*_>\])`]*"
# A note in parentheses, then a colon or the end of the line; `**Label:**` and `**Label** text` too.
_END = (
    rf"{_CLOSE}(?:[ \t]*\([^()\n]*\))?{_CLOSE}[ \t]*(?::[ \t]*[*_`]*|[-\u2013\u2014=](?=[ \t])|$)"
)
_FLAGS = re.IGNORECASE | re.MULTILINE
_NUMBER = r"\d+(?:\.\d+)?"
_SCORE = re.compile(
    rf"^[\s*_<(\[`]*(?:[\d.+\s]*=[\s*_<(\[`]*)?(?P<score>{_NUMBER})[\s*_>)\]`]*"
    rf"(?:(?:/|out[ \t]+of)[\s*_]*(?P<of>{_NUMBER})|points?)?[\s*_>)\]`.,;]*(?P<after>.*)$",
    _FLAGS,
)
_ORDINAL = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2}
_THINKING = re.compile(
    r"<(think|thinking|reasoning)>.*?</\1>|^.*</(?:think|thinking|reasoning)>",
    re.DOTALL | re.IGNORECASE,
)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$\n?", re.MULTILINE)
_RULE = r"[ \t]*(?:-{3,}|\*{3,}|_{3,})?[ \t]*"  # or nothing at all


class ParseError(ValueError):
    """A reply without an honest reading; the message is the reason, in a few words."""


class ParsedReply(NamedTuple):
    """Two answers in the order given, with their totals; `best` is 0 or 1."""

    answers: tuple[str, str]
    scores: tuple[float | None, float | None]
    criteria: tuple[dict[str, float], dict[str, float]]
    best: int | None


@cache
def _patterns(task: Task) -> dict[str, re.Pattern]:
    """What a task's answers are read by; `which` reads what stands behind `better`."""
    label, number = re.escape(task.label), r"(?:[ \t]*(?:number|no\.?|#))?[ \t]*"
    criteria = "|".join(map(re.escape, task.criteria))
    nth = rf"(?:the[ \t]+)?(?:(?:first|second)[ \t]+)?{label}(?:{number}[12])?"
    patterns = {
        "label": rf"{_OPEN}{label}{number}(?P<n>[12]|one|two){_END}[ \t]*"
        rf"|{_OPEN}(?:the[ \t]+)?(?P<nth>first|second)[ \t]+{label}{_END}[ \t]*"
        # A heading with its number on a line of its own.
        rf"|{_OPEN}{label}{_CLOSE}:?{_CLOSE}\s*\n{_OPEN}(?P<below>[12]){_CLOSE}[.:]?{_CLOSE}$",
        "field": rf"{_OPEN}(?:(?P<criterion>{criteria})"
        r"|(?P<total>(?:total|overall|final)(?:[ \t]+(?:score|rating))?|score|rating)"
        r"|(?P<heading>scores|ratings|evaluation)"
        r"|(?P<prose>explanation|justification|reasoning|rationale))"
        rf"(?:[ \t]+score)?(?:[ \t]+(?:for|of)[ \t]+{nth})?{_END}(?P<rest>.*)$",
        "better": rf"{_OPEN}(?:the[ \t]+)?(?:best|better|preferred|winner|winning)"
        rf"(?:[ \t]+(?:{label}|one))?(?:{_END}|[ \t]+(?:is|=)[ \t]*[:]?)\s*(?P<rest>.*)$",
        "which": rf"^[\W_]*(?:the[ \t]+)?(?:{label}{number})?[\W_]*"
        r"(?:(?P<n>[12]|one|two|first|second)|0|zero|neither|(?:a[ \t]+)?(?:tie|draw))\b"
        r"(?![/.]\d)(?!\s*(?:or\b|and\b|/|,\s*[012]\b))",
    }
    return {name: re.compile(pattern, _FLAGS) for name, pattern in patterns.items()}


def parse_answer(reply: str, task: Task) -> str:
    """The one answer that a reply is. Raises ParseError."""
    return _clean(_bare(reply), task.label)


def parse_reply(reply: str, task: Task | None = None, rated: bool = True) -> ParsedReply:
    """Read a reply. Raises ParseError with the reason where it cannot be read honestly."""
    task, text = task or load_task(), _bare(reply)
    verdicts = [(start, which) for start, which in _verdicts(text, task) if which]
    end, best = verdicts[-1] if verdicts else (len(text), 0)
    labels = list(_patterns(task)["label"].finditer(text, 0, end))
    if [_ORDINAL[(m["n"] or m["nth"] or m["below"]).lower()] for m in labels] != [1, 2]:
        raise ParseError("no two summaries, each labelled once, in order")
    if not verdicts and rated:
        raise ParseError("no best summary is named")
    first, second = labels
    sections = text[first.end() : second.start()], text[second.end() : end]
    try:
        answers, scores, criteria = zip(*(_read_section(s, task) for s in sections), strict=True)
    except ParseError:
        if rated:
            raise
        answers = tuple(_clean(s, task.label) for s in sections)
        return ParsedReply(answers, (None, None), ({}, {}), None)
    if scores[0] == scores[1]:
        return ParsedReply(answers, scores, criteria, best - 1 if rated else None)
    higher = int(scores[1] > scores[0])
    if rated and best - 1 != higher:
        raise ParseError("the best summary contradicts the scores")
    return ParsedReply(answers, scores, criteria, higher)


def read_better(text: str, task: Task | None = None) -> int | None:
    """Which of two answers a judge names as the better one, 1 or 2; 0 a draw, None unreadable."""
    try:
        verdicts = _verdicts(_bare(text), task or load_task())
    except ParseError:
        return None
    return verdicts[-1][1] if verdicts else None


def _bare(reply: str) -> str:
    """A reply without code fences, thoughts, and runs of blanks, which the patterns are slow on."""
    text = re.sub(r"(\s)\1{20,}", r"\1\1", reply.replace("\r\n", "\n"))
    text = _FENCE.sub("", _THINKING.sub("", text)).strip()
    if re.search(r"<(think|thinking|reasoning)>", text, re.IGNORECASE):
        raise ParseError("cut off while thinking")
    return text


def _verdicts(text: str, task: Task) -> list[tuple[int, int]]:
    """(where, which) for every line that names the better one, 1 or 2, or 0 for a draw."""
    patterns, found = _patterns(task), []
    for match in patterns["better"].finditer(text):
        # The bound is one on backtracking.
        if which := patterns["which"].match(match["rest"].strip()[:100]):
            found.append((match.start(), _ORDINAL.get((which["n"] or "").lower(), 0)))
    return found


def _read_section(section: str, task: Task) -> tuple[str, float, dict[str, float]]:
    """The answer, its total and its criteria, from the part under a label. Raises ParseError.

    An answer may hold lines like "Rating: R." too. So the fields are the first criterion with a
    plain number, or else the last total, what follows it, and the fields directly above it.
    """
    lines = section.split("\n")
    found = [_read_field(line, task) for line in lines]
    rated = [i for i, match in enumerate(found) if match and match["criterion"]]
    plain = [i for i in rated if not _SCORE.match(found[i]["rest"])["after"][:1].isalnum()]
    total = [i for i, match in enumerate(found) if match and match["total"]]
    start = min(plain, default=max(total, default=len(lines)))
    while start and (found[start - 1] or re.fullmatch(_RULE, lines[start - 1])):
        start -= 1
    answer = _clean("\n".join(lines[:start]), task.label)
    return answer, *_read_scores([match for match in found[start:] if match], task)


def _read_field(line: str, task: Task) -> re.Match | None:
    """A line that gives a number or an explanation; a heading of such lines counts as one."""
    match = _patterns(task)["field"].match(line)
    rest = match["rest"].strip() if match else ""
    worded = match and (match["prose"] or (match["heading"] and not rest))
    return match if worded or _SCORE.match(rest) else None


def _read_scores(fields: list[re.Match], task: Task) -> tuple[float, dict[str, float]]:
    """The total and the criteria. Raises ParseError."""
    names = {name.lower(): name for name in task.criteria}
    lowest, highest = task.lowest_score, task.highest_score
    totals = [_read_number(match["rest"], highest) for match in fields if match["total"]]
    if not totals or totals[-1] is None:
        raise ParseError("a score is missing or not a number")
    if not lowest <= totals[-1] <= highest:
        raise ParseError(f"a score outside {lowest} to {highest}")
    rated = [match for match in fields if match["criterion"]]
    values = {names[match["criterion"].lower()]: _read_number(match["rest"]) for match in rated}
    criteria = {name: value for name, value in values.items() if value is not None}
    if len(criteria) == len(names) and sum(criteria.values()) != totals[-1]:
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


def _clean(text: str, label: str) -> str:
    """An answer without rules, quotes and emphasis around the whole of it. Raises ParseError."""
    text = re.sub(rf"(?:^|\n){_RULE}(?=\n|$)", "\n", text).strip()
    for mark in ("**", "__", "*", '"'):
        inner = text[len(mark) : -len(mark)]
        if len(text) > 2 * len(mark) and text == f"{mark}{inner}{mark}" and mark not in inner:
            text = inner.strip()
    echo = rf"[<(\[].{{0,60}}{re.escape(label)}[^\n]{{0,60}}[>)\]]"
    if not text or re.fullmatch(echo, text, re.IGNORECASE):
        raise ParseError("an empty summary")
    return re.sub(r"\n{3,}", "\n\n", text)
