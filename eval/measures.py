"""Measures of a summary: BERTScore, ROUGE, extractiveness, repetition; means with intervals."""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import bert_score
import numpy as np
import pandas as pd
import torch
from bert_score.utils import get_bert_embedding, greedy_cos_idf

from common.cli import UserError
from common.files import file_sha
from data_prep.filter_pairs import repetition

WINDOW = 512  # tokens an encoder reads
BASELINES = Path(__file__).parent.parent / "results/rescale_baselines.csv"


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


def pack_sentences(sentences: list[str], size: Callable[[str], int], most: int) -> list[str]:
    """Consecutive sentences joined into passages of at most `most` by `size`, one at least."""
    passages: list[str] = []
    for sentence in sentences:
        if passages and size(f"{passages[-1]} {sentence}") <= most:
            passages[-1] += f" {sentence}"
        else:
            passages.append(sentence)
    return passages


def rouge(candidates: list[str], references: list[str]) -> dict[str, list[float]]:
    """ROUGE-1, 2, L and Lsum F1 (Lin 2004) of each pair, stemmed; 0 for an empty candidate."""
    from rouge_score.rouge_scorer import RougeScorer

    names = {
        "rouge_1": "rouge1",
        "rouge_2": "rouge2",
        "rouge_l": "rougeL",
        "rouge_lsum": "rougeLsum",
    }
    scorer = RougeScorer(list(names.values()), use_stemmer=True)
    scores = [
        scorer.score(*("\n".join(split_sentences(text)) for text in (reference, candidate)))
        for candidate, reference in zip(candidates, references, strict=True)
    ]
    return {ours: [score[theirs].fmeasure for score in scores] for ours, theirs in names.items()}


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
        for place in places.get(summary[i], ()):
            n = 1
            while document[place + n : place + n + 1] == summary[i + n : i + n + 1] != []:
                n += 1
            longest = max(longest, n)
        lengths += [longest] if longest else []
        i += longest or 1
    return lengths


def shape(summary: str, document: str) -> dict[str, float]:
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
    official = Path(bert_score.__file__).parent / f"rescale_baseline/en/{encoder}.tsv"
    if official.is_file():
        return pd.read_csv(official)[["P", "R", "F"]].iloc[layer].tolist()
    if not BASELINES.is_file():
        return None
    rows = pd.read_csv(BASELINES).query("weights == @encoder_key(@encoder) and layer == @layer")
    return rows[["P", "R", "F"]].iloc[-1].tolist() if len(rows) else None


class BertScore:
    """The official BERTScorer (Zhang et al. 2020), made to work with transformers 5.

    Encoders that declare no limit are given one of 512 tokens and computed in float32.
    """

    def __init__(self, encoder: str, layers: int | None, batch_size: int):
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=encoder, num_layers=layers, batch_size=batch_size, lang="en"
            )
        except KeyError:
            raise UserError(
                f"bert-score knows no layer for {encoder}; pass --encoder-layers"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot load the encoder {encoder}: {' '.join(str(error).split())[:200]}"
            ) from None
        self.tokenizer = self.scorer._tokenizer
        self.tokenizer.model_max_length = WINDOW
        self.scorer._model.float()
        self.baseline = rescale_baseline(encoder, self.scorer.num_layers)

    def __call__(self, candidates: list[str], references: list[str]) -> np.ndarray:
        """Precision, recall and F1 of each pair, raw: shape (3, n); 0 for an empty candidate."""
        scores = np.zeros((3, len(candidates)))
        if full := [i for i, candidate in enumerate(candidates) if candidate.strip()]:
            result = self.scorer.score(
                [candidates[i] for i in full],
                [references[i] for i in full],
                batch_size=self.scorer.batch_size,
            )
            scores[:, full] = [part.numpy() for part in result]
        return scores

    def by_segments(
        self, candidates: list[str], references: list[str], scores: np.ndarray
    ) -> np.ndarray:
        """`scores` with texts over the window read in segments and matched whole: shape (3, n).

        Each text is encoded in windows of whole sentences; the tokens of all its windows take part
        in the greedy matching.
        """
        scores = scores.copy()
        for i, pair in enumerate(zip(candidates, references, strict=True)):
            if pair[0].strip() and any(map(self.n_cut, ([text] for text in pair))):
                hypothesis, reference = (self._embed(text) for text in pair)
                scores[:, i] = [float(part) for part in greedy_cos_idf(*reference, *hypothesis)]
        return scores

    def _embed(self, text: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings, mask and weights of all of a text's tokens: (1, tokens, ...) each."""
        weights = defaultdict(lambda: 1.0)
        weights |= {self.tokenizer.sep_token_id: 0, self.tokenizer.cls_token_id: 0}
        segments = pack_sentences(split_sentences(text), self.n_tokens, WINDOW)
        embeddings, mask, idf = (
            part.cpu()
            for part in get_bert_embedding(
                segments,
                self.scorer._model,
                self.tokenizer,
                weights,
                batch_size=self.scorer.batch_size,
                device=self.scorer.device,
            )
        )
        real = mask.bool()
        return embeddings[real][None], mask[real][None], idf[real][None]

    def rescale(self, scores: np.ndarray) -> np.ndarray:
        """Raw scores (3, n) on the scale where unrelated texts are 0."""
        baseline = np.array(self.baseline)[:, None]
        return (scores - baseline) / (1 - baseline)

    def n_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False).input_ids)

    def n_cut(self, texts: list[str]) -> int:
        """How many texts are longer than the encoder reads (512 tokens)."""
        return sum(self.n_tokens(text) > WINDOW for text in texts)
