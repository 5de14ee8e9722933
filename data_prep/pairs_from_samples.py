"""Pairs of a run's own sampled answers: one that its text supports over one that it does not.

The two differ in quality, not in whose style they are; no teacher is asked (as in SummLlama,
arXiv:2410.13116, and on-policy preference data at large). `just answers RUN --split unseen` makes
the samples, of extracts that the run was not trained on.
"""

from collections.abc import Iterator

from tqdm import tqdm

from common.text import count_words, likeness
from data_prep.candidates import Candidate, Checks, NoPair, new_pair
from data_prep.find_facts import find_facts, invented_facts


def pick_sides(text: str, samples: list[str]) -> tuple[str, str]:
    """(chosen, rejected) of the sampled answers to a text.

    Chosen is one whose names and numbers the text holds, and which has any: of those the one most
    like all samples. Rejected is one with a name or number that the text lacks: of those that are
    not longer than the chosen one, or else of all, the one nearest to it in words. Longer answers
    invent more often, so without that the rejected are longer on average, and training would learn
    to be short. Raises NoPair if there is none of either.
    """
    supported, unsupported = [], []
    for index, sample in enumerate(samples):
        if invented_facts(sample, text):
            unsupported.append(index)
        elif find_facts(sample):
            supported.append(index)
    if not supported:
        raise NoPair("no sample that its text supports, with a name or number")
    if not unsupported:
        raise NoPair("no sample with a name or number that its text lacks")
    alike = likeness(samples)
    chosen = samples[max(supported, key=lambda index: alike[index])]
    n_words = count_words(chosen)

    def apart(index: int) -> tuple[bool, int]:
        longer_by = count_words(samples[index]) - n_words
        return longer_by > 0, abs(longer_by)

    return chosen, samples[min(unsupported, key=apart)]


def whole_samples(record: dict) -> list[str]:
    """The sampled answers that came to their end: where one was cut, length is the difference."""
    samples = [s["text"] for s in record["samples"] if s["finish_reason"] == "stop"]
    return [text for text in samples if text.strip()]


def pairs_of_samples(
    extracts: dict[str, dict], records: dict[str, dict], by: str, checks: Checks
) -> Iterator[Candidate]:
    """What becomes of each extract, by the `records` of its samples; both by the extract's id."""
    for key, extract in tqdm(extracts.items(), desc="pairs of samples", unit="text"):
        candidate = Candidate("samples", "train", {"id": key, "model": by})
        if key not in records:
            yield candidate.dropped(f"no samples by {by}")
            continue
        samples = whole_samples(records[key])
        try:
            chosen, rejected = pick_sides(extract["text"], samples)
        except NoPair as error:
            yield candidate.dropped(str(error), f"of {len(samples)} whole samples")
            continue
        pair = new_pair(extract, "samples")
        pair |= {"chosen": chosen, "rejected": rejected, "chosen_by": by, "rejected_by": by}
        yield checks.passed(Candidate("samples", "train", candidate.made_of, pair))
