"""The checks a pair must pass, by the names by which `build_pairs --keep` leaves them out.

`settings` are the options of build_pairs, which hold the thresholds.
"""

import re
from collections.abc import Iterator
from itertools import chain

from langdetect import DetectorFactory, LangDetectException, detect
from rapidfuzz.distance import Levenshtein

from data_prep.count_tokens import load_counter

DetectorFactory.seed = 0  # langdetect draws at random otherwise
TURN_TOKENS = 48  # more than the chat templates of the small students put around a pair
FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "the of and to in a is that for it as was with by on")
)
CHECKS = {
    "difference": "scores too close",
    "similarity": "summaries too alike",
    "length": "over the training length",
    "longer": "a summary longer than its source",
    "refusal": "a refusal",
    "repetition": "a summary that repeats itself",
    "lead": "only the source's first sentences",
    "language": "another language than its source",
}
REFUSAL = re.compile(
    r"(?:I(?:'m| am) (?:sorry|unable|not able)|I (?:cannot|can't|won't)"
    r"|As an? (?:AI|language model))\b",
    re.IGNORECASE,
)


def similarity(pair: dict) -> float:
    """Levenshtein similarity of chosen and rejected, 0 to 1 (1 - distance / longer length)."""
    return Levenshtein.normalized_similarity(pair["chosen"], pair["rejected"])


def repetition(text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that repeat an earlier one, 0 to 1."""
    words = text.lower().split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def language(text: str) -> str:
    """Two-letter code; "" for a text too short to tell. Plain English takes a short way."""
    words = text.lower().split()
    if sum(word in FUNCTION_WORDS for word in words) > 0.2 * len(words) > 2:
        return "en"
    try:
        return detect(text) if len(text) > 100 else ""
    except LangDetectException:
        return ""


def too_long(pair: dict, settings: dict) -> list[int]:
    """The tokens of the answers that exceed the training length with prompt and template."""
    room = settings["max_tokens"] - pair["n_tokens"] - TURN_TOKENS
    # Bytes bound tokens from above, so most answers need no tokenizer.
    long = [s for s in (pair["chosen"], pair["rejected"]) if len(s.encode()) > room]
    counts = [load_counter(settings["tokenizer"]).count(summary) for summary in long]
    return [count for count in counts if count > room]


def pair_faults(pair: dict, settings: dict) -> Iterator[tuple[str, str]]:
    """(check, detail) a pair fails: does it teach a clear preference, is it short enough?"""
    if (difference := pair["ratings"][0] - pair["ratings"][1]) <= settings["min_difference"]:
        yield "difference", f"difference {difference:g}"
    if (alike := similarity(pair)) > settings["max_similarity"]:
        yield "similarity", f"similarity {alike:.3f}"
    if "length" not in settings["keep"] and (long := too_long(pair, settings)):  # may download
        yield "length", f"{pair['n_tokens'] + TURN_TOKENS + max(long)} tokens"


def summary_faults(summary: str, source: str, settings: dict) -> Iterator[tuple[str, str]]:
    """(check, detail) a summary fails: is it one at all?"""
    words, source_words = summary.split(), source.split()
    if len(words) > len(source_words):
        yield "longer", f"{len(words)} of {len(source_words)} words"
    if REFUSAL.match(summary):
        yield "refusal", summary[:60]
    if (repeated := repetition(summary)) > settings["max_repetition"]:
        yield "repetition", f"{repeated:.0%} of 4-grams"
    if words == source_words[: len(words)]:
        yield "lead", "a summary opens the text word for word"
    languages = language(summary), language(source[:1000])
    if len({*languages} - {""}) > 1:
        yield "language", "{} for {}".format(*languages)


def fault(pair: dict, split: str, settings: dict) -> tuple[str, str] | None:
    """(reason, detail) to drop the pair, or None. Of a test pair only the chosen summary counts."""
    found = summary_faults(pair["chosen"], pair["prompt"], settings)
    if split == "train":
        of_rejected = summary_faults(pair["rejected"], pair["prompt"], settings)
        found = chain(pair_faults(pair, settings), found, of_rejected)
    faults = ((CHECKS[name], why) for name, why in found if name not in settings["keep"])
    return next(faults, None)
