"""Merge a trained adapter into its base model, in the precision the base was published in.

Reads outputs/<config>/ (the adapter axolotl wrote), writes outputs/<config>/merged. The adapter is
added to the unquantized base: axolotl's default merge would round every matrix, the embeddings
included, to 4 bits and back.

    python -m eval.merge_adapter axolotl_configs/smollm2-135m-dpo-sft-lora.yaml
"""

import shutil
from pathlib import Path

from axolotl_configs.run_config import RunConfig, check_model_folder, load_run_config
from data_prep.records import UserError, file_sha, is_made, mark_made, run, script_parser

ADAPTER = "adapter_model.safetensors"


def merge_settings(config: RunConfig) -> dict:
    """What merged/made.json records: base and adapter. Raises UserError if there is no adapter."""
    if not (config.output_dir / ADAPTER).is_file():
        raise UserError(
            f"no adapter in {config.output_dir}; train it with `just train {config.path.stem}`"
        )
    return {
        "base_model": config.base_model,
        "revision": config.base_revision,
        "adapter": file_sha(config.output_dir / ADAPTER),
    }


def merge(config: RunConfig, merged: Path) -> None:
    """Write base + adapter as an ordinary model folder, with the tokenizer of the trained run."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    base = AutoModelForCausalLM.from_pretrained(
        config.base_model, revision=config.base_revision, dtype="auto"
    )
    model = PeftModel.from_pretrained(base, config.output_dir).merge_and_unload(
        progressbar=True, safe_merge=True
    )
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(config.output_dir).save_pretrained(merged)


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("config", type=Path, help="the axolotl YAML that trained the adapter")
    args = parser.parse_args()
    config = load_run_config(args.config)
    check_model_folder(config.base_model)
    settings = merge_settings(config)
    if is_made(config.merged, settings):
        print(f"{config.merged} is up to date")
        return
    partial = config.merged.with_name("merged.partial")
    shutil.rmtree(partial, ignore_errors=True)
    print(f"merging {config.output_dir} into {config.base_model}", flush=True)
    merge(config, partial)
    mark_made(partial, settings)
    shutil.rmtree(config.merged, ignore_errors=True)
    partial.rename(config.merged)
    print(f"merged model in {config.merged}")


if __name__ == "__main__":
    run(main)
