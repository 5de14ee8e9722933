"""The one way to load a model: a run, a config, a folder or a Hub id, whole or as an adapter.

An adapter meets the base that it learned to correct. Where it was trained on 4 bits, the layers
that were rounded are rounded alike and then put back into 16 bits (Dettmers et al., 2023,
arXiv:2305.14314). The YAML beside an adapter tells, or the config.json that axolotl leaves there.
"""

from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.cli import UserError, one_line, warn
from common.files import read_json
from training.resolve_config import cpu_has_bf16
from training.run_config import OUTPUTS, RunConfig, check_model_folder, fingerprint, load_run_config

# As axolotl loads the base of a QLoRA run.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@dataclass(frozen=True)
class Weights:
    """A whole model, or a base and the adapter on it; `four_bits`: whether the adapter was trained
    on 4 bits, None where nothing tells."""

    model: str
    revision: str | None = None
    adapter: str | None = None
    four_bits: bool | None = False

    @property
    def settings(self) -> dict:
        """What tells these weights from others, for what is made with them."""
        base = fingerprint(self.model) if self.adapter else None
        own = fingerprint(self.adapter or self.model)
        return asdict(self) | {"fingerprint": own, "base_fingerprint": base}


def precision() -> str:
    """The number format of generation: bfloat16 on a GPU or a CPU that has it, else float32."""
    import torch

    return "bfloat16" if torch.cuda.is_available() or cpu_has_bf16() else "float32"


def trained_for(folder: str | Path | None) -> str | None:
    """The task of the run whose folder it is, None if it is of none."""
    made = read_json(Path(folder or "") / "inputs/made.json")
    return made.get("task", "summarize") if made else None


def weights_in(folder: Path, config: RunConfig | None = None) -> Weights:
    """A model or adapter folder's, by its `config` or the one that lies there. Raises UserError."""
    if not (adapter := read_json(folder / "adapter_config.json")):
        check_model_folder(str(folder))
        return Weights(str(folder))
    base, revision = adapter["base_model_name_or_path"], adapter.get("revision")
    for path in () if config else sorted(folder.glob("*.yaml")):
        with suppress(UserError):  # it is another YAML
            config = config or load_run_config(path)
    if config:
        if config.settings.get("overrides_of_model_config"):
            raise UserError(f"{config.path}: overrides_of_model_config is not known here")
        return Weights(base, config.base_revision or revision, str(folder), config.four_bits)
    trained_on = read_json(folder / "config.json")  # the base as axolotl had it
    quantized = (trained_on.get("quantization_config") or {}).get("load_in_4bit", False)
    return Weights(base, revision, str(folder), quantized if trained_on else None)


def weights_of_run(config: RunConfig) -> Weights:
    """The base of a run and its adapter on it. Raises UserError if it has none of this base."""
    folder, base = config.output_dir, config.base_model
    there = (folder / "adapter_model.safetensors").is_file()
    if not there or (weights := weights_in(folder, config)).model != base:
        reason = f"no adapter in {folder}, or it is not of {base}, which {config.path} names"
        raise UserError(f"{reason}; train it with `just train {config.path.stem}`")
    return weights


def find_weights(name: str, base: bool = False) -> Weights:
    """What a run's name, a folder or a Hub id stands for, or its base. Raises UserError."""
    folder = Path(name) if Path(name).is_dir() else OUTPUTS / name
    weights = weights_in(folder) if folder.is_dir() else weights_on_hub(name)
    if base and not weights.adapter:
        raise UserError(f"{name} names no base; pass that itself as --model")
    return replace(weights, adapter=None, four_bits=False) if base else weights


def weights_on_hub(name: str) -> Weights:
    """A Hub repo's, of a model or an adapter. Raises UserError if the name cannot be one's."""
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    if name.count("/") != 1:
        raise UserError(f"no run and no folder {name}; `just train` makes a run")
    try:
        PeftConfig.from_pretrained(name)
    except ValueError:  # peft's answer where there is no adapter
        return Weights(name)
    return weights_in(Path(snapshot_download(name)))


def load_base(weights: Weights, dequantize: bool = True):
    """The whole model, or the base as training rounded it; in the precision it is published in."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"revision": weights.revision, "dtype": "auto"}
    if weights.four_bits:
        options["quantization_config"] = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(weights.model, **options)
    return model.dequantize() if weights.four_bits and dequantize else model


def load_tokenizer(weights: Weights):
    """The tokenizer of the trained run, or of the base where the adapter comes without."""
    from transformers import AutoTokenizer

    own = weights.adapter and (Path(weights.adapter) / "tokenizer_config.json").is_file()
    source = weights.adapter if own else weights.model
    return AutoTokenizer.from_pretrained(source, revision=weights.revision, padding_side="left")


def load_model(model: str | Weights, dtype: str | None = None):
    """(model, tokenizer) to generate with, greedily. Raises UserError if it cannot be used."""
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    weights = find_weights(model) if isinstance(model, str) else model
    name = weights.adapter or weights.model
    if weights.four_bits is None:
        warn(f"nothing tells whether {name} was trained on 4 bits; its base is not rounded")
    try:
        tokenizer, loaded = load_tokenizer(weights), load_base(weights)
        # The weights alone: the frequencies of rope, which are buffers, stay in 32 bits.
        for parameter in loaded.parameters():
            parameter.data = parameter.data.to(getattr(torch, dtype or precision()))
        if weights.adapter:
            adapted = PeftModel.from_pretrained(loaded, weights.adapter)
            loaded = adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name}: {one_line(error, 200)}") from None
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template, so it is no model that was taught here")
    if not all(parameter.isfinite().all() for parameter in loaded.parameters()):
        raise UserError(f"{name} holds weights that are NaN or infinite; its training diverged")
    ends, pad = loaded.generation_config.eos_token_id or [], tokenizer.pad_token_id
    ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    # Greedy in earnest, whatever the model's own settings.
    loaded.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer
