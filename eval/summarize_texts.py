"""Summarize texts with a config's model, a model or adapter folder, or one from the Hub.

Reads files, folders of .txt and .md, or stdin (-). Streams the summaries to stdout, or writes one
file for each text into --output-dir and, run again, only those that are missing or older than their
text. Prompt and greedy decoding are those of the evaluation.

    python -m eval.summarize_texts paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser, warn
from common.files import is_made, mark_made, replacing
from eval.generate_summaries import build_prompt, generate_batch, load_model, tokens
from eval.merge_adapter import ADAPTER, merge_settings
from eval.systems import INSTRUCTED
from training.run_config import check_model_folder, fingerprint, load_run_config

STDIN = Path("/dev/stdin")


def newest_adapter() -> str:
    """The folder of the adapter trained last. Raises UserError if there is none."""
    adapters = sorted(Path("outputs").glob(f"*/{ADAPTER}"), key=lambda p: p.stat().st_mtime)
    if not adapters:
        raise UserError("outputs/ holds no adapter; `just train CONFIG`, or name a --model")
    return str(adapters[-1].parent)


def find_model(name: str, revision: str | None, base: bool) -> tuple[str, str | None]:
    """(folder or Hub id, revision of the base) of what `name` stands for, or of its base.

    Raises UserError if there is none.
    """
    config = Path(name if name.endswith(".yaml") else f"axolotl_configs/{name}.yaml")
    if name.endswith(".yaml") or config.exists():
        trained = load_run_config(config)
        if base:
            return trained.base_model, trained.base_revision
        if is_made(trained.merged, merge_settings(trained)):
            return str(trained.merged), None
        return str(trained.output_dir), trained.base_revision
    from huggingface_hub import snapshot_download
    from peft import PeftConfig

    try:
        adapter = PeftConfig.from_pretrained(name, revision=revision)
    except ValueError:  # peft's answer where there is no adapter
        check_model_folder(name)
        if base:
            raise UserError(f"{name} names no base; pass that itself as --model") from None
        return name, revision
    if base:
        return adapter.base_model_name_or_path, adapter.revision
    folder = name if Path(name).is_dir() else snapshot_download(name, revision=revision)
    return folder, adapter.revision


def find_texts(inputs: list[str], output_dir: Path | None) -> dict[str, Path]:
    """Name -> file of each text; a folder's names are relative to it. Raises UserError."""
    texts: dict[str, Path] = {}
    for given in inputs:
        path = STDIN if given == "-" else Path(given)
        below = [p for p in sorted(path.rglob("*")) if p.suffix in (".txt", ".md")]
        if output_dir:
            below = [p for p in below if not p.resolve().is_relative_to(output_dir.resolve())]
        if path.is_dir() and not below:
            raise UserError(f"{path} holds no .txt or .md")
        for file in below or [path]:
            name = str(file.relative_to(path)) if below else file.name
            if name in texts or (output_dir and (output_dir / name).resolve() == file.resolve()):
                raise UserError(f"{file} would be overwritten, or its summary; rename it")
            texts[name] = file
    return texts


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError if it is not there, empty or not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is not text in UTF-8; extract or convert its text first")
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def outdated(texts: dict[str, Path], settings: dict, folder: Path) -> list[str]:
    """Names of the texts without an up-to-date summary. Raises UserError for other settings."""
    if (folder / "made.json").exists() and not is_made(folder, settings):
        raise UserError(f"{folder} holds summaries of another model or setting; name another")
    mark_made(folder, settings)
    ages = {name: (folder / name).stat().st_mtime for name in texts if (folder / name).exists()}
    done = {name for name, age in ages.items() if age >= texts[name].stat().st_mtime}
    print(f"{len(done)} of {len(texts)} summaries are there", file=sys.stderr)
    return [name for name in texts if name not in done]


def load(name: str, revision: str | None):
    """(model, tokenizer). Raises UserError if they cannot be loaded."""
    print(f"loading {name}", file=sys.stderr, flush=True)
    try:
        model, tokenizer = load_model(name, revision)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load {name}: {said}") from None
    if not tokenizer.chat_template:
        raise UserError(f"{name} has no chat template, so it is no model that was taught here")
    return model, tokenizer


def stream(model, tokenizer, prompts: dict[str, str], max_new_tokens: int) -> None:
    """Print the summaries word by word as they come; ends in peace where nobody reads on."""
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate = partial(model.generate, streamer=streamer)
    try:
        for name, prompt in prompts.items():
            if len(prompts) > 1:
                print(f"==> {name} <==", flush=True)
            (made,) = generate_batch(model, tokenizer, [prompt], max_new_tokens)
            cut = ", stopped at --max-new-tokens" if made["finish_reason"] == "length" else ""
            read, written = made["n_prompt_tokens"], made["n_new_tokens"]
            print(f"{name}: {read:,} tokens read, {written} written{cut}", file=sys.stderr)
    except (BrokenPipeError, KeyboardInterrupt) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 0)


def write(model, tokenizer, prompts: dict[str, str], args: Namespace) -> None:
    """Write a file for each summary, texts of like length in a batch."""
    names = sorted(prompts, key=lambda name: len(prompts[name]))
    with tqdm(total=len(names), desc="summaries", unit="text") as bar:
        for start in range(0, len(names), args.batch_size):
            batch = names[start : start + args.batch_size]
            texts = [prompts[name] for name in batch]
            made = generate_batch(model, tokenizer, texts, args.max_new_tokens)
            for name, summary in zip(batch, made, strict=True):
                with replacing(args.output_dir / name) as temporary:
                    temporary.write_text(summary["text"] + "\n", encoding="utf-8")
            bar.update(len(batch))


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("texts", nargs="+", help="files, folders of .txt and .md, - for stdin")
    option("--model", help="config name, folder or Hub id (default: the adapter trained last)")
    option("--revision", help="of a Hub id")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--base", action="store_true", help="compare: its base, given the bare text")
    only.add_argument("--instructed", action="store_true", help="compare: its base, instructed")
    option("--output-dir", type=Path, help="write a file for each text instead")
    option("--max-new-tokens", type=positive, default=512, help="longest summary")
    option("--max-prompt-tokens", type=tokens, default=8192, help="longer texts are cut; 16K, 32K")
    option("--batch-size", type=positive, default=8, help="texts at once, with --output-dir")
    args = parser.parse_args()
    paths, template = (
        find_texts(args.texts, args.output_dir),
        INSTRUCTED if args.instructed else None,
    )
    texts = {name: read_text(path) for name, path in paths.items()}
    name, revision = find_model(
        args.model or newest_adapter(), args.revision, args.base or args.instructed
    )
    if args.output_dir:
        settings = {"model": fingerprint(name), "revision": revision, "template": template}
        settings |= {key: getattr(args, key) for key in ("max_new_tokens", "max_prompt_tokens")}
        texts = {key: texts[key] for key in outdated(paths, settings, args.output_dir)}
    if not texts:
        return
    model, tokenizer = load(name, revision)
    room = getattr(model.config, "max_position_embeddings", 10**9) - args.max_new_tokens
    limit, prompts = min(args.max_prompt_tokens, room), {}
    for text, content in texts.items():
        prompts[text], cut = build_prompt(tokenizer, content, template, limit)
        if cut:
            warn(f"{text}: its last {cut:,} tokens do not fit into {limit:,} and are left out")
    if args.output_dir:
        write(model, tokenizer, prompts, args)
    else:
        stream(model, tokenizer, prompts, args.max_new_tokens)


if __name__ == "__main__":
    run(main)
