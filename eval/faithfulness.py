"""Faithfulness of answers by an entailment model, SummaC-ZS (Laban et al. 2022).

A sentence's support is the entailment probability from its best-supporting passage; an answer's
faithfulness is the mean over its sentences. benchmarks/faithfulness.py holds it against humans.
"""

from functools import cache

import numpy as np
from transformers import AutoConfig, pipeline

from common.cli import UserError
from eval.measures import WINDOW, Columns, split_sentences, words_of

PASSAGE_WORDS = 80
PASSAGES = 8  # of a document, those that share most words with the sentence


def is_entailment_model(model: str) -> bool:
    return "entailment" in map(str.lower, AutoConfig.from_pretrained(model).label2id)


@cache
def passages_of(document: str) -> list[str]:
    """Passages of whole sentences, at most `PASSAGE_WORDS` long if no sentence is longer."""
    passages: list[str] = []
    for sentence in split_sentences(document):
        if passages and len(f"{passages[-1]} {sentence}".split()) <= PASSAGE_WORDS:
            passages[-1] += f" {sentence}"
        else:
            passages.append(sentence)
    return passages


class Entailment:
    """An NLI classifier, e.g. microsoft/deberta-xlarge-mnli; its labels come from its config."""

    def __init__(self, model: str, batch_size: int):
        if not is_entailment_model(model):
            raise UserError(f"{model} is no entailment model: it has no label of that name")
        options = {"batch_size": batch_size, "truncation": True, "max_length": WINDOW}
        self.classifier = pipeline(
            "text-classification", model, dtype="float32", top_k=None, **options
        )
        self.settings = {"nli": model, "passage_words": PASSAGE_WORDS, "passages": PASSAGES}

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
        return float(np.mean(list(best.values()) or [0.0]))

    def __call__(self, answers: list[str], rows: list[dict]) -> Columns:
        pairs = zip(answers, rows, strict=True)
        return {"faithfulness": [self.faithfulness(answer, row["text"]) for answer, row in pairs]}
