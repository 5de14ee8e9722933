"""Summarize texts with a run's model, a model or adapter folder, or one from the Hub.

Reads files, folders of .txt and .md, or stdin (-). Streams the summaries to stdout, or writes a
file for each text into --output-dir, from the table summaries.jsonl there: what it has is not made
again, a changed text or another setting is. Prompt and greedy decoding are the evaluation's.

    python -m eval.summarize_texts paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import UserError, positive, run, script_parser, warn
from common.files import digest, write_text
from common.table import load
from eval.generate_summaries import (
    KEY,
    build_prompt,
    complete,
    generate_batch,
    prompt_limit,
    settings_of,
    tokens,
)
from eval.load_model import ADAPTER, find_weights, load_model
from eval.systems import INSTRUCTED, System

STDIN = Path("/dev/stdin")


def newest_adapter() -> str:
    """The folder of the adapter trained last. Raises UserError if there is none."""
    adapters = sorted(Path("outputs").glob(f"*/{ADAPTER}"), key=lambda p: p.stat().st_mtime)
    if not adapters:
        raise UserError("outputs/ holds no adapter; `just train CONFIG`, or name a --model")
    return str(adapters[-1].parent)


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


def stream(system: System, texts: dict[str, str], settings: dict) -> None:
    """Print the summaries word by word as they come; ends in peace where nobody reads on."""
    from transformers import TextStreamer

    model, tokenizer = load_model(system.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    limit = prompt_limit(model, settings)
    for name, text in texts.items():
        prompt, cut = build_prompt(tokenizer, text, system.template, limit)
        if cut:
            warn(f"{name}: its last {cut:,} tokens do not fit into {limit:,} and are left out")
        if len(texts) > 1:
            print(f"==> {name} <==", flush=True)
        (made,) = generate_batch(model, tokenizer, [prompt], settings["max_new_tokens"], streamer)
        end = ", stopped at --max-new-tokens" if made["finish_reason"] == "length" else ""
        read, written = made["n_prompt_tokens"], made["n_new_tokens"]
        print(f"{name}: {read:,} tokens read, {written} written{end}", file=sys.stderr)


def write(system: System, texts: dict[str, str], settings: dict, args: Namespace) -> None:
    """Complete the table in the folder, and write from it a file for each text."""
    path, ids = args.output_dir / "summaries.jsonl", {n: digest(t) for n, t in texts.items()}
    rows = {ids[name]: {"id": ids[name], "text": text} for name, text in texts.items()}
    try:
        complete("texts", system, list(rows.values()), path, settings, args)
    finally:  # what is there after Ctrl-C, too
        found = load(path, [{"id": i, "settings": settings} for i in rows], KEY)
        for name, i in ids.items():
            if i in found:
                write_text(args.output_dir / name, found[i]["text"] + "\n")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("texts", nargs="+", help="files, folders of .txt and .md, - for stdin")
    option("--model", help="run, config, folder or Hub id (default: the adapter trained last)")
    option("--revision", help="of a Hub id")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--base", action="store_true", help="compare: its base, given the bare text")
    only.add_argument("--instructed", action="store_true", help="compare: its base, instructed")
    option("--output-dir", type=Path, help="write a file for each text instead")
    option("--max-new-tokens", type=positive, default=512, help="longest summary")
    option("--max-prompt-tokens", type=tokens, default=8192, help="longer texts are cut; 16K, 32K")
    option("--batch-tokens", type=tokens, default=16384, help="at once, with --output-dir")
    args = parser.parse_args()
    paths = find_texts(args.texts, args.output_dir)
    texts = {name: read_text(path) for name, path in paths.items()}
    base = args.base or args.instructed
    weights = find_weights(args.model or newest_adapter(), args.revision, base)
    system = System(weights, INSTRUCTED if args.instructed else None)
    settings = settings_of(system, [], args)
    if args.output_dir:
        return write(system, texts, settings, args)
    try:
        stream(system, texts, settings)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run(main)
