"""Faithfulness of summaries by an entailment model, and its check against human ratings.

SummaC-ZS (Laban et al. 2022): a sentence's support is the entailment probability from its
best-supporting passage; a summary's faithfulness is the mean over its sentences. Reads for the
check a JSON Lines file in SummEval's shape (Fabbri et al. 2021), one summary a line:

    {"text": the document, "decoded": the summary, "expert_annotations": [{"consistency": 1 to 5}]}

and prints the rank correlations with the mean rating.

    python -m eval.faithfulness summeval.jsonl --nli microsoft/deberta-xlarge-mnli
"""

from pathlib import Path

import numpy as np
from scipy.stats import kendalltau, spearmanr
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import load_records
from eval.measures import WINDOW, pack_sentences, split_sentences, words_of
from training.run_config import check_model_folder

PASSAGE_WORDS = 80
PASSAGES = 8  # of a document, those that share most words with the sentence


def label_names(model: str) -> dict[str, int]:
    """The labels of a classifier, in lower case; empty for a model without named ones."""
    from transformers import AutoConfig

    return {label.lower(): i for label, i in AutoConfig.from_pretrained(model).label2id.items()}


def is_entailment_model(model: str) -> bool:
    return "entailment" in label_names(model)


class Entailment:
    """An NLI classifier, e.g. microsoft/deberta-xlarge-mnli; its labels come from its config."""

    def __init__(self, model: str, batch_size: int):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        check_model_folder(model)
        labels = label_names(model)
        if "entailment" not in labels:
            raise UserError(f"{model} is no entailment model, its labels are {', '.join(labels)}")
        self.label, self.batch_size = labels["entailment"], batch_size
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        classifier = AutoModelForSequenceClassification.from_pretrained(model)
        self.model = classifier.float().to(self.device).eval()
        self.settings = {"nli": model, "passage_words": PASSAGE_WORDS, "passages": PASSAGES}

    def probabilities(self, pairs: list[tuple[str, str]]) -> list[float]:
        """Probability that each (premise, hypothesis) is an entailment."""
        import torch

        found = []
        for start in range(0, len(pairs), self.batch_size):
            premises, hypotheses = zip(*pairs[start : start + self.batch_size], strict=True)
            inputs = self.tokenizer(
                list(premises),
                list(hypotheses),
                padding=True,
                truncation=True,
                max_length=WINDOW,
                return_tensors="pt",
            )
            with torch.inference_mode():
                logits = self.model(**inputs.to(self.device)).logits
            found += logits.softmax(dim=-1)[:, self.label].tolist()
        return found

    def support(self, document: str, summary: str) -> list[tuple[str, float]]:
        """[(sentence, support 0 to 1)] of a summary; empty for an empty one."""
        sentences = split_sentences(summary)
        passages = pack_sentences(
            split_sentences(document), lambda text: len(text.split()), PASSAGE_WORDS
        )
        pairs = [(p, s) for s in sentences for p in nearest(s, passages)]
        scores = self.probabilities(pairs)
        each = len(pairs) // (len(sentences) or 1)  # passages of a sentence
        return [
            (s, max(scores[i * each : (i + 1) * each], default=0.0))
            for i, s in enumerate(sentences)
        ]


def nearest(sentence: str, passages: list[str]) -> list[str]:
    """The `PASSAGES` passages that hold most of the sentence's words."""
    words = set(words_of(sentence))
    return sorted(passages, key=lambda p: -len(words & set(words_of(p))))[:PASSAGES]


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("ratings", type=Path, help="JSON Lines in SummEval's shape")
    parser.add_argument("--nli", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    parser.add_argument("--batch-size", type=positive, default=32, help="pairs at once")
    args = parser.parse_args()
    records = load_records(args.ratings, ("text", "decoded", "expert_annotations"))
    entailment = Entailment(args.nli, args.batch_size)
    ours, humans = [], []
    for record in tqdm(records, desc="summaries", unit="text"):
        support = entailment.support(record["text"], record["decoded"])
        ours.append(np.mean([score for _, score in support]) if support else 0.0)
        humans.append(np.mean([note["consistency"] for note in record["expert_annotations"]]))
    if len(set(humans)) < 2 or len(set(ours)) < 2:
        raise UserError(f"{args.ratings}: all ratings or all scores are equal, nothing to compare")
    print(
        f"faithfulness by {args.nli} against human consistency, n = {len(ours)}: "
        f"Spearman {spearmanr(ours, humans)[0]:+.3f}, Kendall {kendalltau(ours, humans)[0]:+.3f}"
    )


if __name__ == "__main__":
    run(main)
