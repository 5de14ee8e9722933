"""The checks a pair must pass: each looks at one pair and gives the detail of a fault, or None.

`difference` and `similarity` ask whether a pair teaches a clear preference; the others whether its
summaries are summaries at all. Every check has a name, by which `build_pairs --keep` turns it off.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from langdetect import DetectorFactory, LangDetectException, detect
from rapidfuzz.distance import Levenshtein

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


@dataclass(frozen=True)
class Limits:
    """The thresholds of the checks that have one, and how tokens are counted."""

    max_similarity: float
    min_difference: float
    max_repetition: float
    max_tokens: int
    count_tokens: Callable[[str], int]


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


def too_close(pair: dict, limits: Limits) -> str | None:
    difference = pair["ratings"][0] - pair["ratings"][1]
    return f"difference {difference:g}" if difference <= limits.min_difference else None


def too_alike(pair: dict, limits: Limits) -> str | None:
    alike = similarity(pair)
    return f"similarity {alike:.3f}" if alike > limits.max_similarity else None


def longer_than_source(pair: dict, limits: Limits) -> str | None:
    n_source = len(pair["prompt"].split())
    n_longest = max(len(summary.split()) for summary in summaries(pair))
    return f"{n_longest} of {n_source} words" if n_longest > n_source else None


def other_language(pair: dict, limits: Limits) -> str | None:
    source = language(pair["prompt"][:1000])
    others = [found for s in summaries(pair) if (found := language(s)) not in ("", source)]
    return f"{others[0]} for {source}" if source and others else None


def only_lead(pair: dict, limits: Limits) -> str | None:
    source = " ".join(pair["prompt"].split())
    copied = any(source.startswith(" ".join(summary.split())) for summary in summaries(pair))
    return "a summary opens the text word for word" if copied else None


def refusal(pair: dict, limits: Limits) -> str | None:
    return next((s[:60] for s in summaries(pair) if REFUSAL.match(s)), None)


def repetitive(pair: dict, limits: Limits) -> str | None:
    worst = max(repetition(summary) for summary in summaries(pair))
    return f"{worst:.0%} of 4-grams" if worst > limits.max_repetition else None


def too_long(pair: dict, limits: Limits) -> str | None:
    """Prompt, template and longer answer against the training length.

    An answer's bytes bound its tokens from above, so most answers need no tokenizer.
    """
    room = limits.max_tokens - pair["n_tokens"] - TURN_TOKENS
    if all(len(summary.encode()) <= room for summary in summaries(pair)):
        return None
    longest = max(map(limits.count_tokens, summaries(pair)))
    return f"{pair['n_tokens'] + TURN_TOKENS + longest} tokens" if longest > room else None


def summaries(pair: dict) -> tuple[str, str]:
    return pair["chosen"], pair["rejected"]


CHECKS: dict[str, tuple[str, Callable[[dict, Limits], str | None]]] = {
    "difference": ("scores too close", too_close),
    "similarity": ("summaries too alike", too_alike),
    "length": ("over the training length", too_long),
    "longer": ("a summary longer than its source", longer_than_source),
    "refusal": ("a refusal", refusal),
    "repetition": ("a summary that repeats itself", repetitive),
    "lead": ("only the source's first sentences", only_lead),
    "language": ("another language than its source", other_language),
}
PAIR_CHECKS = ("difference", "similarity", "length")  # of no concern for a reference


def fault(pair: dict, split: str, limits: Limits, keep: list[str]) -> tuple[str, str] | None:
    """(reason, detail) of the first check that the pair fails, or None.

    Of a test pair only the chosen summary counts, as the reference.
    """
    if split == "test":
        pair, keep = {**pair, "rejected": pair["chosen"]}, [*keep, *PAIR_CHECKS]
    for name, (reason, check) in CHECKS.items():
        if name not in keep and (detail := check(pair, limits)):
            return reason, detail
    return None
