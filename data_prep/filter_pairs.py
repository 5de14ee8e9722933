"""The checks that a pair must pass, each with the limit that the task (or --check) names.

An answer's checks are made of the chosen one, and of the rejected one only if the teacher wrote it:
a student's bad answer is a good one to reject. Of a test pair only the chosen answer counts.
"""

import re
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from math import inf, nan

from rapidfuzz.distance import Levenshtein

from common.cli import UserError, one_line
from data_prep.count_tokens import load_counter
from prompts.task import Task

# What a text may be told to be; of the smaller languages some are taken for lists of names.
LANGUAGES = "ar bg bn ca cs da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr"
LANGUAGES += " ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh"
TURN_TOKENS = 48  # more than the chat templates of the small students put around a pair
FUNCTION_WORDS = set(re.findall(r"\w+", "the of and to in a is that for it as was with by on"))
REFUSAL = re.compile(
    r"(?i)(I('m| am) (sorry|unable|not able)|I (cannot|can't|won't)|As an? (AI|language model))\b"
)
# check -> least and largest limit, of which a larger share or number could never be passed
CHECKS = {
    "difference": (0, 1000),
    "similarity": (0, 1),
    "length": (1, 10_000_000),
    "longer": (0, 1_000_000),
    "refusal": (0, 1),
    "repetition": (0, 1),
    "lead": (0, 1),
    "language": (0, 1),
}
SWITCHES = ("refusal", "lead", "language")
WORDS = {"true": 1.0, "yes": 1.0, "on": 1.0, "false": 0.0, "no": 0.0, "off": 0.0}


def limits_of(task: Task, given: list[str], keep: list[str]) -> dict[str, float]:
    """check -> limit, of the checks to make; `given`: NAME=LIMIT. Raises UserError."""
    options, path = dict(one.partition("=")[::2] for one in given), task.folder / "task.yaml"
    for place, names in {path: task.checks, "--check": options, "--keep": keep}.items():
        if unknown := ", ".join(sorted(set(names) - CHECKS.keys())):
            raise UserError(f"{place}: no check {unknown}; the checks are {', '.join(CHECKS)}")
    limits = {name: _limit(f"{path}: checks", name, value) for name, value in task.checks.items()}
    limits |= {name: _limit("--check", name, value) for name, value in options.items()}
    return {name: limit for name, limit in limits.items() if name not in keep}


def _limit(place: str, name: str, value: object) -> float:
    """A check's limit as a number. Raises UserError if it is none, or out of range."""
    least, largest = CHECKS[name]
    wanted = "true or false" if name in SWITCHES else f"a number from {least} to {largest:,}"
    try:
        limit = WORDS.get(str(value).strip().lower())
        limit = float(value) if limit is None else limit
    except (TypeError, ValueError):
        limit = nan
    if not least <= limit <= largest or (name in SWITCHES and limit not in (0, 1)):
        raise UserError(f"{place}: {name} is {wanted}, not {one_line(repr(value), 40)}")
    return limit


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
        whole, *answers = map(load_counter(tokenizer).count, texts)
    return whole + max(answers) + TURN_TOKENS


def answer_faults(answer: str, text: str, limits: dict) -> Iterator[tuple[str, str]]:
    """(check, detail) an answer fails: is it one at all?"""
    words, text_words = answer.split(), text.split()
    if len(words) > limits.get("longer", inf) * len(text_words):
        yield "longer", f"{len(words)} of {len(text_words)} words"
    if limits.get("refusal") and REFUSAL.match(answer):
        yield "refusal", answer[:60]
    if (repeated := repetition(answer)) > limits.get("repetition", inf):
        yield "repetition", f"{repeated:.0%} of 4-grams"
    if limits.get("lead") and words == text_words[: len(words)]:
        yield "lead", "it opens the text word for word"
    languages = (language(answer), language(text[:1000])) if limits.get("language") else ()
    if len({*languages} - {""}) > 1:
        yield "language", "{} for {}".format(*languages)


def pair_faults(pair: dict, split: str, args: Namespace, task: Task) -> Iterator[tuple[str, str]]:
    """(check, detail) a pair fails: does it teach a clear preference between two answers?"""
    limits, sides = args.limits, ["chosen"]
    if split == "train":
        ratings = pair["ratings"] or (inf, -inf)
        if ratings[0] - ratings[1] <= limits.get("difference", -inf):
            yield "difference", "scores {:g} and {:g}".format(*ratings)
        most_alike = limits.get("similarity", 1.0)
        # Below the cutoff, which two unlike long texts reach soon, it says 0.
        sides_of = pair["chosen"], pair["rejected"]
        alike = Levenshtein.normalized_similarity(*sides_of, score_cutoff=most_alike)
        if alike > most_alike:
            yield "similarity", f"Levenshtein similarity {alike:.3f}"
        most = limits.get("length", inf)
        if (length := n_tokens(pair, most, args.tokenizer, task)) > most:
            yield "length", f"{length} tokens"
        sides += ["rejected"] * (pair["rejected_by"] == "teacher")
    for side in sides:
        yield from answer_faults(pair[side], pair["prompt"], limits)
