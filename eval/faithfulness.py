"""Faithfulness of answers by an entailment model.

SummaC-ZS (Laban et al. 2022): a sentence's support is the entailment probability from its
best-supporting passage; an answer's faithfulness is the mean over its sentences.
`benchmarks/faithfulness.py` holds it against human ratings.
"""

from functools import cache

import numpy as np

from common.cli import UserError
from eval.measures import WINDOW, Columns, split_sentences, words_of
from training.run_config import check_model_folder

PASSAGE_WORDS = 80
PASSAGES = 8  # of a document, those that share most words with the sentence


def is_entailment_model(model: str) -> bool:
    from transformers import AutoConfig

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
        from transformers import pipeline

        check_model_folder(model)
        if not is_entailment_model(model):
            raise UserError(f"{model} is no entailment model: it has no label of that name")
        cut = {"truncation": True, "max_length": WINDOW}
        self.classifier = pipeline(
            "text-classification", model, dtype="float32", batch_size=batch_size, top_k=None, **cut
        )
        self.settings = {"nli": model, "passage_words": PASSAGE_WORDS, "passages": PASSAGES}

    def probabilities(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Probability that each (premise, hypothesis) is an entailment."""
        inputs = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in pairs]
        labels = self.classifier(inputs) if inputs else []  # it takes no empty list
        scores = [{one["label"].lower(): one["score"] for one in found} for found in labels]
        return [found["entailment"] for found in scores]

    def support(self, document: str, answer: str) -> list[float]:
        """Of each sentence of an answer, 0 to 1; empty for an empty one."""
        sentences, pairs = split_sentences(answer), []
        for sentence in sentences:
            words = set(words_of(sentence))
            passages = sorted(passages_of(document), key=lambda p: -len(words & {*words_of(p)}))
            pairs += [(passage, sentence) for passage in passages[:PASSAGES]]
        best = dict.fromkeys(sentences, 0.0)
        for (_, sentence), score in zip(pairs, self.probabilities(pairs), strict=True):
            best[sentence] = max(best[sentence], score)
        return [best[sentence] for sentence in sentences]

    def __call__(self, answers: list[str], rows: list[dict]) -> Columns:
        found = [self.support(r["text"], answer) for r, answer in zip(rows, answers, strict=True)]
        return {"faithfulness": [float(np.mean(support or [0.0])) for support in found]}
