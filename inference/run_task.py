"""Do a task on your own texts with a run's model, a model or adapter folder, or one from the Hub.

Reads text, Markdown, HTML and PDF files, folders of them, web pages, arXiv addresses, or stdin (-).
Streams the answers to stdout, or writes a file for each text into --output-dir, from the table
answers.jsonl there: what it has is not made again, a changed text or another setting is. Prompt and
greedy decoding are the evaluation's. A text that is longer than those the adapter was taught on is
read in parts (inference/parts.py).

    python -m inference.run_task summarize paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import sys
from argparse import ArgumentParser
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from common.cli import UserError, one_line, positive, run, script_parser, tell_errors, warn
from data_prep.find_documents import shown
from inference.answer_documents import Job, stream, write
from inference.answers import AnswerOptions, System
from inference.generate import prompt_limit
from inference.parts import Cutter, make_cutter
from inference.sources import check_outputs, find_sources, read_texts
from inference.weights import check_template, find_weights, load_model, load_tokenizer, trained_for
from prompts.task import FOLDER, Task, load_task
from training.config import OUTPUTS, check_finished, is_unfinished
from training.lengths import read_lengths


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


def choose_system(task: Task, model: str | None, of_base: str | None, consensus: bool) -> System:
    """The system that the command line names, which is told. `of_base`: None for the model itself,
    else how its base is asked, "base" or "instructed". Raises UserError."""
    name = model or newest_adapter(task)
    weights = find_weights(name, base=bool(of_base))
    if weights.adapter:
        check_template(Path(weights.adapter), task)
    which = "" if model else f", the adapter for {task.name} that was trained last"
    base = "the base of " if of_base else ""
    print(f"taking {base}{shown(str(name))}{which}; it is loading", file=sys.stderr, flush=True)
    return System(weights, task.student_template(of_base == "instructed"), consensus)


def choose_limit(system: System, task: Task, options: AnswerOptions) -> int:
    """The longest prompt that is read; the end of a longer one is left out. Raises UserError."""
    from transformers import AutoConfig

    weights = system.model
    try:
        config = AutoConfig.from_pretrained(weights.model, revision=weights.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {weights.model}: {one_line(error, 200)}") from None
    max_new_tokens = options.max_new_tokens or task.max_new_tokens
    return prompt_limit(config.get_text_config(), max_new_tokens, options.max_prompt_tokens)


def choose_cutter(
    system: System, task: Task, of_base: bool, asked: int | None, limit: int
) -> Cutter | None:
    """How a long text is cut: into parts of as many tokens as are asked for, or as the adapter was
    taught on, and of `limit` at most; None where nothing tells that. Raises UserError."""
    weights = system.model
    lengths = None if of_base else read_lengths(Path(weights.adapter or weights.model))
    if not (lengths or asked):
        if weights.adapter:
            unknown = "nothing tells on texts of what length it was taught, so all are read in one"
            known = "`just train` with the run's config.yaml notes it (docs/serving.md)"
            print(f"{unknown}; {known}, or --parts TOKENS says it", file=sys.stderr)
        return None
    try:
        tokenizer = load_tokenizer(weights)
    except OSError as error:
        raise UserError(f"cannot load {weights.model}: {one_line(error, 200)}") from None
    return make_cutter(tokenizer, task, system.template, lengths, asked, limit)


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
    option("--max-prompt-tokens", type=positive, help="read in one, cut to this (default: 8192)")
    in_parts = parser.add_mutually_exclusive_group()
    parts = "read texts that are longer in parts of as many tokens (default: as it was taught on)"
    in_parts.add_argument("--parts", type=positive, metavar="TOKENS", help=parts)
    in_parts.add_argument("--whole", action="store_true", help="read long texts in one")
    option("--show-parts", action="store_true", help="print the parts' answers, too")
    option("--samples", type=positive, help="take the most alike of as many answers; not streamed")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task = load_task(args.task, args.prompts_dir)
    with suppress(AttributeError):  # a terminal of another encoding shows what it can
        sys.stdout.reconfigure(errors="replace")
    sources, failures = find_sources(args.texts, args.output_dir)
    tell_errors(*failures)
    if args.output_dir:
        check_outputs(sources, args.output_dir)
    options = AnswerOptions(
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens or 8192,
        samples=args.samples,
        engine="transformers",  # a few texts are answered before vLLM is up
        load=lru_cache(maxsize=1)(load_model),  # once for all parts of all texts
    )
    job = None
    if not args.show_text:
        system = choose_system(task, args.model, args.of_base, bool(args.samples))
        limit = choose_limit(system, task, options)
        cutter = choose_cutter(system, task, bool(args.of_base), args.parts, limit)
        whole = args.whole or (args.max_prompt_tokens is not None and not args.parts)
        job = Job(system, task, options, limit, cutter, whole, args.show_parts)
    documents, unread = read_texts(sources, args.private)
    tell_errors(*unread)  # before the others are answered, which may take hours
    n_unanswered = 0
    try:
        if args.show_text:
            print("\n\n".join(document.text for document in documents))
        elif documents and args.output_dir:
            n_unanswered = write(job, documents, args.output_dir)
        elif documents:
            n_unanswered = stream(job, documents)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    n_failures = len(failures) + len(unread) + n_unanswered
    n_texts = len(failures) + len(sources)
    if n_failures and n_texts > 1:
        print(f"{n_failures} of {n_texts} texts failed; the lines above say why", file=sys.stderr)
    if n_failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
