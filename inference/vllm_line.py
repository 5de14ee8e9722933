"""The command line of vLLM that serves adapters as this repo's own server does.

vLLM reads its base from a folder or the Hub, so adapters that were trained on 4 bits get their
base as training rounded it (Dettmers et al., 2023, arXiv:2305.14314), saved once in 16 bits as
outputs/bases/NAME-nf4-DIGEST. By itself vLLM stops where the base does and writes the base's chat
template; what the adapters learned otherwise lies in outputs/bases/NAME-vllm-DIGEST, and the line
names it.
"""

import json
import re
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from common.cli import UserError, one_line
from common.files import digest, is_made, locked, mark_made, write_text
from inference.adapters import check_adapter
from inference.weights import NF4, Weights, ends_of, load_base, load_tokenizer, model_ends
from training.chat import NO_THINKING, stop_ids
from training.config import OUTPUTS, fingerprint

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM takes
BASES = OUTPUTS / "bases"


def find_vllm() -> str | None:
    """The command of the vLLM that is installed beside us, or on the PATH."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm")


def rounded_base(base: Weights) -> Path:
    """The folder of a base as training rounded it, in 16 bits; made where it is not there yet.

    Raises UserError if the base cannot be loaded, OSError where the disk is full.
    """
    settings = {"model": base.model, "revision": base.revision}
    settings |= {"fingerprint": fingerprint(base.model), "rounded": NF4, "dtype": "16 bits"}
    name = f"{Path(base.model).name}-nf4-{digest(json.dumps(settings))[:8]}"
    folder, partial = BASES / name, BASES / f"{name}.partial"
    with locked(folder):  # whoever comes second finds it made
        if is_made(folder, settings):
            return folder
        print(f"making {folder}: {base.model} as 4-bit training rounded it", file=sys.stderr)
        shutil.rmtree(partial, ignore_errors=True)
        save_rounded(base, partial)
        mark_made(partial, settings)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
        print(f"made {folder}: {size / 2**30:.2f} GiB", file=sys.stderr)
    return folder


def save_rounded(base: Weights, folder: Path) -> None:
    import torch
    from transformers import GenerationConfig

    try:
        model, tokenizer = load_base(base), load_tokenizer(base)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {base.model}: {one_line(error, 200)}") from None
    for parameter in model.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(torch.bfloat16)
    ends = stop_ids(tokenizer, model.generation_config)
    model.generation_config = GenerationConfig(eos_token_id=ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_for_vllm(name: str, folder: str) -> int:
    """The rank of an adapter. Raises UserError if vLLM cannot take it."""
    from peft import PeftConfig

    check_adapter(name, folder)
    config = PeftConfig.from_pretrained(folder)
    reason = unfit_for_vllm(config)
    if reason:
        raise UserError(f"vLLM cannot serve {name}: {reason}; merge it, and serve merged/")
    return largest_rank(config)


def largest_rank(config) -> int:
    return max([config.r, *config.rank_pattern.values()])


def unfit_for_vllm(config) -> str | None:
    """Why vLLM cannot take an adapter of this configuration, None if it can."""
    if config.peft_type.value != "LORA":
        return f"it is of the type {config.peft_type.value}"
    if config.use_dora:
        return "it is a DoRA adapter"
    if config.modules_to_save:
        return f"it holds whole layers ({', '.join(config.modules_to_save)})"
    if largest_rank(config) > RANKS[-1]:
        return f"its rank {largest_rank(config)} is too large"
    return None


def chat_template(adapters: dict[str, Weights]) -> str:
    """The one template that all adapters learned. Raises UserError if they differ."""
    templates = {name: load_tokenizer(one).get_chat_template() for name, one in adapters.items()}
    if len(set(templates.values())) > 1:
        names = ", ".join(templates)
        raise UserError(f"vLLM writes one chat template for all, and {names} learned unlike ones")
    return next(iter(templates.values()))


def told_to_vllm(base: Weights, adapters: dict[str, Weights]) -> list[str]:
    """The options for the ends and the template that the adapters have and the base lacks.

    Raises UserError if there is not one template for all.
    """
    published, base_template, by_itself, ends = None, None, set(), set()
    with suppress(OSError):  # of a base that is not on this machine, where the line is only printed
        published, tokenizer = model_ends(base), load_tokenizer(base)
        base_template = tokenizer.chat_template
        of_model = published.eos_token_id
        of_model = of_model if isinstance(of_model, list) else [of_model]
        by_itself = {tokenizer.eos_token_id, *of_model}  # where vLLM stops untold
        ends = set(stop_ids(tokenizer, published))
    for weights in adapters.values():
        ends.update(ends_of(load_tokenizer(weights), published, weights.adapter))
    template = chat_template(adapters) if adapters else base_template
    files = {}
    if not ends <= by_itself:
        # Its eos_token_id ends answers; as it names no sampling, vLLM's own defaults stay.
        files["generation_config.json"] = json.dumps({"eos_token_id": sorted(ends)}) + "\n"
    if template != base_template:
        files["chat_template.jinja"] = template
    name = f"{Path(base.model).name}-vllm-{digest(*sorted(files.items()))[:8]}"
    for file, text in files.items():
        write_text(BASES / name / file, text)
    # "vllm" says: the ends of the model's own file, and none of its sampling.
    own_ends = "generation_config.json" in files
    options = ["--generation-config", str(BASES / name) if own_ends else "vllm"]
    if "chat_template.jinja" in files:
        options += ["--chat-template", str(BASES / name / "chat_template.jinja")]
    if re.search(r"\b(enable_)?thinking\b", template or ""):
        options += ["--default-chat-template-kwargs", json.dumps(NO_THINKING)]
    return options


def lora_module(name: str, folder: str) -> str:
    """An adapter as --lora-modules takes it."""
    if "=" in name or "=" in folder:
        return json.dumps({"name": name, "path": folder})
    return f"{name}={folder}"


def vllm_line(served: dict[str, Weights], base: Weights, host: str, port: int) -> list[str]:
    """The command line for `served` (name -> weights) over `base`, whose rounded form is made.

    Raises UserError for adapters that vLLM cannot take.
    """
    adapters = {name: weights for name, weights in served.items() if weights.adapter}
    ranks = [check_for_vllm(name, weights.adapter) for name, weights in adapters.items()]
    names = [name for name in served if name not in adapters]
    if base.four_bits:
        base = Weights(str(rounded_base(base)))
        names = [Path(base.model).name]
    line = ["vllm", "serve", base.model, "--host", host, "--port", str(port)]
    line += ["--served-model-name", *names, *told_to_vllm(base, adapters)]
    if base.revision:
        line += ["--revision", base.revision]
    if adapters:
        fitting = next(rank for rank in RANKS if rank >= max(ranks))
        line += ["--enable-lora", "--max-loras", str(len(adapters))]
        modules = [lora_module(name, weights.adapter) for name, weights in adapters.items()]
        line += ["--max-lora-rank", str(fitting), "--lora-modules", *modules]
    return line
