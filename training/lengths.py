"""The lengths of the prompts that a student was taught on, kept beside its adapter."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low, quantiles

from common.files import read_json, write_text

FILE = "lengths.json"  # of a run's folder; it goes to the Hub with the adapter


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prompts as trained, with all that template and chat template put around a text:
    of `n` prompts the least, the median, what 95% of them do not pass, and the most."""

    n: int
    least: int
    median: int
    most_of_95_percent: int
    most: int


def lengths_of(tokens: list[int]) -> Lengths | None:
    """Of the numbers of tokens of prompts; None of none."""
    if not tokens:
        return None
    # "inclusive": never beyond the longest, and of one prompt (twice, for quantiles) its own.
    highest = quantiles([*tokens, *tokens[:1]], n=20, method="inclusive")[-1]
    return Lengths(len(tokens), min(tokens), median_low(tokens), round(highest), max(tokens))


def write_lengths(folder: Path, lengths: Lengths | None) -> None:
    if lengths:
        write_text(folder / FILE, json.dumps(asdict(lengths), indent=2) + "\n")


def read_lengths(folder: Path) -> Lengths | None:
    """What a run's or an adapter's folder tells; None where it tells nothing, or nothing usable."""
    told = read_json(folder / FILE)
    try:
        lengths = Lengths(**{name: int(told[name]) for name in Lengths.__dataclass_fields__})
    except (KeyError, TypeError, ValueError, OverflowError):  # the last of Infinity
        return None
    return lengths if 0 < lengths.most_of_95_percent <= lengths.most else None
