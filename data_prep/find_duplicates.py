"""Tell exact and near duplicates, and runs of words that test and training texts share."""

import re
from collections.abc import Iterable

import numpy as np
import xxhash

from common.files import digest

RUN = 13  # words; the n-gram by which GPT-3 was cleared of its test sets (Brown et al., 2020)
SHINGLE, BANDS, ROWS = 5, 14, 8  # datatrove's MinHash settings: a Jaccard index over about 0.75


def words_of(text: str) -> np.ndarray:
    """64-bit hashes of the lower-cased words, in order; the same on every machine."""
    words = re.findall(r"\w+", text.lower()) or [text]
    return np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)


def ngrams(words: np.ndarray, n: int) -> np.ndarray:
    """Hashes of all runs of `n` words, in order."""
    found = np.zeros(max(0, len(words) - n + 1), np.uint64)
    for i in range(n):
        found = found * np.uint64(0x9E3779B97F4A7C15) + words[i : i + len(found)]
    return found ^ (found >> np.uint64(31))


class Duplicates:
    """Exact and near duplicates of what was kept, and runs of words shared with test documents.

    Near means a likely Jaccard index of word 5-grams over 0.75 by MinHash (Broder, 1997), as in
    datatrove, whose four stages on disk are for billions of documents: here only what fills the
    caps is ever looked at, some 20,000 extracts, and one pass in memory does.
    """

    def __init__(self):
        draw = np.random.default_rng(1).integers(0, 1 << 63, (2, 1, BANDS * ROWS), np.uint64)
        self.factors, self.terms = draw[0] * np.uint64(2) + np.uint64(1), draw[1]
        self.texts, self.bands, self.forbidden = set(), set(), np.empty(0, np.uint64)

    def reason(self, text: str) -> str | None:
        """Why `text` is not to be kept, or None, and from then on it counts as kept."""
        words = words_of(text)
        if self._holds_forbidden_run(words):
            return "shares a run of words with a test document"
        exact = digest(*words.tolist())
        if exact in self.texts:
            return "repeated text"
        bands = self._bands(words)
        if not bands.isdisjoint(self.bands):
            return "near duplicate"
        self.texts.add(exact)
        self.bands |= bands
        return None

    def forbid_runs(self, texts: Iterable[str]) -> None:
        """Let no text be kept from now on that shares a run of RUN words with one of `texts`."""
        runs = [ngrams(words_of(text), RUN) for text in texts]
        self.forbidden = np.unique(np.concatenate([self.forbidden, *runs]))  # sorted

    def _holds_forbidden_run(self, words: np.ndarray) -> bool:
        runs, size = ngrams(words, RUN), self.forbidden.size
        places = np.searchsorted(self.forbidden, runs).clip(max=size - 1)
        return bool(size and (self.forbidden[places] == runs).any())

    def _bands(self, words: np.ndarray) -> set[tuple[int, bytes]]:
        """The smallest of the shingles' hashes by each of many hash functions, cut into bands."""
        shingles = ngrams(words, min(SHINGLE, len(words)))[:, None]
        smallest = (shingles * self.factors + self.terms).min(axis=0)
        return {(i, band.tobytes()) for i, band in enumerate(smallest.reshape(BANDS, ROWS))}
