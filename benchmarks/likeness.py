"""How like texts are to each other: ROUGE-L, and F1 of BERTScore with each text encoded once.

`python -m bert_score` encodes both texts of every pair that it is given; among n answers to one
question that is n times the work. The values are the same (tests/test_likeness.py).
"""

import re

import numpy as np
import torch
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoTokenizer

ENCODER = "models/minilm"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rouge_likeness(texts: list[str], others: list[str]) -> np.ndarray:
    """F1 of ROUGE-L, 2 LCS / (both lengths), of each text to each other; words are not stemmed."""
    words, found = (
        [re.findall(r"\w+", x.lower()) or [""] for x in part] for part in (texts, others)
    )
    return cdist(words, found, scorer=Indel.normalized_similarity)


class MeaningLikeness:
    """F1 of BERTScore (arXiv:1904.09675) at the encoder's last layer, without idf."""

    def __init__(self, encoder: str = ENCODER):
        self.tokenizer = AutoTokenizer.from_pretrained(encoder)
        self.model = AutoModel.from_pretrained(encoder, dtype=torch.float32).to(DEVICE).eval()
        self.found: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def encode(self, texts: list[str]) -> None:
        """Remember each text's tokens, (tokens, size), for the calls that follow."""
        new = sorted(set(texts) - self.found.keys(), key=len)
        for start in range(0, len(new), 256):
            part = new[start : start + 256]
            inputs = self.tokenizer(
                [text.strip() or "-" for text in part],
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            ).to(DEVICE)
            states = normalize(self.model(**inputs).last_hidden_state, dim=-1)
            for text, tokens, mask in zip(part, states, inputs["attention_mask"], strict=True):
                self.found[text] = tokens[: int(mask.sum())].clone()

    def padded(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(tokens, which there are, weights: 0 for the first and the last, as in bert-score)"""
        rows = [self.found[text] for text in texts]
        lengths = torch.tensor([len(row) for row in rows], device=DEVICE)[:, None]
        tokens = pad_sequence(rows, batch_first=True)
        place = torch.arange(tokens.shape[1], device=DEVICE)
        inner = ((place > 0) & (place < lengths - 1)).float()
        return tokens, place < lengths, inner / inner.sum(1, keepdim=True)

    def __call__(self, texts: list[str], others: list[str]) -> np.ndarray:
        self.encode([*texts, *others])
        (ours, is_ours, our_weights), (theirs, is_theirs, their_weights) = map(
            self.padded, (texts, others)
        )
        likeness = torch.einsum("aid,bjd->abij", ours, theirs)
        likeness = likeness * (is_ours[:, None, :, None] & is_theirs[None, :, None, :])
        precision = (likeness.amax(3) * our_weights[:, None]).sum(2)
        recall = (likeness.amax(2) * their_weights[None]).sum(2)
        return (2 * precision * recall / (precision + recall)).cpu().numpy()
