"""Do a task on your own texts with a run's model, a model or adapter folder, or one from the Hub.

Reads text, Markdown, HTML and PDF files, folders of them, web pages, arXiv addresses, or stdin (-).
Streams the answers to stdout, or writes a file for each text into --output-dir, from the table
answers.jsonl there: what it has is not made again, a changed text or another setting is. Prompt and
greedy decoding are the evaluation's.

    python -m inference.run_task summarize paper.txt --model smollm2-135m-dpo-sft-lora
"""

import os
import re
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from tqdm import tqdm

from common.cli import UserError, one_line, positive, run, script_parser, warn
from common.files import digest, write_text
from common.table import load
from data_prep.decode_text import clean
from data_prep.filter_pairs import repetition
from data_prep.read_document import is_address, read_document
from inference import generate
from inference.answers import KEY, System, answer_rows, requests_of, settings_of
from inference.weights import check_template, find_weights, load_model, trained_for
from prompts.task import FOLDER, Task, load_task
from training.config import OUTPUTS, check_finished, is_unfinished

MADE_TEXT = (".html", ".htm", ".xhtml", ".pdf")
READ = (".txt", ".text", ".md", ".markdown", *MADE_TEXT)  # of a folder
TABLE = "answers.jsonl"
LONGEST_NAME = 200  # bytes; systems take 255, of which temporary names need some


@dataclass(frozen=True)
class Source:
    """A document: what `read_document` takes, and the name of its answer, a path below a folder."""

    where: str
    name: str


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


def shown(name: str) -> str:
    """A file's name as a terminal may show it, whatever bytes it is of."""
    return one_line(clean(os.fsencode(name).decode(errors="replace")), 1000)


def short(part: str) -> str:
    """A file's name without controls, of at most 200 bytes, so that it may be written anywhere."""
    plain = re.sub(r"[\0-\x1f\x7f]", "-", part)
    if len(os.fsencode(plain)) <= LONGEST_NAME:
        return plain
    end = f"-{digest(ascii(part))[:8]}{Path(part).suffix[:10]}"
    room = LONGEST_NAME - len(os.fsencode(end))
    return os.fsencode(plain)[:room].decode(errors="ignore") + end


def answer_name(name: str) -> str:
    """The name of the answer to a document: of a PDF or a page it is a .txt beside it."""
    if Path(name).suffix.lower() in MADE_TEXT:
        name += ".txt"
    return str(Path(*[short(part) for part in Path(name).parts]))


def page_name(address: str) -> str:
    """The name of the answer to a web page: its address, of letters, digits and hyphens."""
    return short((re.sub(r"\W+", "-", address).strip("-") or "page") + ".txt")


def folded(path: Path) -> str:
    """What two names share that some file systems take for one."""
    return normalize("NFC", str(path)).casefold()


def make_unique(sources: list[Source]) -> list[Source]:
    """The sources, each once, under names that no file system takes for another's, or the table's.

    A name that is taken gets a digest of where its document is, so it is the same in the next run.
    """
    files, folders, unique = {TABLE, f".{TABLE}.lock"}, set(), {}
    for source in sources:
        if source.where in unique:
            continue
        path = Path(source.name)
        under_file = any(folded(parent) in files for parent in path.parents)
        if under_file or folded(path) in files | folders:
            name = f"{path.stem}-{digest(ascii(source.where))[:8]}{path.suffix}"
            path = Path(short(name)) if under_file else path.with_name(short(name))
        files.add(folded(path))
        folders.update(folded(parent) for parent in path.parents)
        unique[source.where] = Source(source.where, str(path))
    return list(unique.values())


def files_below(folder: Path, output_dir: Path | None) -> list[Path]:
    """The files of a folder that are read, less the answers of an --output-dir within it.

    What is passed over is told in a line. Raises UserError if there is nothing to read.
    """
    errors: list[OSError] = []
    files = []
    for parent, _, names in os.walk(folder, onerror=errors.append):
        files += [Path(parent, name) for name in names if not name.startswith("._")]
    answers = output_dir and output_dir.resolve()
    if answers and answers != folder.resolve():
        files = [path for path in files if answers not in path.resolve().parents]
    readable = sorted(path for path in files if path.suffix.lower() in READ and not is_pipe(path))
    hidden = [p for p in files if any(part[0] == "." for part in p.relative_to(folder).parts)]
    others = sorted(str(p.relative_to(folder)) for p in set(files).difference(readable, hidden))
    over = f"{len(others)} other files, such as {', '.join(map(shown, others[:3]))}"
    for error in errors:
        warn(f"{shown(str(error.filename))} is passed over: {error.strerror}")
    if not readable:
        there = f", but {over}" if others else ""
        raise UserError(f"there is no {', '.join(READ)} in {shown(str(folder))}{there}")
    if others:
        warn(f"{shown(str(folder))}: {over}, are passed over; {', '.join(READ)} are read")
    return readable


def is_folder(path: Path) -> bool:
    """False, too, for what can be no path at all, such as a name that is too long."""
    with suppress(OSError):
        return path.is_dir()
    return False


def is_pipe(path: Path) -> bool:
    """Whether it is a pipe or a device, which may never end; a broken link is a file to tell of."""
    return path.exists() and not path.is_file()


def find_sources(inputs: list[str], output_dir: Path | None) -> tuple[list[Source], list[str]]:
    """(the documents that the command line names, what is wrong with some of them, a line each)."""
    sources: list[Source] = []
    failures: list[str] = []
    for given in inputs:
        path = Path(given)
        if not given:  # of a shell's variable that is not set; as a path it would be this folder
            failures.append("an empty name is given, which is no text")
        elif given == "-":
            sources.append(Source("/dev/stdin", "stdin"))
            if sys.stdin and sys.stdin.isatty():
                print("type or paste a text; Ctrl-D ends it", file=sys.stderr)
        elif is_address(given):
            sources.append(Source(given, page_name(given)))
        elif is_folder(path):
            try:
                files = files_below(path, output_dir)
            except UserError as error:
                failures.append(str(error))
                continue
            names = [answer_name(str(file.relative_to(path))) for file in files]
            sources += [Source(str(f), name) for f, name in zip(files, names, strict=True)]
        else:
            sources.append(Source(given, answer_name(path.name)))
    return make_unique(sources), failures


def check_outputs(sources: list[Source], output_dir: Path) -> None:
    """Raise UserError if a file of answers would take the place of a document.

    Files are told by their number on disk: there are links, and systems that fold names.
    """

    def number(path: Path) -> tuple[int, int] | None:
        with suppress(OSError, ValueError):
            status = path.stat()
            return status.st_dev, status.st_ino
        return None

    documents = {number(Path(one.where)) for one in sources if not is_address(one.where)} - {None}
    for name in (TABLE, *(source.name for source in sources)):
        if number(output_dir / name) in documents:
            path = shown(str(output_dir / name))
            raise UserError(f"{path} would be overwritten, and is read; name another --output-dir")


def read_texts(sources: list[Source], private: bool) -> tuple[dict[str, str], list[str]]:
    """(name -> text, what is wrong with those that cannot be read, a line each)."""
    texts: dict[str, str] = {}
    failures: list[str] = []
    for source in tqdm(sources, "reading", unit="text", delay=3, leave=False):
        try:
            texts[source.name] = read_document(source.where, private)
        except UserError as error:
            failures.append(str(error))
    return texts, failures


def stream(system: System, texts: dict[str, str], task: Task, args: Namespace) -> None:
    """Print the answers word by word as they come."""
    from transformers import TextStreamer

    model, tokenizer = load_model(system.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = settings_of(system, task, args)
    longest, limit = settings["max_new_tokens"], generate.prompt_limit(model, settings)
    if limit < 1:
        raise UserError(f"--max-new-tokens {longest} leaves no room for a text in this model")
    for file, text in texts.items():
        name = shown(file)
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
    path, settings = args.output_dir / TABLE, settings_of(system, task, args)
    ids = {name: digest(text) for name, text in texts.items()}
    rows = [{"id": digest(text), "text": text} for text in dict.fromkeys(texts.values())]
    try:
        answer_rows(task.name, system, rows, path, task, args, settings)
    finally:  # what is there after Ctrl-C, too
        requests = requests_of(rows, system.template, task, settings)
        answers = load(path, requests, KEY)
        for name, key in ids.items():
            if key in answers:
                write_text(args.output_dir / name, answers[key]["text"] + "\n")


def choose_system(task: Task, args: Namespace) -> System:
    """The system that the command line names, which is told. Raises UserError."""
    model = args.model or newest_adapter(task)
    weights = find_weights(model, args.base or args.instructed)
    if weights.adapter:
        check_template(Path(weights.adapter), task)
    which = "" if args.model else f", the adapter for {task.name} that was trained last"
    of = "the base of " if args.base or args.instructed else ""
    print(f"taking {of}{shown(str(model))}{which}", file=sys.stderr)
    return System(weights, task.student_template(args.instructed), bool(args.samples))


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
    with suppress(AttributeError):  # a terminal of another encoding shows what it can
        sys.stdout.reconfigure(errors="replace")
    sources, failures = find_sources(args.texts, args.output_dir)
    if args.output_dir:
        check_outputs(sources, args.output_dir)
    system = None if args.show_text else choose_system(task, args)
    texts, unread = read_texts(sources, args.private)
    failures += unread
    try:
        if args.show_text:
            print("\n\n".join(texts.values()))
        elif texts:
            (write if args.output_dir else stream)(system, texts, task, args)
    except BrokenPipeError:  # Python would complain of it once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        for failure in failures:
            print(f"error: {failure}", file=sys.stderr)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
