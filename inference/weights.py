"""The one way to load a model: a run, a config, a folder or a Hub id, whole or as an adapter.

An adapter meets the base that it learned to correct, and is taken whole or not at all. Where it was
trained on 4 bits, the layers that were rounded are rounded alike and then put back into 16 bits
(Dettmers et al., 2023, arXiv:2305.14314). The YAML beside an adapter tells, or the config.json that
axolotl leaves there. A base that was published in 4 bits is put back into 16 bits, too.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common.cli import UserError, one_line, warn
from common.files import read_json
from inference.adapters import add_adapter, merge_adapter
from prompts.task import Task
from training.chat import stop_ids
from training.config import (
    OUTPUTS,
    RunConfig,
    check_finished,
    check_model_folder,
    cpu_has_bf16,
    fingerprint,
    load_run_config,
)

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


class OutOfMemory(UserError):
    """The machine's or the GPU's memory does not hold what was to be computed."""


@contextmanager
def memory_told(advice: str) -> Iterator[None]:
    """Raise OutOfMemory, with what to lower, where torch runs out of memory in the block."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU's has no name of its own
        said = str(error)
        if "out of memory" not in said and "can't allocate memory" not in said:
            raise
        raise OutOfMemory(f"out of memory ({one_line(said, 100)}); {advice}") from None


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
    check_finished(folder)
    path = folder / "adapter_config.json"
    if not path.is_file():
        check_model_folder(str(folder))
        return Weights(str(folder))
    adapter = read_adapter_config(path)
    config = config or find_run_config(folder)
    if config and config.settings.get("overrides_of_model_config"):
        raise UserError(f"{config.path}: overrides_of_model_config is not known here")
    revision = adapter.get("revision")
    if config:
        revision = config.base_revision or revision
        four_bits = config.four_bits
    else:
        four_bits = trained_on_four_bits(folder)
    return Weights(adapter["base_model_name_or_path"], revision, str(folder), four_bits)


def trained_on_four_bits(folder: Path) -> bool | None:
    """What the base's config.json that axolotl leaves beside an adapter tells, None without one."""
    base = read_json(folder / "config.json")
    if not base:
        return None
    quantization = base.get("quantization_config") or {}
    return quantization.get("load_in_4bit", False)


def read_adapter_config(path: Path) -> dict:
    """What an adapter_config.json says. Raises UserError if it names no base."""
    try:
        adapter = json.loads(path.read_bytes())
        base = adapter["base_model_name_or_path"]
        if base and isinstance(base, str):
            return adapter
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} does not say what it is an adapter of: base_model_name_or_path")


def find_run_config(folder: Path) -> RunConfig | None:
    """The first config of a run that lies in a folder, if any."""
    for path in sorted(folder.glob("*.yaml")):
        with suppress(UserError, ValueError):  # it is another YAML, or no text
            return load_run_config(path)
    return None


def check_template(folder: Path, task: Task) -> None:
    """Raise UserError if the adapter in `folder` was taught with another student.jinja than its
    task has now; runs of 0.3.7 do not tell."""
    inputs = read_json(folder / "inputs/made.json")
    if inputs.get("task") != task.name or "student" not in inputs:
        return
    if inputs["student"] != task.student_sha():
        what = f"{folder} was trained with another student.jinja than {task.folder} has now"
        raise UserError(f"{what}; put that one back, or `just stage` and `just train` again")


def weights_of_run(config: RunConfig) -> Weights:
    """The base of a run and its adapter on it. Raises UserError if it has none of this base, or if
    its training has not ended."""
    folder, base = config.output_dir, config.base_model
    check_finished(folder)
    if (folder / "adapter_model.safetensors").is_file():
        weights = weights_in(folder, config)
        if weights.model == base:
            return weights
    reason = f"no adapter in {folder}, or it is not of {base}, which {config.path} names"
    raise UserError(f"{reason}; train it with `just train`")


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
    """The whole model, or the base as training rounded it; in the precision it is published in.

    A base that is published in 4 bits is put back into 16 bits as well. Raises UserError for one
    that cannot be: its layers are packed, and an adapter cannot be added to them.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"revision": weights.revision, "dtype": "auto"}
    packed = read_json(Path(weights.model) / "config.json").get("quantization_config")
    if weights.four_bits and not packed:
        options["quantization_config"] = BitsAndBytesConfig(**NF4)
    model = AutoModelForCausalLM.from_pretrained(weights.model, **options)
    if not dequantize or not is_quantized(model):
        return model
    method = model.config.quantization_config.quant_method
    method = getattr(method, "value", method)
    if method != "bitsandbytes":
        hint = "name its 16-bit original in adapter_config.json" if weights.adapter else "use that"
        raise UserError(f"{weights.model} is quantized by {method}; {hint}")
    model = model.dequantize()
    if packed:
        # How its file was unpacked cannot be turned back, so transformers could not save it.
        model._weight_conversions = None
    return model


def is_quantized(model) -> bool:
    return bool(getattr(model, "is_quantized", False))


def load_tokenizer(weights: Weights):
    """The tokenizer of the trained run, or of the base where the adapter comes without.

    Raises UserError if its files are faulty, OSError if they cannot be had.
    """
    from transformers import AutoTokenizer

    own = weights.adapter and (Path(weights.adapter) / "tokenizer_config.json").is_file()
    source = weights.adapter if own else weights.model
    try:
        return AutoTokenizer.from_pretrained(source, revision=weights.revision, padding_side="left")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"the tokenizer of {source} is faulty: {one_line(error, 200)}") from None


def load_model(model: str | Weights, dtype: str | None = None):
    """(model, tokenizer) to generate with, greedily. Raises UserError if it cannot be used."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    weights = find_weights(model) if isinstance(model, str) else model
    name = weights.adapter or weights.model
    if weights.four_bits is None:
        warn(f"nothing tells whether {name} was trained on 4 bits; its base is not rounded")
    with memory_told(f"{name} needs a larger GPU, or none: CUDA_VISIBLE_DEVICES="):
        try:
            tokenizer, loaded = load_tokenizer(weights), load_base(weights)
            # The weights alone: the frequencies of rope, which are buffers, stay in 32 bits.
            for parameter in loaded.parameters():
                parameter.data = parameter.data.to(getattr(torch, dtype or precision()))
            if weights.adapter:
                loaded = merge_adapter(add_adapter(loaded, weights.adapter))
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot load {name}: {one_line(error, 200)}") from None
        prepare_to_answer(loaded, tokenizer, name)
        if not all(parameter.isfinite().all() for parameter in loaded.parameters()):
            raise UserError(f"{name} holds weights that are NaN or infinite; its training diverged")
        return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def base_of(served: dict[str, Weights]) -> Weights:
    """The base that all of them share, at the revision that one of them names."""
    first = next(iter(served.values()))
    revisions = [one.revision for one in served.values() if one.revision]
    return replace(first, adapter=None, revision=next(iter(revisions), None))


def model_ends(weights: Weights):
    """The generation settings that a model is published with; those of its config without a file.
    Raises OSError where the model cannot be had."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(weights.model, revision=weights.revision)
    except OSError:
        config = AutoConfig.from_pretrained(weights.model, revision=weights.revision)
        return GenerationConfig.from_model_config(config)


def ends_of(tokenizer, generation_config, name: str) -> list[int]:
    """Ids of the tokens that end an answer of `name`. Raises UserError if its chat template cannot
    be used, or nothing ends an answer."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template, so it is no model that was taught here")
    try:
        ends = stop_ids(tokenizer, generation_config)
    except (TemplateError, ValueError, TypeError) as error:
        raise UserError(f"the chat template of {name} fails: {one_line(error)}") from None
    if not ends:
        raise UserError(f"{name} has no token that ends an answer; set eos_token in its tokenizer")
    return ends


def prepare_to_answer(model, tokenizer, name: str) -> None:
    """Set a model to greedy decoding that stops where its turn ends. Raises UserError."""
    from transformers import GenerationConfig

    ends = ends_of(tokenizer, model.generation_config, name)
    if tokenizer.pad_token_id is None:  # what is padded is masked, so any token will do
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends[0])
    # Greedy in earnest, whatever the model's own settings.
    pad = tokenizer.pad_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    # Of each prompt the last position alone goes into the output layer. torch multiplies such a
    # slice by a frozen matrix, as PEFT leaves the base's, in a copy of the matrix for each prompt.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0].contiguous(), *inputs[1:])
    )
