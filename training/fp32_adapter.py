"""An axolotl plugin that keeps the adapter of a 4-bit model in 32-bit floats while it trains.

TRL casts it to bf16, following QLoRA (arXiv:2305.14314). A bf16 weight has 8 significant bits, so a
step smaller than 1/256 of the weight rounds away: `just bench adapter_precision` measures it.

    plugins: [training.fp32_adapter.Fp32Adapter]   # in a config
"""

from axolotl.integrations.base import BasePlugin


class Fp32Adapter(BasePlugin):
    """Casts the trainable weights back once the trainer has been made, before its optimizer is."""

    def post_trainer_create(self, cfg, trainer) -> None:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
