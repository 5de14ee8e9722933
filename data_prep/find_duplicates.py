"""Tell near duplicates, and runs of words that test and training texts share."""

import re

import numpy as np
import xxhash

RUN = 13  # words; the n-gram by which GPT-3 was cleared of its test sets (Brown et al., 2020)
SHINGLE, BANDS, ROWS = 5, 14, 8  # datatrove's MinHash settings: a Jaccard index over about 0.75
DRAW = np.random.default_rng(1).integers(0, 1 << 63, (2, BANDS * ROWS), np.uint64)


def ngrams(text: str, n: int) -> np.ndarray:
    """64-bit hashes of all runs of `n` lower-cased words, in order; of all words if fewer."""
    words = re.findall(r"\w+", text.lower()) or [text]
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)
    found = np.zeros(max(1, len(hashes) - n + 1), np.uint64)
    for i in range(min(n, len(hashes))):
        found = found * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(found)]
    return found ^ (found >> np.uint64(31))


class Duplicates:
    """Near duplicates of what was kept, and runs of words shared with test documents.

    Near means a likely Jaccard index of word 5-grams over 0.75 by MinHash (Broder, 1997), in one
    pass in memory: only what fills the caps is ever looked at, some 20,000 extracts.
    """

    def __init__(self):
        self.bands, self.test_runs = set(), set()

    def reason(self, text: str, split: str) -> str | None:
        """Why `text` is not to be kept, or None, and from then on it counts as kept."""
        runs = ngrams(text, RUN).tolist()
        if split == "train" and not self.test_runs.isdisjoint(runs):
            return "shares a run of words with a test document"
        factors, terms = DRAW[0] * np.uint64(2) + np.uint64(1), DRAW[1]
        smallest = (ngrams(text, SHINGLE)[:, None] * factors + terms).min(axis=0)
        bands = {(i, band.tobytes()) for i, band in enumerate(smallest.reshape(BANDS, ROWS))}
        if not bands.isdisjoint(self.bands):
            return "near duplicate"
        self.bands |= bands
        self.test_runs.update(runs if split == "test" else ())
        return None
