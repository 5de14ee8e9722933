"""Plugins for axolotl, named in a config: `plugins: [training.plugins.Fp32Adapter]`."""

from functools import partial

import torch
from axolotl.integrations.base import BasePlugin
from peft import load_peft_weights, set_peft_model_state_dict
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


class Fp32Adapter(BasePlugin):
    """Trains the adapter of a 4-bit model in 32-bit floats, which round no small step away; TRL's
    is bf16, as in QLoRA (arXiv:2305.14314)."""

    def post_trainer_create(self, cfg, trainer) -> None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class CpuBf16(BasePlugin):
    """Lets axolotl compute in bf16 on a CPU; without it `bf16: true` needs a GPU."""

    def get_training_args(self, cfg) -> dict:
        return {"use_cpu": True}


class FirstAdapter(BasePlugin):
    """Starts DPO, IPO or KTO from the adapter in `lora_model_dir`, whose weights axolotl does not
    give them, and holds it to a frozen copy, by the name under which TRL looks for one."""

    def get_training_args(self, cfg) -> dict:
        # TRL would do so before there is the copy, and take the bare base as the reference.
        return {"precompute_ref_log_probs": False} if self.precomputes(cfg) else {}

    def post_trainer_create(self, cfg, trainer) -> None:
        if not self.goes_on(cfg):
            return
        model = trainer.model
        model.load_adapter(cfg.lora_model_dir, "ref")
        model.set_adapter("default")  # which loading another one has frozen
        set_peft_model_state_dict(model, load_peft_weights(cfg.lora_model_dir, "cpu"))
        # Beside a saved "ref" transformers would not load "default" from a checkpoint.
        model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
        if self.precomputes(cfg):
            trainer.precompute_ref_logps = True  # also of what is evaluated later
            model.train()  # where a model infers, bitsandbytes packs 4 bits on a CPU for that alone
            batch_size = trainer.args.per_device_train_batch_size
            rows = trainer._precompute_ref_logps(trainer.train_dataset, "train", batch_size)
            trainer.train_dataset = rows

    def goes_on(self, cfg) -> bool:
        return bool(cfg.lora_model_dir) and cfg.rl in ("dpo", "ipo", "kto")

    def precomputes(self, cfg) -> bool:
        return self.goes_on(cfg) and cfg.rl != "kto" and bool(cfg.precompute_ref_log_probs)


# Students that mix tokens by plain attention alone, so that a mask can keep two answers apart.
READ_PAIRS_IN_ONE = ("llama", "qwen2", "qwen3")


class AnswerLogits(BasePlugin):
    """Computes less for the same loss and gradients, which is much of a step where the vocabulary
    is most of a small model, and prompts are most of the tokens.

    SFT computes logits only where some row of the batch has an answer's token to say, not at the
    whole prompt. DPO and IPO do so too, and read the prompt that the two answers of a pair share
    once (`PairReader`). Other trainers and students are left alone. For one process a device, as
    `accelerate launch` starts them.
    """

    def post_trainer_create(self, cfg, trainer) -> None:
        if not cfg.rl:
            collate = trainer.data_collator
            trainer.data_collator = lambda rows: with_answer_places(collate(rows))
        elif cfg.rl in ("dpo", "ipo") and can_read_pairs_in_one(trainer):
            collate = trainer.data_collator
            trainer.data_collator = lambda rows: with_pairs_in_one(collate(rows))
            trainer.model.forward = PairReader(trainer.model.forward)


def with_answer_places(batch: dict) -> dict:
    """A batch of SFT with the places whose logits are needed, and what is said there."""
    # A token is said at the place before its own.
    said = pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    places = (said != -100).any(0).nonzero().squeeze(1)
    return {**batch, "logits_to_keep": places, "shift_labels": said[:, places]}


def can_read_pairs_in_one(trainer) -> bool:
    """Whether batches have TRL's own form, and the student's attention takes a mask of ours."""
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    config = trainer.model.config
    plain_attention = config._attn_implementation == "sdpa" and set(
        getattr(config, "layer_types", None) or ["full_attention"]
    ) == {"full_attention"}
    known = config.model_type in READ_PAIRS_IN_ONE and plain_attention
    return known and isinstance(trainer.data_collator, DataCollatorForPreference)


def with_pairs_in_one(batch: dict) -> dict:
    """TRL's batch of preferences, and under `in_one` the same with a pair a row.

    The batch has B rows of prompts with chosen answers and B of the same with rejected ones, (2B,
    length). TRL reads of it what was said, so its `input_ids` and `completion_mask` become the
    answers alone behind one place, (2B, 1 + longest answer). In one row a pair stands as

        padding, prompt | chosen, padding | rejected, padding

    with the prompts' ends below each other, so that logits are taken at the same places of all
    rows. A rejected answer has the positions that follow the prompt, and does not see the chosen.
    """
    ids, is_said = batch["input_ids"], batch["completion_mask"].bool()
    n_pairs = len(ids) // 2
    if not is_said.any(1).all():  # cut by max_length before an answer begins
        return batch
    is_prompt = batch["attention_mask"].bool() & ~is_said
    prompts = [row[kept] for row, kept in zip(ids[:n_pairs], is_prompt[:n_pairs], strict=True)]
    answers = [row[kept] for row, kept in zip(ids, is_said, strict=True)]
    parts = [
        side_by_side(prompts, "left"),
        side_by_side(answers[:n_pairs], "right"),
        side_by_side(answers[n_pairs:], "right"),
    ]
    said, is_there = side_by_side(answers, "right")
    return {
        **batch,
        "input_ids": pad(said, (1, 0)),
        "completion_mask": pad(is_there.long(), (1, 0)),
        "in_one": rows_in_one(*parts),
    }


def side_by_side(rows: list[torch.Tensor], padding_side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, whether there is one) of rows of unlike length, each (rows, longest)."""
    there = [torch.ones_like(row, dtype=torch.bool) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_side=padding_side)
    return ids, pad_sequence(there, batch_first=True, padding_side=padding_side)


def rows_in_one(prompts, chosen, rejected) -> dict:
    """What a model is given for rows of prompt, chosen and rejected (each as `side_by_side`)."""
    ids = torch.cat([prompts[0], chosen[0], rejected[0]], 1)
    is_there = torch.cat([prompts[1], chosen[1], rejected[1]], 1)
    n_prompt, n_chosen, n_rejected = (part[0].shape[1] for part in (prompts, chosen, rejected))
    length = n_prompt + n_chosen + n_rejected

    sees = torch.ones(length, length, dtype=torch.bool).tril()
    sees[n_prompt + n_chosen :, n_prompt : n_prompt + n_chosen] = False
    # Padding sees itself, for a softmax over nothing is NaN.
    mask = (sees & is_there[:, None, :]) | torch.eye(length, dtype=torch.bool)

    positions = is_there.cumsum(1) - 1
    positions[:, n_prompt + n_chosen :] -= chosen[1].sum(1, keepdim=True)

    # Each answer's first token is said at the prompt's last place, its others one after the other.
    places = torch.arange(n_prompt - 1, length - 1)
    places = places[places != n_prompt + n_chosen - 1]
    return {
        "input_ids": ids,
        "attention_mask": mask[:, None],
        "position_ids": positions.clamp(min=0),
        "logits_to_keep": places,
        "n_chosen": n_chosen,
    }


class PairReader:
    """A model's forward that reads the pairs of a batch `in_one`, and answers as if it had read
    TRL's rows: with logits of (2B, longest answer + 1, vocabulary), of which TRL drops the last."""

    def __init__(self, read):
        self.read = read

    def __call__(self, in_one: dict | None = None, **inputs):
        if in_one is None:
            return self.read(**inputs)
        told = {key: value for key, value in in_one.items() if key != "n_chosen"}
        outputs = self.read(**inputs | told)
        logits, n_chosen = outputs.logits, in_one["n_chosen"]
        chosen = logits[:, :n_chosen]
        rejected = torch.cat([logits[:, :1], logits[:, n_chosen:]], 1)
        longest = max(chosen.shape[1], rejected.shape[1])
        sides = [pad(side, (0, 0, 0, longest + 1 - side.shape[1])) for side in (chosen, rejected)]
        outputs.logits = torch.cat(sides)
        return outputs
