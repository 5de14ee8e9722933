"""The checks that a pair must pass, each with the limit that the task (or --check) names.

A check is one entry of ALL_CHECKS, which says also what the dataset's card tells of it: a new one
is a function and an entry in this file, and a test. An answer's checks are made of the chosen one,
and of the rejected one only if the teacher wrote it: a student's bad answer is a good one to
reject. Of a test pair only the chosen answer counts.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import nan
from typing import Protocol

from rapidfuzz.distance import Levenshtein

from common.cli import UserError, one_line
from data_prep.count_tokens import load_counter
from data_prep.find_facts import invented_facts
from prompts.task import Task

# What a text may be told to be; of the smaller languages some are taken for lists of names.
LANGUAGES = "ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr"
LANGUAGES += " ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh"
TURN_TOKENS = 48  # more than the chat templates of the small students put around a pair
FUNCTION_WORDS = set(re.findall(r"\w+", "the of and to in a is that for it as was with by on"))
REFUSAL = re.compile(
    r"(?i)(I('m| am) (sorry|unable|not able)|I (cannot|can't|won't)|As an? (AI|language model))\b"
)


def repetition(text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that repeat an earlier one, 0 to 1."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


@cache
def load_detector():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # takes a second

    detector = LanguageIdentifier.from_model_file(MODEL_FILE)
    detector.set_languages(LANGUAGES.split())
    return detector


def detect(text: str) -> str:
    """The two-letter code of the likeliest language (langid.py, Lui and Baldwin 2012)."""
    return str(load_detector().classify(text)[0])


def language(text: str) -> str:
    """Two-letter code; "" for a text too short to tell. Plain English takes a short way."""
    words = text.lower().split()
    if sum(word in FUNCTION_WORDS for word in words) > 0.2 * len(words) > 2:
        return "en"
    return detect(text) if len(text) > 100 and re.search(r"[^\W\d_]", text) else ""


def n_tokens(pair: dict, most: float, tokenizer: str, task: Task) -> int:
    """Of prompt and longer answer; a bound where that is at most `most`, as bytes are of tokens."""
    prompt = task.student_messages(pair["prompt"], task.student_template())[0]["content"]
    texts = prompt, pair["chosen"], pair["rejected"]
    whole, *answers = (len(text.encode(errors="replace")) for text in texts)
    if whole + max(answers) + TURN_TOKENS > most:  # so short pairs need no tokenizer
        count = load_counter(tokenizer).count
        whole, *answers = (count(text) for text in texts)
    return whole + max(answers) + TURN_TOKENS


class Checking(Protocol):
    """What the checks are made with: check -> limit, and the tokenizer that counts a length."""

    limits: dict[str, float]
    tokenizer: str


@dataclass(frozen=True)
class Check:
    """A reason to drop a pair.

    `fault` says what is wrong, "" if nothing is: of a pair and the limit where the check is one of
    `of_pair`, of an answer, its text and the limit where it is one of `of_answer`. `sentence` is
    what the card says: of what kind of pair is dropped, with {limit} and the task's word {answer}.
    """

    name: str
    sentence: str
    least: float = 0  # limits, of which a smaller or larger one could never be met or failed
    largest: float = 1
    of_pair: Callable[[dict, float, Checking, Task], str] | None = None
    of_answer: Callable[[str, str, float], str] | None = None
    chosen_alone: bool = False  # a rejected answer may well have this fault
    is_switch: bool = False  # its limit is true or false
    in_test: bool = True

    def sentence_for(self, limit: float, task: Task) -> str:
        return self.sentence.format(limit=limit, answer=task.hub["answer"])


def fault_of_difference(pair: dict, limit: float, checking: Checking, task: Task) -> str:
    if not pair["ratings"]:
        return ""
    chosen, rejected = pair["ratings"]
    return f"scores {chosen:g} and {rejected:g}" if chosen - rejected <= limit else ""


def fault_of_similarity(pair: dict, limit: float, checking: Checking, task: Task) -> str:
    # Below the cutoff, which two unlike long texts reach soon, it says 0.
    alike = Levenshtein.normalized_similarity(pair["chosen"], pair["rejected"], score_cutoff=limit)
    return f"Levenshtein similarity {alike:.3f}" if alike > limit else ""


def fault_of_length(pair: dict, limit: float, checking: Checking, task: Task) -> str:
    length = n_tokens(pair, limit, checking.tokenizer, task)
    return f"{length} tokens" if length > limit else ""


def fault_of_longer(answer: str, text: str, limit: float) -> str:
    n_answer, n_text = len(answer.split()), len(text.split())
    return f"{n_answer} of {n_text} words" if n_answer > limit * n_text else ""


def fault_of_refusal(answer: str, text: str, limit: float) -> str:
    return answer[:60] if REFUSAL.match(answer) else ""


def fault_of_repetition(answer: str, text: str, limit: float) -> str:
    repeated = repetition(answer)
    return f"{repeated:.0%} of 4-grams" if repeated > limit else ""


def fault_of_lead(answer: str, text: str, limit: float) -> str:
    words = answer.split()
    opens = words == text.split()[: len(words)]
    return "it opens the text word for word" if opens else ""


def fault_of_language(answer: str, text: str, limit: float) -> str:
    ours, theirs = language(answer), language(text[:1000])
    return f"{ours} for {theirs}" if ours and theirs and ours != theirs else ""


def fault_of_invented(answer: str, text: str, limit: float) -> str:
    return ", ".join(fact.text for fact in invented_facts(answer, text))


# The first fault is the one that is told, so what is quick or says most stands first.
ALL_CHECKS = (
    Check(
        name="difference",
        largest=1000,
        sentence="the two scores differ by {limit:g} or less",
        of_pair=fault_of_difference,
    ),
    Check(
        name="similarity",
        sentence="the two are alike, with a Levenshtein similarity over {limit:g}",
        of_pair=fault_of_similarity,
    ),
    Check(
        name="length",
        least=1,
        largest=10_000_000,
        sentence="prompt and {answer} together have more than {limit:,.0f} tokens",
        of_pair=fault_of_length,
    ),
    Check(
        name="longer",
        largest=1_000_000,
        sentence="the {answer} has more words than {limit:g} times those of its text",
        of_answer=fault_of_longer,
    ),
    Check(
        name="refusal",
        sentence="the {answer} is a refusal",
        of_answer=fault_of_refusal,
        is_switch=True,
    ),
    Check(
        name="repetition",
        sentence="over {limit:.0%} of the {answer}'s 4-grams are repeated",
        of_answer=fault_of_repetition,
    ),
    Check(
        name="lead",
        sentence="the {answer} opens the text word for word",
        of_answer=fault_of_lead,
        is_switch=True,
    ),
    Check(
        name="language",
        sentence="the {answer} is in another language than its text",
        of_answer=fault_of_language,
        is_switch=True,
    ),
    Check(
        name="invented",
        sentence="the chosen {answer} of a training pair holds a name or number that its text"
        " lacks",
        of_answer=fault_of_invented,
        chosen_alone=True,
        is_switch=True,
        # A test text on which the teacher slips is one on which others slip: without it, all would
        # look truer than they are.
        in_test=False,
    ),
)
CHECKS = {check.name: check for check in ALL_CHECKS}
WORDS = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}


def limits_of(task: Task, given: list[str], keep: list[str]) -> dict[str, float]:
    """check -> limit, of the checks to make; `given`: NAME=LIMIT. Raises UserError."""
    path = task.folder / "task.yaml"
    options = {}
    for option in given:
        name, _, value = option.partition("=")
        options[name] = value
    for place, names in {path: task.checks, "--check": options, "--keep": keep}.items():
        if unknown := ", ".join(sorted(set(names) - CHECKS.keys())):
            raise UserError(f"{place}: no check {unknown}; the checks are {', '.join(CHECKS)}")
    limits = {name: _limit(f"{path}: checks", name, value) for name, value in task.checks.items()}
    limits |= {name: _limit("--check", name, value) for name, value in options.items()}
    return {name: limit for name, limit in limits.items() if name not in keep}


def _limit(place: str, name: str, value: object) -> float:
    """A check's limit as a number. Raises UserError if it is none, or out of range."""
    check = CHECKS[name]
    number = f"a number from {check.least} to {check.largest:,}"
    wanted = "true or false" if check.is_switch else number
    limit = WORDS.get(str(value).strip().lower())
    if limit is None:
        try:
            limit = float(value)
        except (TypeError, ValueError):
            limit = nan
    in_range = check.least <= limit <= check.largest
    if not in_range or (check.is_switch and limit not in (0, 1)):
        raise UserError(f"{place}: {name} is {wanted}, not {one_line(repr(value), 40)}")
    return limit


def sentences_of(limits: dict[str, float], task: Task) -> dict[str, str]:
    """check -> what the dataset's card says of it, of the checks that are made."""
    sentences = {}
    for name, limit in limits.items():
        if limit or not CHECKS[name].is_switch:
            sentences[name] = CHECKS[name].sentence_for(limit, task)
    return sentences


def checks_for(limits: dict[str, float], split: str) -> list[tuple[Check, float]]:
    """The checks with their limits that are made of the pairs of a split."""
    made = []
    for name, check in CHECKS.items():
        limit = limits.get(name)
        is_off = limit is None or (check.is_switch and not limit)
        is_of_train = check.of_pair or not check.in_test
        if not is_off and (split == "train" or not is_of_train):
            made.append((check, limit))
    return made


def pair_faults(
    pair: dict, split: str, checking: Checking, task: Task
) -> Iterator[tuple[str, str]]:
    """(check, detail) a pair fails: does it teach a clear preference between two answers?"""
    checks = checks_for(checking.limits, split)
    for check, limit in checks:
        if check.of_pair and (fault := check.of_pair(pair, limit, checking, task)):
            yield check.name, fault
    sides = ["chosen"]
    if split == "train" and pair["rejected_by"] == "teacher":
        sides.append("rejected")
    for side in sides:
        for check, limit in checks:
            if not check.of_answer or (check.chosen_alone and side != "chosen"):
                continue
            if fault := check.of_answer(pair[side], pair["prompt"], limit):
                yield check.name, fault
