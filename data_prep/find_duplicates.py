"""Tell near duplicates, and runs of words that test and training texts share."""

import re

import numpy as np
import xxhash

RUN = 13  # words; the n-gram by which GPT-3 was cleared of its test sets (Brown et al., 2020)
SHINGLE, BANDS, ROWS = 5, 14, 8  # datatrove's MinHash settings: a Jaccard index over about 0.75
FACTORS, TERMS = np.random.default_rng(1).integers(0, 1 << 63, (2, BANDS * ROWS), np.uint64)


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
        self.marks, self.test_runs = set(), set()

    def reason(self, extract: dict) -> str | None:
        """Why not to keep an extract; if there is no reason, it counts as kept from then on."""
        runs = ngrams(extract["text"], RUN).tolist()
        if extract["split"] == "train" and not self.test_runs.isdisjoint(runs):
            return "shares a run of words with a test document"
        hashes = ngrams(extract["text"], SHINGLE)[:, None] * (FACTORS | np.uint64(1)) + TERMS
        bands = [
            (i, band.tobytes()) for i, band in enumerate(hashes.min(axis=0).reshape(BANDS, ROWS))
        ]
        if not self.marks.isdisjoint([extract["id"], *bands]):
            return "near duplicate"
        self.marks.update([extract["id"], *bands])
        if extract["split"] == "test":
            self.test_runs.update(runs)
        return None
