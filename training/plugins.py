"""Plugins for axolotl.

plugins: [training.plugins.Fp32Adapter]   # in a config
"""

from axolotl.integrations.base import BasePlugin


class Fp32Adapter(BasePlugin):
    """Keeps the adapter of a 4-bit model in 32-bit floats while it trains.

    TRL casts it to bf16, following QLoRA (arXiv:2305.14314). A bf16 weight has 8 significant bits,
    so a step smaller than 1/256 of the weight rounds away: `just bench adapter_precision` measures
    it. The weights are cast back once the trainer has been made, before its optimizer is.
    """

    def post_trainer_create(self, cfg, trainer) -> None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class CpuBf16(BasePlugin):
    """Lets axolotl compute in bf16 on a CPU, which it takes for a GPU's affair."""

    def get_training_args(self, cfg) -> dict:
        return {"use_cpu": True}
