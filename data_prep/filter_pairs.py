"""The checks a pair must pass, by the names by which `build_pairs --keep` leaves them out.

`settings` are the options of build_pairs, which hold the thresholds.
"""

import re

from langdetect import DetectorFactory, LangDetectException, detect
from rapidfuzz.distance import Levenshtein

from data_prep.count_tokens import load_counter

DetectorFactory.seed = 0  # langdetect draws at random otherwise
TURN_TOKENS = 48  # more than the chat templates of the small students put around a pair
FUNCTION_WORDS = frozenset(
    re.findall(r"\w+", "the of and to in a is that for it as was with by on")
)
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


def too_close(pair: dict, settings: dict) -> bool:
    return pair["ratings"][0] - pair["ratings"][1] <= settings["min_difference"]


def too_alike(pair: dict, settings: dict) -> bool:
    return similarity(pair) > settings["max_similarity"]


def too_long(pair: dict, settings: dict) -> bool:
    """Whether prompt, template and longer answer exceed the training length."""
    room = settings["max_tokens"] - pair["n_tokens"] - TURN_TOKENS
    # Bytes bound tokens from above, so most answers need no tokenizer.
    long = [s for s in (pair["chosen"], pair["rejected"]) if len(s.encode()) > room]
    return any(load_counter(settings["tokenizer"]).count(summary) > room for summary in long)


def longer_than_source(summary: str, source: str, settings: dict) -> bool:
    return len(summary.split()) > len(source.split())


def refusal(summary: str, source: str, settings: dict) -> bool:
    return bool(REFUSAL.match(summary))


def repetitive(summary: str, source: str, settings: dict) -> bool:
    return repetition(summary) > settings["max_repetition"]


def only_lead(summary: str, source: str, settings: dict) -> bool:
    return " ".join(source.split()).startswith(" ".join(summary.split()))


def other_language(summary: str, source: str, settings: dict) -> bool:
    found, wanted = language(summary), language(source[:1000])
    return "" not in (found, wanted) and found != wanted


OF_PAIR = {  # whether a pair teaches a clear preference
    "difference": ("scores too close", too_close),
    "similarity": ("summaries too alike", too_alike),
    "length": ("over the training length", too_long),
}
OF_SUMMARY = {  # whether a summary is one at all
    "longer": ("a summary longer than its source", longer_than_source),
    "refusal": ("a refusal", refusal),
    "repetition": ("a summary that repeats itself", repetitive),
    "lead": ("only the source's first sentences", only_lead),
    "language": ("another language than its source", other_language),
}
CHECKS = OF_PAIR | OF_SUMMARY


def fault(pair: dict, split: str, settings: dict) -> str | None:
    """Why to drop the pair, or None. Of a test pair only the chosen summary counts."""
    keep, summaries = settings["keep"], [pair["chosen"]]
    if split == "train":
        summaries.append(pair["rejected"])
        for name, (reason, fails) in OF_PAIR.items():
            if name not in keep and fails(pair, settings):
                return reason
    for name, (reason, fails) in OF_SUMMARY.items():
        if name not in keep and any(fails(s, pair["prompt"], settings) for s in summaries):
            return reason
    return None
