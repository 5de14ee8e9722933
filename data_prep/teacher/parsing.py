"""Read a teacher's reply with regular expressions: two rated answers, or one, or a verdict.

The readers meet what models really write: labels in bold or as headings, scores as 17/18 or
5 + 5 + 3 + 4 = 17, code fences, <think> blocks. What an answer is called and what it is rated on
comes from the task. Where there is no honest reading they say why.
"""

import re
from functools import cache
from typing import NamedTuple

from prompts import Task

FLAGS = re.IGNORECASE | re.MULTILINE
MARKUP = str.maketrans(dict.fromkeys("*_`#<>[]", " "))  # read as blanks, so that places stay
THINKING = re.compile(
    r"<(think|thinking|reasoning)>.*?</\1>|^.*</(?:think|thinking|reasoning)>",
    re.DOTALL | re.IGNORECASE,
)
FENCE = re.compile(r"^[ \t]*(?:```|~~~)\w*[ \t]*$\n?", re.MULTILINE)
RULE = re.compile(r"^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*$", re.MULTILINE)
OPEN = r"^[ \t]*(?:[-•][ \t]+)?"  # what may stand before a label
# Behind it a note in parentheses, then a colon, a dash or the end of the line.
END = r"[ \t]*(?:\([^()\n]*\))?[ \t]*(?::|[-\u2013\u2014=](?=[ \t])|$)[ \t]*"
NTH = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2}
NUMBER = r"\d+(?:\.\d+)?"
SCORE = (
    rf"(?:\(?(?:[\d.+ \t]*+=)?[ \t(]*(?P<score>{NUMBER})"
    r"(?P<range>[ \t]*(?:to|or|-|\u2013)[ \t]*\d)?"
    rf"[ \t)]*(?:(?:/|out[ \t]+of)[ \t]*(?P<of>{NUMBER})|points?)?[ \t).,;]*(?P<word>\w)?)?"
)


class ParseError(ValueError):
    """A reply without an honest reading; the message is the reason, in a few words."""


class ParsedReply(NamedTuple):
    """Two answers in the order given, with their totals; `best` is 0 or 1, or None if unrated."""

    answers: tuple[str, str]
    scores: tuple[float | None, float | None]
    criteria: tuple[dict[str, float], dict[str, float]]
    best: int | None


@cache
def _patterns(task: Task) -> dict[str, re.Pattern]:
    """What the parts of a reply are found by, in a text without markup."""
    label, number = re.escape(task.label), r"[ \t]*(?:number|no\.?)?[ \t]*"
    criteria = "|".join(map(re.escape, task.criteria)) or "(?!)"
    word = re.escape(task.hub.get("answer", "answer"))
    patterns = {
        "label": rf"{OPEN}{label}{number}(?P<n>[12]|one|two){END}"
        rf"|{OPEN}(?:the[ \t]+)?(?P<nth>first|second)[ \t]+{label}{END}"
        rf"|{OPEN}{label}[ \t]*:?\s*\n{OPEN}(?P<below>[12])[ \t.:]*$",
        "field": rf"{OPEN}(?:(?P<criterion>{criteria})"
        r"|(?P<total>(?:total|overall|final)(?:[ \t]+(?:score|rating))?|score|rating)"
        r"|(?P<prose>explanation|justification|reasoning|rationale"
        r"|(?:scores|ratings|evaluation)(?=[ \t:]*$)))"
        rf"(?:[ \t]+score)?(?:[ \t]+(?:for|of)[ \t\w]+)?{END}{SCORE}",
        "verdict": rf"{OPEN}(?:the[ \t]+)?(?:best|better|preferred|winner|winning)"
        rf"(?:[ \t]+(?:{label}|one))?(?:{END}|[ \t]+(?:is|=)[ \t:]*)\W*+(?:the[ \t]+)?"
        rf"(?:{label}{number})?\W*+(?:(?P<n>[12]|one|two|first|second)"
        r"|0|zero|neither|(?:a[ \t]+)?(?:tie|draw))\b"
        r"(?![/.]\d)(?!\s*(?:or\b|and\b|/|,\s*[012]\b))",
        "preface": rf"\A(?:sure|certainly|of course|.*\b(?:{label}|{word})\b).*:[ \t]*\n",
        "one": rf"\A\s*{label}[ \t]*(?::|$)",
        "echo": rf"\A[<(\[].{{0,60}}{label}.{{0,60}}[>)\]]\Z",
    }
    return {name: re.compile(pattern, FLAGS) for name, pattern in patterns.items()}


def parse_reply(reply: str, task: Task, rated: bool = True) -> ParsedReply:
    """Read two answers, if `rated` with scores and a verdict that agree. Raises ParseError."""
    text, patterns, answer = _bare(reply), _patterns(task), task.hub.get("answer", "answer")
    plain = text.translate(MARKUP)
    verdicts = [match for match in patterns["verdict"].finditer(plain) if match["n"]]
    end, named = len(text), 0
    if verdicts:
        end, named = verdicts[-1].start(), NTH[verdicts[-1]["n"].lower()]
    labels = list(patterns["label"].finditer(plain, 0, end))
    if [NTH[match[match.lastgroup].lower()] for match in labels] != [1, 2]:
        raise ParseError(
            f"no two {task.hub.get('answers', 'answers')}, each labelled once, in order"
        )
    if rated and not named:
        raise ParseError(f"no best {answer} is named")
    parts = slice(labels[0].end(), labels[1].start()), slice(labels[1].end(), end)
    sections = [_read_section(text[part], plain[part], task, rated) for part in parts]
    answers, scores, criteria = zip(*sections, strict=True)
    higher = 0 if None in scores or scores[0] == scores[1] else 1 + (scores[1] > scores[0])
    if rated and higher and higher != named:
        raise ParseError(f"the best {answer} contradicts the scores")
    found = {named, higher} - {0}
    return ParsedReply(answers, scores, criteria, found.pop() - 1 if len(found) == 1 else None)


def parse_answer(reply: str, task: Task) -> str:
    """The one answer that a reply is, without what stands around it. Raises ParseError."""
    text = _bare(reply)
    for name in ("preface", "one"):
        if match := _patterns(task)[name].match(text.translate(MARKUP)):
            text = _clean(text[match.end() :].lstrip("*_` \t"), task)
    return _clean(text, task)


def read_better(text: str, task: Task) -> int | None:
    """Which of two answers a judge names as the better one, 1 or 2; 0 a draw, None unreadable."""
    try:
        plain = _bare(text).translate(MARKUP)
    except ParseError:
        return None
    verdicts = list(_patterns(task)["verdict"].finditer(plain))
    return NTH.get((verdicts[-1]["n"] or "").lower(), 0) if verdicts else None


def _bare(reply: str) -> str:
    """A reply without code fences, thoughts, and runs that the patterns are slow on."""
    text = re.sub(r"([\s*_`#<>\[\]])\1{20,}", r"\1\1\1", reply.replace("\r\n", "\n"))
    text = FENCE.sub("", THINKING.sub("", text)).strip()
    if re.search(r"<(think|thinking|reasoning)>", text, re.IGNORECASE):
        raise ParseError("cut off while thinking")
    return text


def _read_section(text: str, plain: str, task: Task, rated: bool) -> tuple[str, float | None, dict]:
    """The answer, its total and its criteria, from the part under a label. Raises ParseError.

    An answer may hold lines like "Rating: R." too. So the fields are the first criterion with a
    plain number, or else the last total, what follows it, and the fields directly above it.
    """
    lines, pattern = plain.split("\n"), _patterns(task)["field"]
    found = [m if m and (m["score"] or m["prose"]) else None for m in map(pattern.match, lines)]
    rated_at = [i for i, m in enumerate(found) if m and m["criterion"] and not m["word"]]
    total_at = [i for i, m in enumerate(found) if m and m["total"]]
    start = min(rated_at, default=max(total_at, default=len(lines)))
    while start and (found[start - 1] or not lines[start - 1].strip(" \t-")):
        start -= 1
    answer = _clean("\n".join(text.split("\n")[:start]), task)
    try:
        return answer, *_read_scores([match for match in found[start:] if match], task)
    except ParseError:
        if rated:
            raise
        return answer, None, {}


def _read_scores(fields: list[re.Match], task: Task) -> tuple[float, dict[str, float]]:
    """The total and the criteria. Raises ParseError."""
    lowest, highest = task.lowest_score, task.highest_score
    total = [match for match in fields if match["total"]][-1:]
    if not total or total[0]["range"] or float(total[0]["of"] or highest) != highest:
        raise ParseError("a score is missing or not a number")
    score = float(total[0]["score"])
    if not lowest <= score <= highest:
        raise ParseError(f"a score outside {lowest} to {highest}")
    names = {name.lower(): name for name in task.criteria}
    rated = [match for match in fields if match["criterion"] and not match["range"]]
    criteria = {names[match["criterion"].lower()]: float(match["score"]) for match in rated}
    if len(criteria) == len(names) and sum(criteria.values()) != score:
        raise ParseError("a total that is not the sum of its criteria")
    return score, criteria


def _clean(text: str, task: Task) -> str:
    """An answer without rules, quotes and emphasis around the whole of it. Raises ParseError."""
    text = re.sub(r"\n{3,}", "\n\n", RULE.sub("", text)).strip()
    for mark in ("**", "__", "*", '"'):
        inner = text[len(mark) : -len(mark)]
        if inner and text == f"{mark}{inner}{mark}" and mark not in inner:
            text = inner.strip()
    if not text or _patterns(task)["echo"].match(text):
        raise ParseError(f"an empty {task.hub.get('answer', 'answer')}")
    return text
