"""Read a teacher's reply with regular expressions: two rated answers, or one, or a verdict.

The readers meet what models really write: labels in bold or as headings, scores as 17/18 or
5 + 5 + 3 + 4 = 17, code fences, <think> blocks. What an answer is called and what it is rated on
comes from the task. Where there is no honest reading they say why.

A reply may be anything, so every pattern takes time in proportion to its length: what may be
repeated is taken once and for all (`*+`, `++`) wherever what follows cannot begin with it.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from common.text import whole
from prompts.schema import MARKUP, shown_words
from prompts.task import Task

BLANKED = str.maketrans(dict.fromkeys(MARKUP, " "))  # read as blanks, so that places stay
LONGEST = 300_000  # characters of a reply; some 75,000 tokens
BREAKS = re.compile(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")  # other ways to end a line
# "<think> ... </think>" at the start of a reply. A block further down is one that is quoted.
THOUGHT = re.compile(r"(?is)\A(?:\s*+<(think\w{0,20}|reasoning)>.*?</\1>)+")
UNFINISHED = re.compile(r"(?i)\A\s*+<(think\w{0,20}|reasoning)>")
# Where the endpoint's template opens the block itself a reply begins inside of it; then the
# closing tag stands on a line of its own, and no opening one before it.
CLOSING = re.compile(r"(?im)^[ \t]*+</(?:think\w{0,20}|reasoning)>[ \t]*+$")
OPENING = re.compile(r"(?i)<(?:think\w{0,20}|reasoning)>")
FENCE = re.compile(r"(?m)^[ \t]*+(?:`{3,}|~{3,})(?P<info>[\w+.#-]*)[ \t]*+$")  # "```python"
RULE = re.compile(r"(?m)^[ \t]*+(?:-{3,}|\*{3,}|_{3,})[ \t]*+$")  # "---"
OPEN = r"^[ \t]*+(?:[-\u2022][ \t]++)?"  # what may stand before a label: "  - Total score"
# Behind it a note in parentheses, then a colon, a dash or the end of the line: " (out of 18):".
END = r"[ \t]*+(?:\([^()\n]*+\))?[ \t]*+(?::|[-\u2013\u2014=](?=[ \t])|$)"
SCORE = (  # "17", "17/18", "17 out of 18", "5 + 5 + 3 + 4 = 17", "<17>" with its markup blanked
    r"(?:\(?(?:[\d.+ \t]*+=)?[ \t(]*+(?P<score>\d++(?:\.\d++)?)"
    r"(?P<range>[ \t]*+(?:to|or|[-\u2013])[ \t]*+\d)?[ \t)]*+"
    r"(?:(?:/|out[ \t]++of)[ \t]*+(?P<of>\d++)|points?)?[ \t).,;]*+(?P<word>\w)?)?"
)
# What may lead to an answer in a reply's first line, blanks single and in small letters:
# "sure! here's a fitting title for this text:", "the title is:", "below is my summary:". The name
# of the answer must end the line or be followed by "of", "for", ... : "the paper's summary
# statistics are:" is the answer's own.
TAIL = r"s?(?: (?:of|for|in|that|which|with|based|as|from|to|you|about|at|using|under|below)\b.*)?"
SURE = r"(?:sure|certainly|of course|okay|ok|absolutely|gladly|yes)(?: thing)?"
PREFACES = (
    # "sure!"
    SURE + r"[!,.]?",
    # "certainly! the title you asked for"
    SURE + r"[!,.:;\u2014-] .*\b(?:here|below|following|you asked|requested|{name})\b.*",
    # "i have read it. here is a short and fitting title for this text"
    r"(?:.*[,.!:] )?(?:here(?: is| are|'s)|below(?: is| are)|the following is)"
    r"(?: (?!what|how|why|where)\S+){0,6}? (?:{name})" + TAIL,
    # "i would propose the following short title"
    r".*\bthe following (?:\S+ ){0,3}?(?:{name})" + TAIL,
    # "my suggested title for the text would be"
    r"(?:the|my|a|an|one|your) (?:\S+ ){0,3}?(?:{name})(?: (?:of|for) .*)?"
    r" (?:is|would be|could be|might be|may be|reads)(?: as follows| this| the following| below)?",
)
MOST_OF_A_PREFACE = 200  # characters


class ParseError(ValueError):
    """A reply without an honest reading; the message is the reason, in a few words."""


class ParsedReply(NamedTuple):
    """Two answers in the order given, with their totals; `best` is 0 or 1, or None if unrated."""

    answers: tuple[str, str]
    scores: tuple[float | None, float | None]
    criteria: tuple[dict[str, float], dict[str, float]]
    best: int | None


def _spoken(name: str) -> str:
    """A pattern for a label or criterion in a text whose markup was made blank."""
    return r"[ \t]++".join(map(re.escape, shown_words(name))) or "(?!)"


@dataclass(frozen=True)
class Patterns:
    """What the parts of a reply are found by, in a text without markup."""

    label: re.Pattern  # of one of two answers; groups n, nth and below say which
    field: re.Pattern  # a line of a rating: its criterion, total or prose, and score
    verdict: re.Pattern  # which answer is the best, n; none of a draw
    one: re.Pattern  # the label before the only answer
    echo: re.Pattern  # a placeholder of the prompt in place of an answer


@cache
def _patterns(task: Task) -> Patterns:
    label = _spoken(task.label)
    number = r"[ \t]*+(?:number|no\.?)?[ \t]*+"
    criteria = "|".join(map(_spoken, task.criteria)) or "(?!)"
    labels = (
        # "Summary 1:", "- Summary no. 2 (the longer one)", "Summary two - "
        rf"{OPEN}{label}{number}(?P<n>[12]|one|two){END}",
        # "The first summary:"
        rf"{OPEN}(?:the[ \t]++)?(?P<nth>first|second)[ \t]++{label}{END}",
        # "Summary:" and on the line below "1."
        rf"{OPEN}{label}[ \t]*+:?(?:[ \t]*+\n)++{OPEN}(?P<below>[12])[ \t.:]*+$",
    )
    names = (
        # "Coherence"
        rf"(?P<criterion>{criteria})",
        # "Total score", "Overall rating"
        r"(?P<total>(?:total|overall|final)(?:[ \t]++(?:score|rating))?|score|rating)",
        # "Explanation", and "Scores:" alone on its line
        r"(?P<prose>explanation|justification|reasoning|rationale"
        r"|(?:scores|ratings|evaluation)(?=[ \t:]*+$))",
    )
    # "Total score for summary 1: 17/18"
    field = (
        rf"{OPEN}(?:{'|'.join(names)})(?:[ \t]++score)?(?:[ \t]++(?:for|of)[ \t\w]++)?{END}{SCORE}"
    )
    verdict = (
        # "Best summary:", "The better one is"
        rf"{OPEN}(?:the[ \t]++)?(?:best|better|preferred|winner|winning)"
        rf"(?:[ \t]++(?:{label}|one))?(?:{END}|[ \t]++(?:is|=)[ \t:]*+)"
        # "Summary 2", "the second", "a tie"
        rf"\W*+(?:the[ \t]++)?(?:{label}{number})?\W*+"
        r"(?:(?P<n>[12]|one|two|first|second)|0|zero|neither|(?:a[ \t]++)?(?:tie|draw))\b"
        # but not "1/2", "1.5", "1 or 2", "1, 2"
        r"(?![/.]\d)(?!\s*+(?:or\b|and\b|/|,\s*+[012]\b))"
    )

    def compiled(pattern: str) -> re.Pattern:
        return re.compile(pattern, re.IGNORECASE | re.MULTILINE)

    return Patterns(
        label=compiled("|".join(labels)),
        field=compiled(field),
        verdict=compiled(verdict),
        one=compiled(rf"\A\s*+{label}[ \t]*+(?::|$)"),  # "Title: "
        echo=compiled(rf"\A[<(\[].{{0,60}}{label}.{{0,60}}[>)\]]\Z"),  # "[the summary]"
    )


@cache
def _prefaces(task: Task) -> re.Pattern:
    """A first line that introduces an answer, without its colon."""
    name = f"{_spoken(task.label)}|{_spoken(_word(task))}".replace(r"[ \t]++", " ")
    lines = (one.replace("{name}", name) for one in PREFACES)
    return re.compile("|".join(f"(?:{line})" for line in lines), re.IGNORECASE)


def parse_reply(reply: str, task: Task, rated: bool = True) -> ParsedReply:
    """Read two answers, if `rated` with scores and a verdict that agree. Raises ParseError."""
    text = _bare(reply)
    plain = text.translate(BLANKED)
    verdicts = [match for match in _patterns(task).verdict.finditer(plain) if match["n"]]
    end = verdicts[-1].start() if verdicts else len(text)
    named = _nth(verdicts[-1]["n"]) if verdicts else 0
    labels = list(_patterns(task).label.finditer(plain, 0, end))
    if [_nth(match[match.lastgroup]) for match in labels] != [1, 2]:
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
    text = _unwrapped(_without_preface(_bare(reply), task), task)
    if match := _patterns(task).one.match(text.translate(BLANKED)):
        text = _unwrapped(_after(text, match), task)
    return text


def _without_preface(text: str, task: Task) -> str:
    """A reply without a first line that introduces the answer: "Here is the title:"."""
    line, _, rest = text.partition("\n")
    words = " ".join(line.translate(BLANKED).replace("\u2019", "'").split())
    if len(line) > MOST_OF_A_PREFACE or not words.endswith(":") or not rest.strip():
        return text
    match = _prefaces(task).fullmatch(words[:-1].rstrip())
    return rest if match else text


def read_better(text: str, task: Task) -> int | None:
    """Which of two answers a judge names as the better one, 1 or 2; 0 a draw, None unreadable."""
    try:
        *_, last = _patterns(task).verdict.finditer(_bare(text).translate(BLANKED))
    except ValueError:  # nothing to unpack, or a ParseError
        return None
    return _nth(last["n"]) if last["n"] else 0


def _nth(word: str) -> int:
    """1 for "1", "one" and "first", 2 for "2", "two" and "second" (also "\u017fecond", to `re`)."""
    return 1 if word[0] in "1oOfF" else 2


def _word(task: Task) -> str:
    return task.hub.get("answer", "answer")


def _bare(reply: str) -> str:
    """A reply without thoughts before it and a code fence around it. Raises ParseError."""
    if not isinstance(reply, str):
        raise ParseError("it is no text")
    if len(reply) > LONGEST:
        raise ParseError(f"over {LONGEST:,} characters")
    text = whole(reply)
    text = re.sub(r"\n{3,}", "\n\n", BREAKS.sub("\n", text)).strip().removeprefix("\ufeff")
    for _ in range(3):  # a fence in thoughts' wake, thoughts in a fence
        before, text = text, _unfenced(THOUGHT.sub("", text).strip()).strip()
        if text == before:
            break
    if UNFINISHED.match(text):
        raise ParseError("cut off while thinking")
    end = CLOSING.search(text)
    if end and not OPENING.search(text, 0, end.start()):
        fences = [*FENCE.finditer(text, 0, end.start())]
        if len(fences) % 2 == 0:  # in a code block the tag is quoted
            return _unfenced(text[end.end() :].strip()).strip()
    return text


def _unfenced(text: str) -> str:
    """A text without the code fence around the whole of it, if there is one; those within stay."""
    end = text.rfind("\n") + 1
    first, last = FENCE.match(text), FENCE.match(text, end)
    if not first and not last:
        return text
    depth = closed = 0  # a fence with a language opens a block, also in another one
    for number, fence in enumerate(FENCE.finditer(text), 1):
        depth += 1 if fence["info"] or not depth else -1
        closed += not depth
        if (closed and fence.end() < len(text)) or number > 10_000:
            return text  # a block that begins the text and another that ends it
    if number == 1:  # the other one stood in another part of the reply
        return text[first.end() :] if first else text[:end]
    return text[first.end() : end] if first and last else text


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
    written, lines = text.split("\n"), text.translate(BLANKED).split("\n")
    fields = [_field_of(line, task) for line in lines]
    start = _start_of_fields(fields, written, lines)
    answer = _unwrapped("\n".join(written[:start]), task)
    total, criteria, problem = _read_scores([match for match in fields[start:] if match], task)
    if problem and rated:
        raise ParseError(problem)
    return (answer, None, {}) if problem else (answer, total, criteria)


def _field_of(line: str, task: Task) -> re.Match | None:
    """A line of a rating: a name with a number, or one that a text follows."""
    match = _patterns(task).field.match(line)
    return match if match and (match["score"] or match["prose"]) else None


def _start_of_fields(fields: list[re.Match | None], written: list[str], lines: list[str]) -> int:
    """The number of the line at which an answer ends and its rating begins.

    An answer may hold lines like "Rating: R." too. So the rating begins with the first criterion
    that has a plain number, or else with the last total; and with the fields directly above it.
    `lines` are those that were `written`, without markup.
    """
    rated_at = [i for i, m in enumerate(fields) if m and m["criterion"] and not m["word"]]
    total_at = [i for i, m in enumerate(fields) if m and m["total"]]
    start = min(rated_at, default=max(total_at, default=len(lines)))
    while start:
        above = start - 1
        # The fence of a code block at the answer's end is a part of it.
        is_blank = not lines[above].strip(" \t-") and not FENCE.fullmatch(written[above])
        if not fields[above] and not is_blank:
            break
        start = above
    return start


def _read_scores(fields: list[re.Match], task: Task) -> tuple[float | None, dict[str, float], str]:
    """(total, criteria, what is wrong with them or "") of the lines of a rating."""
    numbers = [m for m in fields if m["criterion"] and not m["range"]]
    criteria = {_criterion(m["criterion"], task): float(m["score"]) for m in numbers}
    totals = [m for m in fields if m["total"]]
    highest = task.highest_score
    missing = "a score is missing or not a number"
    if not totals:
        return None, criteria, missing
    last = totals[-1]
    total = float(last["score"])
    if last["range"] or float(last["of"] or highest) != highest:
        return total, criteria, missing
    if not task.lowest_score <= total <= highest:
        return total, criteria, f"a score outside {task.lowest_score} to {highest}"
    if len(criteria) == len(task.criteria) and sum(criteria.values()) != total:
        return total, criteria, "a total that is not the sum of its criteria"
    return total, criteria, ""


def _criterion(shown: str, task: Task) -> str:
    """The criterion that a reply shows in its own letters and blanks."""
    patterns = ((name, re.compile(_spoken(name), re.IGNORECASE)) for name in task.criteria)
    return next(name for name, pattern in patterns if pattern.fullmatch(shown))


def _trimmed(text: str) -> str:
    """A text without rules, and without an empty code block, before and after it."""
    lines = text.strip().split("\n")
    start, end = 0, len(lines)
    while start < end and (not lines[start].strip() or RULE.fullmatch(lines[start])):
        start += 1
    while start < end and (not lines[end - 1].strip() or RULE.fullmatch(lines[end - 1])):
        end -= 1
    # Where each part of a reply is in a fence of its own, the next one's opens behind this one's.
    if end - start > 2 and all(FENCE.fullmatch(line) for line in lines[end - 2 : end]):
        end -= 2
    return "\n".join(lines[start:end]).strip()


def _unwrapped(text: str, task: Task) -> str:
    """An answer without what stands around the whole of it: rules, a code fence, quotes, emphasis.

    Raises ParseError if nothing is left.
    """
    text = _trimmed(_unfenced(_trimmed(text)))
    text = re.sub(r"\n{3,}", "\n\n", text)
    for mark in ("**", "__", "*", '"'):
        inner = text[len(mark) : -len(mark)]
        if inner and text == f"{mark}{inner}{mark}" and mark not in inner:
            text = inner.strip()
    if not text or _patterns(task).echo.match(text):
        raise ParseError(f"an empty {_word(task)}")
    return text
