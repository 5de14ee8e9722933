"""Merge a trained adapter into the base it was trained on, in the precision that was published in.

Reads outputs/<config>/ (the adapter axolotl wrote), writes outputs/<config>/merged. Where the
config trains on 4 bits, the layers it rounded are rounded alike and then put back into 16 bits, so
that the adapter meets the weights it learned to correct (Dettmers et al., 2023, arXiv:2305.14314).
axolotl's default merge would round the embeddings too. Prints how far the merged logits are from
those of base + adapter as trained.
With --gguf it also writes outputs/<config>/merged.gguf by llama.cpp's converter, which is fetched
once from the package index into models/llama.cpp.

    python -m eval.merge_adapter axolotl_configs/smollm2-135m-dpo-sft-lora.yaml
"""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from common.cli import UserError, run, script_parser
from common.files import file_sha, is_made, mark_made, replacing
from eval.systems import base_of_adapter
from training.run_config import RunConfig, check_model_folder, load_run_config

ADAPTER = "adapter_model.safetensors"
LLAMA_CPP = "llama-cpp-python==0.3.36"  # its source package carries llama.cpp's converter (MIT)
NF4 = {  # as axolotl loads the base of a QLoRA run
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
PROBE = "The harbour was built in 1823 and protects the market square from the sea."


def merge_settings(config: RunConfig) -> dict:
    """What merged/made.json records: base, its rounding and adapter.

    Raises UserError if there is no adapter, or one of another base.
    """
    if not (config.output_dir / ADAPTER).is_file():
        raise UserError(
            f"no adapter in {config.output_dir}; train it with `just train {config.path.stem}`"
        )
    if (base := base_of_adapter(config.output_dir)) != config.base_model:
        raise UserError(
            f"the adapter in {config.output_dir} is for the base {base}, but {config.path} names "
            f"{config.base_model}; `just train {config.path.stem}` trains anew"
        )
    return {
        "base_model": config.base_model,
        "revision": config.base_revision,
        "adapter": file_sha(config.output_dir / ADAPTER),
        **({"rounded to": "nf4"} if config.settings.get("load_in_4bit") else {}),
    }


def merge(config: RunConfig, merged: Path) -> None:
    """Write base + adapter as an ordinary model folder, with the tokenizer of the trained run.

    Raises UserError if the merged model does not compute what base + adapter compute.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(config.output_dir)
    inputs = tokenizer(PROBE, return_tensors="pt")

    def logits(model) -> torch.Tensor:
        with torch.inference_mode():
            return model.eval()(**inputs.to(model.device)).logits.float()

    def load_base():
        return AutoModelForCausalLM.from_pretrained(
            config.base_model, revision=config.base_revision, dtype="auto", **rounded
        )

    four_bits = config.settings.get("load_in_4bit")
    rounded = {"quantization_config": BitsAndBytesConfig(**NF4)} if four_bits else {}
    adapted = PeftModel.from_pretrained(load_base(), config.output_dir)
    wanted = logits(adapted)
    if four_bits:
        adapted = PeftModel.from_pretrained(load_base().dequantize(), config.output_dir)
    with adapted.disable_adapter():
        untouched = logits(adapted)
    model = adapted.merge_and_unload(progressbar=True, safe_merge=True)
    gap, moved = ((logits(model) - x).abs().mean().item() for x in (wanted, untouched))
    print(f"mean logit gap to base + adapter: {gap:.2g}; the adapter moves logits by {moved:.2g}")
    # Weights and activations in bf16 round by up to 1/256; more than that is another model.
    if not gap <= max(moved / 4, untouched.abs().mean().item() / 64):
        raise UserError(f"the merge of {config.output_dir} failed: it is not base + adapter")
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)


def fetch_converter(folder: Path = Path("models/llama.cpp")) -> Path:
    """llama.cpp's convert_hf_to_gguf.py, taken once out of LLAMA_CPP. Raises UserError."""
    script = folder / "convert_hf_to_gguf.py"
    if script.is_file():
        return script
    print(f"fetching llama.cpp's converter out of {LLAMA_CPP} (76 MB, about a minute)", flush=True)
    with TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        pip += ["--no-binary", ":all:", "--dest", temporary, LLAMA_CPP]
        if subprocess.run(pip).returncode:
            raise UserError(f"cannot download {LLAMA_CPP}; connect to the package index")
        partial = Path(temporary) / "partial"
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
            for member in archive.getmembers():
                _, _, name = member.name.partition("/vendor/llama.cpp/")
                if name.startswith((script.name, "conversion/", "gguf-py/gguf/", "LICENSE")):
                    archive.extract(member.replace(name=name), partial, filter="data")
        shutil.copytree(partial, folder, dirs_exist_ok=True)
    return script


def write_gguf(merged: Path, path: Path) -> None:
    """The merged model as one 16-bit GGUF file. Raises UserError with the converter's last line."""
    with replacing(path) as temporary:
        command = [sys.executable, str(fetch_converter()), str(merged), "--outtype", "bf16"]
        done = subprocess.run(
            [*command, "--outfile", str(temporary)], capture_output=True, text=True
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:]
            raise UserError(f"llama.cpp's converter refused {merged}: {' '.join(said)[:300]}")
    print(f"GGUF in {path} ({path.stat().st_size / 2**20:,.0f} MiB)")


def merge_run(config: RunConfig) -> None:
    """Make the run's merged model, unless it is there. Stand-in until generation is merged."""
    check_model_folder(config.base_model)
    settings = merge_settings(config)
    if is_made(config.merged, settings):
        print(f"{config.merged} is up to date")
    else:
        partial = config.merged.with_name("merged.partial")
        shutil.rmtree(partial, ignore_errors=True)
        print(f"merging {config.output_dir} into {config.base_model}", flush=True)
        merge(config, partial)
        mark_made(partial, settings)
        shutil.rmtree(config.merged, ignore_errors=True)
        partial.rename(config.merged)
        config.merged.with_suffix(".gguf").unlink(missing_ok=True)
        print(f"merged model in {config.merged}")


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    parser.add_argument("--gguf", action="store_true", help="also write merged.gguf, 16-bit")
    args = parser.parse_args()
    config = load_run_config(args.config)
    merge_run(config)
    if args.gguf and not config.merged.with_suffix(".gguf").exists():
        write_gguf(config.merged, config.merged.with_suffix(".gguf"))


if __name__ == "__main__":
    run(main)
