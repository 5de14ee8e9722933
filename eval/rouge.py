"""ROUGE (Lin 2004), of any script."""

import unicodedata

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from common.text import words_of
from eval.sentences import split_sentences

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}


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


def rouge(answers: list[str], rows: list[dict]) -> dict[str, list[float]]:
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
