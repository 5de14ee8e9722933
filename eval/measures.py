"""Measures of answers: ROUGE, extractiveness, length and repetition.

Each takes answers and their rows {text, reference}, and gives a column of values a figure.
"""

import unicodedata

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from common.text import count_words, words_of
from data_prep.filter_pairs import repetition
from eval.sentences import split_sentences

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
Columns = dict[str, list[float]]


def basics(answers: list[str], rows: list[dict]) -> Columns:
    """words; repetition: share of repeated 4-grams."""
    words = [float(count_words(answer)) for answer in answers]
    return {"words": words, "repetition": list(map(repetition, answers))}


class AnyScript(Tokenizer):
    """Words of any script for ROUGE, whose own tokenizer knows a to z and digits alone."""

    def __init__(self):
        self.stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = words_of(unicodedata.normalize("NFC", text))
        return [
            self.stemmer.stem(word) if word.isascii() and len(word) > 3 else word for word in words
        ]


def is_ascii_script(text: str) -> bool:
    """Whether three of four letters are a to z, as in English with any foreign names in it."""
    letters = [character for character in text if character.isalpha()]
    return sum(map(str.isascii, letters)) >= 0.75 * len(letters)


def rouge(answers: list[str], rows: list[dict]) -> Columns:
    """ROUGE-1, 2, L and Lsum F1 (Lin 2004), stemmed.

    By the package's own tokenizer, so that English figures are those of others; where the
    reference is in another script, by words of any script, for its own would find none.
    """
    kinds = list(ROUGE.values())
    english = RougeScorer(kinds, use_stemmer=True)
    other = RougeScorer(kinds, tokenizer=AnyScript())
    scores = []
    for answer, row in zip(answers, rows, strict=True):
        scorer = english if is_ascii_script(row["reference"]) else other
        lines = ["\n".join(split_sentences(text)) for text in (row["reference"], answer)]
        scores.append(scorer.score(*lines))
    return {ours: [score[theirs].fmeasure for score in scores] for ours, theirs in ROUGE.items()}


def fragments(document: list[str], answer: list[str]) -> list[int]:
    """Lengths of the longest word runs that the answer shares with the document, left to right, by
    the greedy matching of Grusky et al. 2018 (Newsroom), figure 3."""
    text, lengths, start = f" {' '.join(document)} ", [], 0
    while start < len(answer):
        end = start
        while end < len(answer) and f" {' '.join(answer[start : end + 1])} " in text:
            end += 1
        lengths += [end - start] if end > start else []
        start = max(end, start + 1)
    return lengths


def extractiveness(answers: list[str], rows: list[dict]) -> Columns:
    """coverage: share of an answer's words inside runs that the document holds; density: mean
    length of the run a word is in (Grusky et al. 2018)."""
    words = [words_of(answer) for answer in answers]
    runs = [fragments(words_of(row["text"]), ours) for row, ours in zip(rows, words, strict=True)]
    lengths = [max(1, len(ours)) for ours in words]
    return {
        "coverage": [sum(found) / n for found, n in zip(runs, lengths, strict=True)],
        "density": [sum(r**2 for r in found) / n for found, n in zip(runs, lengths, strict=True)],
    }
