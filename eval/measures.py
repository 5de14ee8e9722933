"""Measures of a summary: BERTScore, ROUGE, extractiveness, repetition."""

import re
from collections import defaultdict
from functools import cache
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import UserError, one_line
from common.files import file_sha
from data_prep.filter_pairs import repetition

WINDOW = 512  # tokens an encoder reads
BASELINES = Path(__file__).parent.parent / "results/rescale_baselines.csv"
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}


@cache
def _segmenter():
    from pysbd import Segmenter

    return Segmenter(language="en", clean=False)


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, paragraph by paragraph, white space made single."""
    sentences = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        whole = " ".join(paragraph.split())
        found = [sentence.strip() for sentence in _segmenter().segment(whole)]
        # pysbd loses a character of some odd punctuation; such a paragraph stays in one piece.
        complete = "".join(found).replace(" ", "") == whole.replace(" ", "")
        sentences += filter(None, found if complete else [whole])
    return sentences


def rouge(candidates: list[str], references: list[str]) -> dict[str, list[float]]:
    """ROUGE-1, 2, L and Lsum F1 (Lin 2004) of each pair, stemmed; 0 for an empty candidate."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer, found = RougeScorer(list(ROUGE.values()), use_stemmer=True), []
    for candidate, reference in zip(candidates, references, strict=True):
        lines = ["\n".join(split_sentences(text)) for text in (reference, candidate)]
        found.append(scorer.score(*lines))
    return {ours: [score[theirs].fmeasure for score in found] for ours, theirs in ROUGE.items()}


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def fragments(document: list[str], summary: list[str]) -> list[int]:
    """Lengths of the longest word runs that the summary shares with the document, left to right.

    The greedy matching of Grusky et al. 2018 (Newsroom), figure 3.
    """
    places = defaultdict(list)
    for place, word in enumerate(document):
        places[word].append(place)
    lengths, i = [], 0
    while i < len(summary):
        longest = 0
        for place in places[summary[i]]:
            n = 0
            while (
                place + n < len(document)
                and i + n < len(summary)
                and document[place + n] == summary[i + n]
            ):
                n += 1
            longest = max(longest, n)
        if longest:
            lengths.append(longest)
        i += max(longest, 1)
    return lengths


def extractiveness(summary: str, document: str) -> dict[str, float]:
    """Length and extractiveness of a summary; all 0 for an empty one.

    words; compression: document words over summary words; coverage: share of summary words inside
    shared runs, density: mean length of the run a word is in (Grusky et al. 2018); novel_bigrams:
    share of summary bigrams absent from the document; repetition: share of repeated 4-grams.
    """
    ours, theirs = words_of(summary), words_of(document)
    runs, bigrams = fragments(theirs, ours), set(pairwise(ours))
    n = len(ours) or 1
    return {
        "words": float(len(summary.split())),
        "compression": len(theirs) / n if ours else 0.0,
        "coverage": sum(runs) / n,
        "density": sum(run**2 for run in runs) / n,
        "novel_bigrams": len(bigrams - set(pairwise(theirs))) / (len(bigrams) or 1),
        "repetition": repetition(summary),
    }


def encoder_key(encoder: str) -> str:
    """What tells an encoder's weights: the hash of its file if it is a folder, or its Hub id."""
    weights = Path(encoder) / "model.safetensors"
    return file_sha(weights) if weights.is_file() else encoder


def rescale_baseline(encoder: str, layer: int) -> list[float] | None:
    """P, R and F1 of unrelated texts for an encoder's layer, or None where none was computed.

    bert-score's own file, or a row that `just bench rescale_encoder` added to results/. A raw
    score x is rescaled to (x - b) / (1 - b), bert-score's `rescale_with_baseline`.
    """
    official = files("bert_score") / f"rescale_baseline/en/{encoder}.tsv"
    if official.is_file():
        return pd.read_csv(official)[["P", "R", "F"]].iloc[layer].tolist()
    rows = pd.read_csv(BASELINES)
    rows = rows[(rows.weights == encoder_key(encoder)) & (rows.layer == layer)]
    return rows[["P", "R", "F"]].iloc[-1].tolist() if len(rows) else None


class BertScore:
    """The official BERTScorer (Zhang et al. 2020), made to work with transformers 5.

    Encoders that declare no limit are given one of 512 tokens and computed in float32.
    """

    def __init__(self, encoder: str, layers: int | None, batch_size: int):
        from bert_score import BERTScorer

        try:
            self.scorer = BERTScorer(
                model_type=encoder, num_layers=layers, batch_size=batch_size, lang="en"
            )
        except KeyError:
            hint = "pass --encoder-layers"
            raise UserError(f"bert-score knows no layer for {encoder}; {hint}") from None
        except OSError as error:
            raise UserError(f"cannot load the encoder {encoder}: {one_line(error, 200)}") from None
        self.scorer._tokenizer.model_max_length = WINDOW
        self.scorer._model.float()
        self.baseline = rescale_baseline(encoder, self.scorer.num_layers)

    def __call__(self, candidates: list[str], references: list[str]) -> np.ndarray:
        """Precision, recall and F1 of each pair, raw: shape (3, n); 0 for an empty candidate."""
        empty = [not candidate.strip() for candidate in candidates]
        given = ["-" if none else text for text, none in zip(candidates, empty, strict=True)]
        size = self.scorer.batch_size
        scores = np.stack(self.scorer.score(given, list(references), batch_size=size))
        scores[:, empty] = 0  # which the package does not take
        return scores

    def rescale(self, scores: np.ndarray) -> np.ndarray:
        """Raw scores (3, n) on the scale where unrelated texts are 0."""
        baseline = np.array(self.baseline)[:, None]
        return (scores - baseline) / (1 - baseline)

    def n_cut(self, texts: list[str]) -> int:
        """How many texts are longer than the encoder reads (512 tokens)."""
        tokens = self.scorer._tokenizer(texts, verbose=False).input_ids
        return sum(len(ids) > WINDOW for ids in tokens)
