"""Read a teacher's reply with regular expressions: two rated answers, or one, or a verdict.

The readers meet what models really write: labels in bold or as headings, scores as 17/18 or
5 + 5 + 3 + 4 = 17, code fences, <think> blocks. What an answer is called and what it is rated on
comes from the task. Where there is no honest reading they say why.
"""

import re
from functools import cache
from typing import NamedTuple

from prompts import Task

MARKUP = str.maketrans(dict.fromkeys("*_`#<>[]", " "))  # read as blanks, so that places stay
RUN = re.compile(r"([\s*_`#<>\[\]])\1{20,}")  # of blanks and markup, which the patterns are slow on
THOUGHT = re.compile(r"(?is)<(think\w*|reasoning)>.*?</\1>|^.*</(?:think\w*|reasoning)>")
UNFINISHED = re.compile(r"(?i)<(think\w*|reasoning)>")
FENCE = re.compile(r"(?m)^[ \t]*(?:```|~~~)\w*[ \t]*$\n?")
RULE = re.compile(r"(?m)^[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*$")
OPEN = r"^[ \t]*(?:[-•][ \t]+)?"  # what may stand before a label
# Behind it a note in parentheses, then a colon, a dash or the end of the line.
END = r"[ \t]*(?:\([^()\n]*\))?[ \t]*(?::|[-\u2013\u2014=](?=[ \t])|$)"
NTH = {"1": 1, "one": 1, "first": 1, "2": 2, "two": 2, "second": 2}
SCORE = (
    r"(?:\(?(?:[\d.+ \t]*+=)?[ \t(]*(?P<score>\d+(?:\.\d+)?)(?P<range>[ \t]*(?:to|or|[-\u2013])"
    r"[ \t]*\d)?[ \t)]*(?:(?:/|out[ \t]+of)[ \t]*(?P<of>\d+)|points?)?[ \t).,;]*(?P<word>\w)?)?"
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
    label, word = re.escape(task.label), re.escape(_word(task))
    number = r"[ \t]*(?:number|no\.?)?[ \t]*"
    criteria = "|".join(map(re.escape, task.criteria)) or "(?!)"
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
    return {name: re.compile(one, re.IGNORECASE | re.MULTILINE) for name, one in patterns.items()}


def parse_reply(reply: str, task: Task, rated: bool = True) -> ParsedReply:
    """Read two answers, if `rated` with scores and a verdict that agree. Raises ParseError."""
    text = _bare(reply)
    plain = text.translate(MARKUP)
    verdicts = [match for match in _patterns(task)["verdict"].finditer(plain) if match["n"]]
    end = verdicts[-1].start() if verdicts else len(text)
    named = NTH[verdicts[-1]["n"].lower()] if verdicts else 0
    labels = list(_patterns(task)["label"].finditer(plain, 0, end))
    if [NTH[match[match.lastgroup].lower()] for match in labels] != [1, 2]:
        raise ParseError(f"no two {task.hub.get('answers', 'answers')}, labelled once, in order")
    if rated and not named:
        raise ParseError(f"no best {_word(task)} is named")
    parts = _after(text[: labels[1].start()], labels[0]), _after(text[:end], labels[1])
    sections = [_read_section(part, task, rated) for part in parts]
    answers, scores, criteria = zip(*sections, strict=True)
    higher = 0 if None in scores or scores[0] == scores[1] else 1 + (scores[1] > scores[0])
    if rated and higher and higher != named:
        raise ParseError(f"the best {_word(task)} contradicts the scores")
    found = {named, higher} - {0}
    return ParsedReply(answers, scores, criteria, found.pop() - 1 if len(found) == 1 else None)


def parse_answer(reply: str, task: Task) -> str:
    """The one answer that a reply is, without what stands around it. Raises ParseError."""
    text = _bare(reply)
    for name in ("preface", "one"):
        if match := _patterns(task)[name].match(text.translate(MARKUP)):
            text = _clean(_after(text, match), task)
    return _clean(text, task)


def read_better(text: str, task: Task) -> int | None:
    """Which of two answers a judge names as the better one, 1 or 2; 0 a draw, None unreadable."""
    try:
        *_, last = _patterns(task)["verdict"].finditer(_bare(text).translate(MARKUP))
    except ValueError:  # nothing to unpack, or a ParseError
        return None
    return NTH.get((last["n"] or "").lower(), 0)


def _word(task: Task) -> str:
    return task.hub.get("answer", "answer")


def _bare(reply: str) -> str:
    """A reply without code fences and thoughts. Raises ParseError if a thought does not end."""
    text = RUN.sub(r"\1\1\1", reply.replace("\r\n", "\n"))
    text = FENCE.sub("", THOUGHT.sub("", text)).strip()
    if UNFINISHED.search(text):
        raise ParseError("cut off while thinking")
    return text


def _after(text: str, label: re.Match) -> str:
    """What follows a label, without the mark that closes an emphasis opened before it."""
    head = text[label.start() : label.end()].lstrip().removeprefix("* ")
    rest = text[label.end() :]
    for mark in ("**", "__", "*"):
        if head.count(mark) % 2:
            head, rest = head.replace(mark, ""), rest.replace(mark, "", 1)
    return rest.lstrip("]> \t")


def _read_section(text: str, task: Task, rated: bool) -> tuple[str, float | None, dict]:
    """The answer, its total and its criteria, from the part under a label. Raises ParseError."""
    # An answer may hold lines like "Rating: R." too. So the fields are the first criterion with a
    # plain number, or else the last total, what follows it, and the fields directly above it.
    lines = text.translate(MARKUP).split("\n")
    fields = [_patterns(task)["field"].match(line) for line in lines]
    fields = [m if m and (m["score"] or m["prose"]) else None for m in fields]
    rated_at = [i for i, m in enumerate(fields) if m and m["criterion"] and not m["word"]]
    total_at = [i for i, m in enumerate(fields) if m and m["total"]]
    start = min(rated_at, default=max(total_at, default=len(lines)))
    while start and (fields[start - 1] or not lines[start - 1].strip(" \t-")):
        start -= 1
    answer = _clean("\n".join(text.split("\n")[:start]), task)
    fields = [match for match in fields[start:] if match]
    names = {name.lower(): name for name in task.criteria}
    numbers = [m for m in fields if m["criterion"] and not m["range"]]
    criteria = {names[m["criterion"].lower()]: float(m["score"]) for m in numbers}
    last = [m for m in fields if m["total"]][-1:]
    total, problem = float(last[0]["score"]) if last else None, ""
    highest = task.highest_score
    if not last or last[0]["range"] or float(last[0]["of"] or highest) != highest:
        problem = "a score is missing or not a number"
    elif not task.lowest_score <= total <= highest:
        problem = f"a score outside {task.lowest_score} to {highest}"
    elif len(criteria) == len(names) and sum(criteria.values()) != total:
        problem = "a total that is not the sum of its criteria"
    if problem and rated:
        raise ParseError(problem)
    return (answer, None, {}) if problem else (answer, total, criteria)


def _clean(text: str, task: Task) -> str:
    """An answer without rules, quotes and emphasis around the whole of it. Raises ParseError."""
    text = re.sub(r"\n{3,}", "\n\n", RULE.sub("", text)).strip()
    for mark in ("**", "__", "*", '"'):
        inner = text[len(mark) : -len(mark)]
        if inner and text == f"{mark}{inner}{mark}" and mark not in inner:
            text = inner.strip()
    if not text or _patterns(task)["echo"].match(text):
        raise ParseError(f"an empty {_word(task)}")
    return text
