"""Faithfulness: whether an answer's sentences follow from its text, by an NLI classifier."""

from functools import cache

import numpy as np

from common.cli import UserError
from common.text import words_of
from eval.bertscore import WINDOW
from eval.sentences import split_sentences

PASSAGE, PASSAGES = 4, 8  # sentences, and passages that a sentence is held against


def is_entailment_model(model: str) -> bool:
    from transformers import AutoConfig

    return "entailment" in map(str.lower, AutoConfig.from_pretrained(model).label2id)


def check_entailment_model(model: str) -> None:
    """Raise UserError for what is no entailment model or cannot be had, before answers wait for
    it."""
    try:
        has_label = is_entailment_model(model)
    except (OSError, ValueError):
        raise UserError(f"{model} is not on the Hub or cannot be had: --nli") from None
    if not has_label:
        raise UserError(f"{model} is no entailment model: it has no label of that name")


@cache
def passages_of(document: str) -> list[str]:
    sentences = split_sentences(document)
    return [" ".join(sentences[i : i + PASSAGE]) for i in range(0, len(sentences), PASSAGE)]


class Entailment:
    """Faithfulness by an NLI classifier, SummaC-ZS (Laban et al. 2022): a sentence's support is the
    entailment probability from its best passage; an answer's score the mean over its sentences."""

    def __init__(self, model: str, batch_size: int):
        check_entailment_model(model)
        from transformers import pipeline

        options = {"batch_size": batch_size, "truncation": True, "max_length": WINDOW}
        options |= {"dtype": "float32", "top_k": None}  # all labels
        self.classifier = pipeline("text-classification", model, **options)
        how = {"nli": model, "passage_sentences": PASSAGE, "passages": PASSAGES}
        self.settings = {"faithfulness": how}
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

    def __call__(self, answers: list[str], rows: list[dict]) -> dict[str, list[float]]:
        pairs = zip(answers, rows, strict=True)
        return {"faithfulness": [self.faithfulness(answer, row["text"]) for answer, row in pairs]}
