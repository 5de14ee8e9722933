"""What plugins compute less of changes no loss and no gradient: with TRL's own DPO trainer."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from training.plugins import AnswerLogits

pytestmark = pytest.mark.slow

# Lengths in words of prompt, chosen and rejected: answers of one token, either side the longer.
LENGTHS = [(9, 4, 7), (30, 6, 2), (3, 1, 1), (14, 2, 12)]
LOSSES = {
    "DPO": {},
    "DPO with an SFT term": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.1]},
    "per token": {"loss_type": ["sigmoid_norm", "ipo"]},
    "weighted": {"use_weighting": True},
}


def rows_of(lengths: list[tuple[int, int, int]]) -> Dataset:
    fields = ("prompt", "chosen", "rejected")
    rows = []
    for number, sizes in enumerate(lengths):
        words = [
            " ".join(f"{field[0]}{number}{i}" for i in range(n))
            for field, n in zip(fields, sizes, strict=True)
        ]
        rows.append(dict(zip(fields, words, strict=True)))
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def student(tiny_qwen2):
    """A tiny student with an adapter that is not the base, beside a frozen other one."""
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    return get_peft_model(base, lora), AutoTokenizer.from_pretrained(tiny_qwen2)


def trainer_of(student, folder, **options) -> DPOTrainer:
    model, tokenizer = student
    batch = {"per_device_train_batch_size": len(LENGTHS), "use_cpu": True, "bf16": False}
    args = DPOConfig(output_dir=str(folder), gradient_checkpointing=False, **batch, **options)
    model = copy.deepcopy(model)
    trainer = DPOTrainer(
        model, args=args, train_dataset=rows_of(LENGTHS), processing_class=tokenizer
    )
    with torch.no_grad():  # so that the policy is not the reference
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.mul_(1.5)
    return trainer


def step_of(trainer) -> tuple[float, dict, dict]:
    """(loss, gradients, metrics) of the first batch."""
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), gradients, metrics


@pytest.mark.parametrize("loss", LOSSES)
def test_pairs_read_in_one_give_the_same_loss_gradients_and_figures(student, tmp_path, loss):
    steps, sizes = [], []
    for plugged in (False, True):
        trainer = trainer_of(student, tmp_path, seed=1, **LOSSES[loss])
        if plugged:
            AnswerLogits().post_trainer_create(SimpleNamespace(rl="dpo"), trainer)
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda _, inputs, output: sizes.append(inputs[0].numel()))
        steps.append(step_of(trainer))
    (loss_before, gradients_before, said_before), (loss_after, gradients_after, said_after) = steps
    assert loss_after == pytest.approx(loss_before, rel=1e-5)
    assert gradients_before.keys() == gradients_after.keys() and len(gradients_before) == 28
    for name, gradient in gradients_before.items():
        torch.testing.assert_close(gradients_after[name], gradient, rtol=1e-4, atol=1e-5)
    assert said_after == pytest.approx(said_before, rel=1e-4, abs=1e-4)
    policy_before, reference_before, policy_after, reference_after = sizes
    assert policy_before == reference_before > 1.3 * policy_after == 1.3 * reference_after


def test_what_it_does_not_know_is_left_alone(student, tmp_path):
    trainer = trainer_of(student, tmp_path)
    collate, forward = trainer.data_collator, trainer.model.forward
    AnswerLogits().post_trainer_create(SimpleNamespace(rl="kto"), trainer)
    trainer.model.config.model_type = "mamba"
    AnswerLogits().post_trainer_create(SimpleNamespace(rl="dpo"), trainer)
    assert trainer.data_collator is collate and trainer.model.forward == forward


def test_logits_at_the_answers_alone_give_the_same_loss_and_gradients(tiny_qwen2):
    """Two rows of unlike length, one answer long before the other's end."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    collate = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(tiny_qwen2), padding=True)
    rows = []
    for n_prompt, n_answer in ((9, 4), (30, 6)):
        ids = list(range(5, 5 + n_prompt + n_answer))
        labels = [-100] * n_prompt + ids[n_prompt:]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    trainer, found = SimpleNamespace(data_collator=collate), []
    for plugged in (False, True):
        if plugged:
            AnswerLogits().post_trainer_create(SimpleNamespace(rl="orpo"), trainer)
            assert trainer.data_collator is collate
            AnswerLogits().post_trainer_create(SimpleNamespace(rl=None), trainer)
        model.zero_grad()
        made = model(**trainer.data_collator([dict(row) for row in rows]))
        made.loss.backward()
        found.append((made.loss.item(), model.lm_head.weight.grad.clone(), made.logits.shape[1]))
    (loss, gradient, places), (same_loss, same_gradient, fewer) = found
    assert same_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(same_gradient, gradient)
    assert (places, fewer) == (36, 10)
