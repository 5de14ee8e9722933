"""Plugins for axolotl, named in a config: `plugins: [training.plugins.Fp32Adapter]`."""

from functools import partial

from axolotl.integrations.base import BasePlugin
from peft import load_peft_weights, set_peft_model_state_dict


class Fp32Adapter(BasePlugin):
    """Trains the adapter of a 4-bit model in 32-bit floats, which round no small step away; TRL's
    is bf16, as in QLoRA (arXiv:2305.14314). docs/lab-notes.md compares the two."""

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

    def post_trainer_create(self, cfg, trainer) -> None:
        if cfg.lora_model_dir and cfg.rl in ("dpo", "ipo", "kto"):
            model = trainer.model
            model.load_adapter(cfg.lora_model_dir, "ref")
            model.set_adapter("default")  # which loading another one has frozen
            set_peft_model_state_dict(model, load_peft_weights(cfg.lora_model_dir, "cpu"))
            # Beside a saved "ref" transformers would not load "default" from a checkpoint.
            model.save_pretrained = partial(model.save_pretrained, selected_adapters=["default"])
