"""Do a task on your own texts with a run's model, a model or adapter folder, or one from the Hub.

Reads text, Markdown, HTML and PDF files, folders of them, web pages, arXiv addresses, or stdin (-).
Streams the answers to stdout, or writes a file for each text into --output-dir, from the table
answers.jsonl there: what it has is not made again, a changed text or another setting is. Prompt and
greedy decoding are the evaluation's.

    python -m eval.run_task summarize paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import re
import sys
from argparse import Namespace
from pathlib import Path

from common.cli import UserError, positive, run, script_parser, warn
from common.files import digest, write_text
from common.table import load
from data_prep.filter_pairs import repetition
from eval import generate_answers as generate
from eval.load_model import find_weights, load_model, trained_for
from eval.systems import System
from prompts import FOLDER, Task, load_task
from training.run_config import OUTPUTS

READ = (".txt", ".md", ".html", ".pdf")  # of a folder


def newest_adapter(task: Task) -> str:
    """The folder of the task's adapter trained last. Raises UserError if there is none."""
    found = sorted(OUTPUTS.glob("*/adapter_model.safetensors"), key=lambda p: p.stat().st_mtime)
    folders = [path.parent for path in found if trained_for(path.parent) == task.name]
    if not folders:
        raise UserError(f"{OUTPUTS}/ holds no adapter for {task.name}; train it, or name a --model")
    return str(folders[-1])


def find_texts(inputs: list[str], output_dir: Path | None, private: bool) -> dict[str, str]:
    """Name -> text; a folder's names are relative to it. Raises UserError."""
    from eval.read_document import is_address, read_document  # its packages take half a second

    texts: dict[str, str] = {}
    for given in inputs:
        source = "/dev/stdin" if given == "-" else given
        path = Path(re.sub(r"\W+", "-", source).strip("-") if is_address(source) else source)
        below = [p for p in sorted(path.rglob("*")) if p.suffix in READ]
        for file in below if path.is_dir() else [path]:
            name = str(file.relative_to(path)) if below else file.name
            if file.suffix in (".html", ".pdf") or is_address(source):
                name += ".txt"
            if name in texts or (output_dir and (output_dir / name).resolve() == file.resolve()):
                raise UserError(f"{file} would be overwritten, or its answer; rename it")
            texts[name] = read_document(source if file == path else str(file), private)
    if not texts:
        raise UserError(f"there is no {', '.join(READ)} in {' '.join(inputs)}")
    return texts


def stream(system: System, texts: dict[str, str], task: Task, args: Namespace) -> None:
    """Print the answers word by word as they come."""
    from transformers import TextStreamer

    model, tokenizer = load_model(system.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = generate.settings_of(system, task, args)
    longest, limit = settings["max_new_tokens"], generate.prompt_limit(model, settings)
    for name, text in texts.items():
        prompt, cut = generate.build_prompt(tokenizer, text, system.template, limit, task)
        if cut:
            warn(f"{name}: its last {cut:,} tokens do not fit into {limit:,} and are left out")
        if len(texts) > 1:
            print(f"==> {name} <==", flush=True)
        how = {"samples": args.samples} if args.samples else {"streamer": streamer}
        (made,) = generate.generate_batch(model, tokenizer, [prompt], longest, **how)
        if args.samples:
            print(made["text"], flush=True)
        end = ", stopped at --max-new-tokens" if made["finish_reason"] == "length" else ""
        read, written = made["n_prompt_tokens"], made["n_new_tokens"]
        print(f"{name}: {read:,} tokens read, {written} written{end}", file=sys.stderr)
        if end and repetition(made["text"]) > 0.5:
            advice = "is the text longer than those it was taught on? --max-prompt-tokens cuts it"
            warn(f"{name}: the answer repeats itself; {advice}")


def write(system: System, texts: dict[str, str], task: Task, args: Namespace) -> None:
    """Complete the table in the folder, and write from it a file for each text."""
    path, settings = args.output_dir / "answers.jsonl", generate.settings_of(system, task, args)
    ids = {name: digest(text) for name, text in texts.items()}
    rows = {i: {"id": i, "text": texts[name], "settings": settings} for name, i in ids.items()}
    try:
        generate.answer_rows(task.name, system, list(rows.values()), path, task, args)
    finally:  # what is there after Ctrl-C, too
        found = load(path, rows.values(), generate.KEY)
        for name, i in ids.items():
            if i in found:
                write_text(args.output_dir / name, found[i]["text"] + "\n")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("task", help="a folder in --prompts-dir, such as summarize")
    option("texts", nargs="+", help="files, folders, https://..., arXiv:ID, - for stdin")
    option("--model", help="run, folder or Hub id (default: the task's adapter trained last)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--base", action="store_true", help="compare: its base, not instructed")
    only.add_argument("--instructed", action="store_true", help="compare: its base, instructed")
    option("--output-dir", type=Path, help="write a file for each text instead")
    option("--show-text", action="store_true", help="only show the text as it was read")
    option("--private", action="store_true", help="also read addresses in your own network")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--samples", type=positive, help="take the most alike of as many answers; not streamed")
    parser.set_defaults(batch_tokens=16384)
    args = parser.parse_args()
    task = load_task(args.task, args.prompts_dir)
    texts = find_texts(args.texts, args.output_dir, args.private)
    if args.show_text:
        return print("\n\n".join(texts.values()))
    weights = find_weights(args.model or newest_adapter(task), args.base or args.instructed)
    template = task.student_template(args.instructed)
    system = System(weights, template, bool(args.samples))
    try:
        (write if args.output_dir else stream)(system, texts, task, args)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run(main)
