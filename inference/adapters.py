"""Adapters on their base: taken whole or not at all, and merged into it."""

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path

from common.cli import UserError, one_line
from training.config import check_finished

# What torch raises for an adapter_model.bin that is torn, or holds more than tensors.
OF_PICKLE = (pickle.UnpicklingError, EOFError)


def check_adapter(name: str, folder: str) -> None:
    """Raise UserError for an adapter that cannot share its base with others."""
    from peft import PeftConfig

    check_finished(Path(folder))
    try:
        config = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is no adapter of peft: {one_line(error, 200)}") from None
    if getattr(config, "bias", "none") != "none":
        merge = f"merge it (`just merge`) and serve the folder merged/ in {folder}"
        raise UserError(f"{name} changes the base's biases, so it needs a base of its own; {merge}")


def name_some(names: Iterable[str]) -> str:
    """The number of some names and the first of them."""
    ordered = sorted(names)
    return f"{len(ordered)} ({', '.join(ordered[:2])}{', ...' if len(ordered) > 2 else ''})"


def add_adapter(model, folder: str, name: str = "default"):
    """A model, or one with other adapters, with the adapter of a folder on it, all of it.

    Raises UserError if a tensor of the file has no place in the base, or the base has a place that
    the file does not fill (peft passes over both), if a shape differs, if it holds NaN or changes
    nothing, or if it is of a type that cannot be merged.
    """
    adapted, keys = load_into(model, folder, name)
    config = adapted.peft_config[name]
    if not hasattr(adapted, "merge_and_unload") or config.is_prompt_learning:
        kind = config.peft_type.value
        raise UserError(f"the adapter {folder} is of type {kind}, which cannot be merged")
    check_keys(keys, folder, name)
    for key, tensor in adapted.named_parameters():
        if belongs_to(key, name) and not tensor.isfinite().all():
            raise UserError(f"the adapter {folder} holds NaN or infinity; its training diverged")
    if not changes_base(adapted, name):
        raise UserError(f"the adapter {folder} changes nothing in its base; was it trained?")
    return adapted


def load_into(model, folder: str, name: str) -> tuple:
    """(the model with an adapter by peft, its keys that were missing or not expected). UserError"""
    import torch
    from peft import PeftModel
    from safetensors import SafetensorError

    if not list(Path(folder).glob("adapter_model.*")):
        raise UserError(f"{folder} holds no adapter_model.safetensors")
    try:
        with warnings.catch_warnings(action="ignore"):  # of the keys, which are told in a line
            if not isinstance(model, PeftModel):
                model = PeftModel.from_pretrained(model, folder, name)
            return model, model.load_adapter(folder, name)  # once more, for what only this says
    except torch.OutOfMemoryError:
        raise
    except KeyError as error:
        raise UserError(f"the adapter {folder} lacks, or peft does not know, {error}") from None
    except (ValueError, TypeError, RuntimeError, SafetensorError, *OF_PICKLE) as error:
        said = one_line(error) or type(error).__name__
        raise UserError(f"the adapter {folder} does not fit its base: {said}") from None


def belongs_to(key: str, name: str) -> bool:
    """Whether a parameter, as peft names it, is of the adapter `name`: `...lora_A.name.weight`."""
    return f".{name}." in f"{key}."


def check_keys(keys, folder: str, name: str) -> None:
    """Raise UserError if the file and the places in the base are not one to one."""
    faults = []
    if keys.unexpected_keys:
        faults.append(f"has no place for {name_some(keys.unexpected_keys)}")
    # peft looks for the name anywhere in a key, so that those of other adapters are among them.
    missing = [key for key in keys.missing_keys if belongs_to(key, name)]
    if missing:
        faults.append(f"gets nothing for {name_some(missing)}")
    if faults:
        raise UserError(f"the adapter {folder} does not fit its base, which {' and '.join(faults)}")


def changes_base(adapted, name: str) -> bool:
    """Whether a weight of the base is another with an adapter; the first such weight tells.

    Adapters that are more than plain LoRA (DoRA, biases, whole layers) are taken to change it.
    """
    from peft.tuners.lora import LoraLayer

    config = adapted.peft_config[name]
    whole = getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none"
    tokens = getattr(config, "trainable_token_indices", None)
    if config.peft_type.value != "LORA" or config.use_dora or whole or tokens:
        return True
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer) and name in {*layer.lora_A, *layer.lora_embedding_A}:
            change, weight = layer.get_delta_weight(name), layer.get_base_layer().weight
            packed = not weight.is_floating_point() or weight.shape != change.shape
            if change.any() if packed else (weight + change.to(weight)).ne(weight).any():
                return True
    return False


def merge_adapter(adapted, **options):
    """The whole model of a base with its adapter. Raises ValueError if NaN comes of it.

    An output layer that shares its weight with the input embedding, where either was taught, gets
    a weight of its own: in training, too, the adapter was on one of the two alone.
    """
    import torch

    base = adapted.get_base_model()
    layers = [base.get_output_embeddings(), base.get_input_embeddings()]
    output, embedding = (getattr(layer, "base_layer", layer) for layer in layers)
    taught = any(hasattr(layer, "base_layer") for layer in layers)
    if taught and output and output.weight is embedding.weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
    model = adapted.merge_and_unload(safe_merge=True, **options)
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output and output.weight is not embedding.weight:
        model.config.tie_word_embeddings = False  # or it would be tied again when it is loaded
    return model
