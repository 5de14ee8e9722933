"""Do a task on your own texts with a run's model, a model or adapter folder, or one from the Hub.

Reads text, Markdown, HTML and PDF files, folders of them, web pages, arXiv addresses, or stdin (-).
Streams the answers to stdout, or writes a file for each text into --output-dir, from the table
answers.jsonl there: what it has is not made again, a changed text or another setting is. Prompt and
greedy decoding are the evaluation's.

    python -m inference.run_task summarize paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import sys
from argparse import ArgumentParser
from contextlib import suppress
from pathlib import Path

from common.cli import UserError, positive, run, script_parser, warn
from common.files import digest, write_text
from common.table import load
from data_prep.filter_pairs import repetition
from data_prep.find_documents import shown
from inference.answers import KEY, AnswerOptions, System, answer_rows, requests_of, settings_of
from inference.generate import build_prompt, generate_batch, prompt_limit
from inference.sources import TABLE, check_outputs, find_sources, read_texts
from inference.weights import check_template, find_weights, load_model, trained_for
from prompts.task import FOLDER, Task, load_task
from training.config import OUTPUTS, check_finished, is_unfinished


def newest_adapter(task: Task) -> str:
    """The folder of the task's adapter trained last. Raises UserError if there is none."""
    weights = sorted(OUTPUTS.glob("*/adapter_model.safetensors"), key=lambda p: p.stat().st_mtime)
    folders = [path.parent for path in weights if trained_for(path.parent) == task.name]
    finished = [folder for folder in folders if not is_unfinished(folder)]
    if not folders:
        raise UserError(f"{OUTPUTS}/ holds no adapter for {task.name}; train it, or name a --model")
    if not finished:
        check_finished(folders[-1])  # raises
    if finished[-1] != folders[-1]:
        warn(f"{folders[-1]} is passed over, for its training has not ended")
    return str(finished[-1])


def stream(system: System, texts: dict[str, str], task: Task, options: AnswerOptions) -> None:
    """Print the answers (name -> text) word by word as they come."""
    from transformers import TextStreamer

    model, tokenizer = load_model(system.model)
    settings = settings_of(system, task, options)
    limit = prompt_limit(model, settings)
    if options.samples:
        how = {"samples": options.samples}
    else:
        how = {"streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)}
    for file, text in texts.items():
        name = shown(file)
        prompt, n_cut = build_prompt(tokenizer, text, system.template, limit, task)
        if n_cut:
            warn(f"{name}: its last {n_cut:,} tokens do not fit into {limit:,} and are left out")
        if len(texts) > 1:
            print(f"==> {name} <==", flush=True)
        (answer,) = generate_batch(model, tokenizer, [prompt], settings["max_new_tokens"], **how)
        if options.samples:
            print(answer["text"], flush=True)
        tell_answer(name, answer)


def tell_answer(name: str, answer: dict) -> None:
    """Say how long an answer is, and what may be wrong with it."""
    is_cut = answer["finish_reason"] == "length"
    end = ", stopped at --max-new-tokens" if is_cut else ""
    read, written = answer["n_prompt_tokens"], answer["n_new_tokens"]
    print(f"{name}: {read:,} tokens read, {written} written{end}", file=sys.stderr)
    if is_cut and repetition(answer["text"]) > 0.5:
        advice = "is the text longer than those it was taught on? --max-prompt-tokens cuts it"
        warn(f"{name}: the answer repeats itself; {advice}")


def write(
    system: System, texts: dict[str, str], task: Task, options: AnswerOptions, folder: Path
) -> None:
    """Complete the table in the folder, and write from it a file for each text (name -> text)."""
    path, settings = folder / TABLE, settings_of(system, task, options)
    rows = [{"id": digest(text), "text": text} for text in dict.fromkeys(texts.values())]
    try:
        answer_rows(system, rows, path, task, options, settings)
    finally:  # what is there after Ctrl-C, too
        answers = load(path, requests_of(rows, system.template, task, settings), KEY)
        for name, text in texts.items():
            answer = answers.get(digest(text))
            if answer:
                write_text(folder / name, answer["text"] + "\n")


def choose_system(task: Task, model: str | None, of_base: str | None, consensus: bool) -> System:
    """The system that the command line names, which is told. `of_base`: None for the model itself,
    else how its base is asked, "base" or "instructed". Raises UserError."""
    name = model or newest_adapter(task)
    weights = find_weights(name, base=bool(of_base))
    if weights.adapter:
        check_template(Path(weights.adapter), task)
    which = "" if model else f", the adapter for {task.name} that was trained last"
    base = "the base of " if of_base else ""
    print(f"taking {base}{shown(str(name))}{which}", file=sys.stderr)
    return System(weights, task.student_template(of_base == "instructed"), consensus)


def make_parser() -> ArgumentParser:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("task", help="a folder in --prompts-dir, such as summarize")
    option("texts", nargs="+", help="files, folders, https://..., arXiv:ID, - for stdin")
    option("--model", help="run, folder or Hub id (default: the task's adapter trained last)")
    only = parser.add_mutually_exclusive_group()
    of_base = {"action": "store_const", "dest": "of_base"}
    only.add_argument("--base", const="base", help="compare: its base, not instructed", **of_base)
    instructed = "compare: its base, instructed"
    only.add_argument("--instructed", const="instructed", help=instructed, **of_base)
    option("--output-dir", type=Path, help="write a file for each text instead")
    option("--show-text", action="store_true", help="only show the text as it was read")
    option("--private", action="store_true", help="also read addresses in your own network")
    option("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    option("--max-new-tokens", type=positive, help="longest answer (default: the task's)")
    option("--max-prompt-tokens", type=positive, default=8192, help="longer texts are cut")
    option("--samples", type=positive, help="take the most alike of as many answers; not streamed")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task = load_task(args.task, args.prompts_dir)
    with suppress(AttributeError):  # a terminal of another encoding shows what it can
        sys.stdout.reconfigure(errors="replace")
    sources, failures = find_sources(args.texts, args.output_dir)
    if args.output_dir:
        check_outputs(sources, args.output_dir)
    options = AnswerOptions(
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        samples=args.samples,
        engine="transformers",  # a few texts are answered before vLLM is up
    )
    system = None
    if not args.show_text:
        system = choose_system(task, args.model, args.of_base, bool(args.samples))
    texts, unread = read_texts(sources, args.private)
    failures += unread
    try:
        if args.show_text:
            print("\n\n".join(texts.values()))
        elif texts and args.output_dir:
            write(system, texts, task, options, args.output_dir)
        elif texts:
            stream(system, texts, task, options)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
