"""Measures of answers: BERTScore, ROUGE, extractiveness, faithfulness, length and repetition.

Each takes answers and their rows {text, reference}, and gives a column of values a figure.
"""

import re
import unicodedata
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
from nltk.stem.porter import PorterStemmer
from pysbd import Segmenter
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from common.cli import UserError
from common.files import file_sha
from common.text import count_words, words_of
from data_prep.filter_pairs import repetition

WINDOW = 512  # tokens an encoder reads
BASELINES = Path(__file__).parent.parent / "results/rescale_baselines.csv"
ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL", "rouge_lsum": "rougeLsum"}
SEGMENTER = Segmenter(language="en", clean=False)
PARTS = ("bertscore_p", "bertscore_r", "bertscore_f1")
PASSAGE, PASSAGES = 4, 8  # sentences, and passages that a sentence is held against
Columns = dict[str, list[float]]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, paragraph by paragraph, white space made single."""
    sentences = []
    for paragraph in filter(str.strip, re.split(r"\n\s*\n", text)):
        whole = " ".join(paragraph.split())
        found = [sentence.strip() for sentence in SEGMENTER.segment(whole)]
        # pysbd loses a character of some odd punctuation; such a paragraph stays in one piece.
        complete = "".join(found).replace(" ", "") == whole.replace(" ", "")
        sentences += filter(None, found if complete else [whole])
    return sentences


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


def encoder_key(encoder: str) -> str:
    """What tells an encoder's weights: the hash of its file if it is a folder, or its Hub id."""
    weights = Path(encoder) / "model.safetensors"
    return file_sha(weights) if weights.is_file() else encoder


def rescale_baseline(encoder: str, layer: int) -> list[float] | None:
    """P, R and F1 of unrelated texts for an encoder's layer: of bert-score's own file, or of a row
    that `just bench rescale_encoder` added to results/; None where none was computed."""
    official = files("bert_score") / f"rescale_baseline/en/{encoder}.tsv"
    if official.is_file():
        return pd.read_csv(official)[["P", "R", "F"]].iloc[layer].tolist()
    rows = pd.read_csv(BASELINES)
    rows = rows[(rows.weights == encoder_key(encoder)) & (rows.layer == layer)]
    return rows[["P", "R", "F"]].iloc[-1].tolist() if len(rows) else None


class BertScore:
    """The official BERTScorer (Zhang et al. 2020), made to work with transformers 5: encoders that
    declare no limit are given one of 512 tokens and computed in float32."""

    def __init__(self, encoder: str, layers: int | None, batch_size: int):
        from bert_score import BERTScorer

        try:
            self.scorer = BERTScorer(encoder, num_layers=layers, batch_size=batch_size, lang="en")
        except KeyError:
            raise UserError(f"bert-score knows no layer of {encoder}: --encoder-layers") from None
        self.scorer._tokenizer.model_max_length = WINDOW
        self.scorer._model.float()
        self.baseline = rescale_baseline(encoder, self.scorer.num_layers)

    def __call__(self, answers: list[str], rows: list[dict]) -> Columns:
        """Precision, recall and F1, raw and rescaled as in bert-score: unrelated texts 0;
        over_512_tokens: 1 for an answer that is longer than the encoder reads."""
        given = [answer if answer.strip() else "-" for answer in answers]  # it takes no empty ones
        references = [row["reference"] for row in rows]
        raw = np.stack(self.scorer.score(given, references, batch_size=self.scorer.batch_size))
        raw = raw.astype(float) * [bool(answer.strip()) for answer in answers]
        columns = dict(zip(PARTS, raw.tolist(), strict=True))
        if self.baseline:
            baseline = np.array(self.baseline)[:, None]
            rescaled = ((raw - baseline) / (1 - baseline)).tolist()
            columns |= {f"{part}_rescaled": rescaled[i] for i, part in enumerate(PARTS)}
        tokens = self.scorer._tokenizer(answers, verbose=False).input_ids
        return columns | {"over_512_tokens": [float(len(ids) > WINDOW) for ids in tokens]}


def is_entailment_model(model: str) -> bool:
    from transformers import AutoConfig

    return "entailment" in map(str.lower, AutoConfig.from_pretrained(model).label2id)


@cache
def passages_of(document: str) -> list[str]:
    sentences = split_sentences(document)
    return [" ".join(sentences[i : i + PASSAGE]) for i in range(0, len(sentences), PASSAGE)]


class Entailment:
    """Faithfulness by an NLI classifier, SummaC-ZS (Laban et al. 2022): a sentence's support is the
    entailment probability from its best passage; an answer's score the mean over its sentences."""

    def __init__(self, model: str, batch_size: int):
        if not is_entailment_model(model):
            raise UserError(f"{model} is no entailment model: it has no label of that name")
        from transformers import pipeline

        options = {"batch_size": batch_size, "truncation": True, "max_length": WINDOW}
        options |= {"dtype": "float32", "top_k": None}  # all labels
        self.classifier = pipeline("text-classification", model, **options)
        self.settings = {"nli": model, "passage_sentences": PASSAGE, "passages": PASSAGES}
        self.support: dict[tuple[str, str], dict[str, float]] = {}  # (answer, text) -> sentences'

    def probabilities(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Probability that each (premise, hypothesis) is an entailment."""
        inputs = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in pairs]
        found = self.classifier(inputs) if inputs else []  # it takes no empty list
        scores = [{label["label"].lower(): label["score"] for label in labels} for labels in found]
        return [score["entailment"] for score in scores]

    def faithfulness(self, answer: str, document: str) -> float:
        """Mean support of an answer's sentences; 0 for an empty one."""
        best, pairs = dict.fromkeys(split_sentences(answer), 0.0), []
        for sentence in best:
            words = set(words_of(sentence))
            passages = sorted(passages_of(document), key=lambda p: -len(words & {*words_of(p)}))
            pairs += [(passage, sentence) for passage in passages[:PASSAGES]]
        for (_, sentence), score in zip(pairs, self.probabilities(pairs), strict=True):
            best[sentence] = max(best[sentence], score)
        self.support[answer, document] = best
        return float(np.mean(list(best.values()) or [0.0]))

    def __call__(self, answers: list[str], rows: list[dict]) -> Columns:
        pairs = zip(answers, rows, strict=True)
        return {"faithfulness": [self.faithfulness(answer, row["text"]) for answer, row in pairs]}
