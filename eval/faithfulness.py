"""Faithfulness of summaries by an entailment model.

SummaC-ZS (Laban et al. 2022): a sentence's support is the entailment probability from its
best-supporting passage; a summary's faithfulness is the mean over its sentences.
`benchmarks/faithfulness.py` holds it against human ratings.
"""

from functools import cache

from common.cli import UserError
from eval.measures import WINDOW, split_sentences, words_of
from training.run_config import check_model_folder

PASSAGE_WORDS = 80
PASSAGES = 8  # of a document, those that share most words with the sentence


def is_entailment_model(model: str) -> bool:
    from transformers import AutoConfig

    return "entailment" in map(str.lower, AutoConfig.from_pretrained(model).label2id)


@cache
def passages_of(document: str) -> list[tuple[str, set[str]]]:
    """Passages of whole sentences, at most `PASSAGE_WORDS` long if no sentence is longer, with
    the words of each. Kept, as a document is read again for every system."""
    passages: list[str] = []
    for sentence in split_sentences(document):
        if passages and len(f"{passages[-1]} {sentence}".split()) <= PASSAGE_WORDS:
            passages[-1] += f" {sentence}"
        else:
            passages.append(sentence)
    return [(passage, set(words_of(passage))) for passage in passages]


def nearest(sentence: str, document: str) -> list[str]:
    """The `PASSAGES` passages of a document that hold most of the sentence's words."""
    words = set(words_of(sentence))
    ranked = sorted(passages_of(document), key=lambda passage: -len(words & passage[1]))
    return [text for text, _ in ranked[:PASSAGES]]


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
        if not pairs:  # which the pipeline does not take
            return []
        inputs = [{"text": premise, "text_pair": hypothesis} for premise, hypothesis in pairs]
        return [
            next(label["score"] for label in labels if label["label"].lower() == "entailment")
            for labels in self.classifier(inputs)
        ]

    def support(self, document: str, summary: str) -> list[tuple[str, float]]:
        """[(sentence, support 0 to 1)] of a summary; empty for an empty one."""
        sentences = split_sentences(summary)
        pairs = [(passage, s) for s in sentences for passage in nearest(s, document)]
        best = dict.fromkeys(sentences, 0.0)
        for (_, sentence), score in zip(pairs, self.probabilities(pairs), strict=True):
            best[sentence] = max(best[sentence], score)
        return [(sentence, best[sentence]) for sentence in sentences]
