"""Make extracts for training and documents for testing, of RedPajama or of your own texts.

Here is what data_prep/sample_extracts.py is told: what to read, what to take of it, and where.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from common.cli import count, positive, script_parser, share, warn
from data_prep.count_tokens import context_of
from data_prep.run_tasks import Place
from data_prep.select_extracts import Windows

RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
SOURCES = ["arxiv", "wikipedia", "stackexchange"]
RECIPE = {"min_tokens": 900, "max_tokens": 1800, "min_chars": 16_000, "max_chars": 100_000}
OWN_TOKENS = 50, 1800  # an extract, and an answer of 500 words, in the sequence_len of the configs
CHARS_A_TOKEN = 4  # of English prose


@dataclass(frozen=True)
class SampleOptions(Windows):
    """What is read, what is taken of it, and where it is done; see `parse_options`."""

    input: list[str]
    fraction: float
    sources: list[str]
    data: Path
    train: int  # at most so many extracts
    test: int
    max_per_source: int | None  # in each split
    private: bool  # addresses of one's own network are read, too
    licence: str  # of one's own texts
    workers: int | None
    slurm: str | None
    ray: str | None

    @property
    def is_own(self) -> bool:
        """Whether texts of one's own are read, in the place of RedPajama."""
        return self.input != RED_PAJAMA

    @property
    def place(self) -> Place:
        return Place(self.workers, self.slurm, self.ray)


def own_windows(given: dict) -> dict[str, int]:
    """The windows for one's own documents where the command line names none: from short notes up to
    what the configs train on, or three quarters of a smaller context; for testing alike."""
    low, high = OWN_TOKENS
    if "max_tokens" not in given:
        context = context_of(given["tokenizer"])
        high = min(high, context * 3 // 4) if context else high
    low, high = given.get("min_tokens", low), given.get("max_tokens", high)
    in_chars = {"min_chars": CHARS_A_TOKEN * low, "max_chars": CHARS_A_TOKEN * high}
    return {"min_tokens": low, "max_tokens": high} | in_chars


def told_windows(options: SampleOptions) -> str:
    """A line that says what is taken of one's own documents."""
    line = (
        f"taken: texts of {options.min_tokens + 1:,} to {options.max_tokens - 1:,} tokens of "
        f"{options.tokenizer} for training and, of every fifth document, of {options.min_chars:,} "
        f"to {options.max_chars:,} characters for testing"
    )
    advice = "--min-tokens, --max-tokens, --min-chars, --max-chars set others, --whole cuts none"
    return f"{line}; longer ones are cut ({advice})"


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    option = parser.add_argument
    # Where None is the default, --help says in words what it means.
    no_default, place = {"default": argparse.SUPPRESS}, parser.add_mutually_exclusive_group()
    inputs = "own files, folders, globs, addresses, .txt lists of them (default: RedPajama)"
    option("--input", nargs="+", help=inputs, **no_default)
    option("--fraction", type=share, help="to read: 0.01 of RedPajama, all of another --input")
    option("--sources", nargs="+", default=SOURCES, help="folders of RedPajama to read")
    option("--source-name", default="other", help="source of records that are not RedPajama's")
    told = "of records, where the text is (default: text, or RedPajama-V2's raw_content)"
    option("--text-field", metavar="NAME", help=told, **no_default)
    option(
        "--licence", "--license", default="", help="of your own texts; the dataset's card says it"
    )
    option("--private", action="store_true", help="also read addresses in your own network")
    option("--data", type=Path, default=Path("data"), help="extracts/ in it is for all tasks")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: id or folder")
    low, high = OWN_TOKENS
    windows = {"type": count, **no_default}
    option("--min-tokens", help=f"train: more than this (default: 900; own: {low})", **windows)
    option("--max-tokens", help=f"train: fewer than this (default: 1800; own: {high})", **windows)
    own = f"own: {CHARS_A_TOKEN} a token of those"
    option("--min-chars", help=f"test: at least this (default: 16000; {own})", **windows)
    option("--max-chars", help=f"test: at most this (default: 100000; {own})", **windows)
    option("--train", type=positive, default=20_500, help="at most so many training extracts")
    option("--test", type=positive, default=200, help="at most so many test documents")
    option("--max-per-source", type=positive, help="at most so many of a source in each split")
    cut = parser.add_mutually_exclusive_group()
    told = "take documents whole, in RedPajama's windows (default: own longer ones are cut)"
    cut.add_argument("--whole", action="store_true", help=told)
    told = "cut all documents at paragraphs into the windows, and leave their first passage out"
    cut.add_argument("--passages", action="store_true", help=told)
    option("--seed", type=int, default=0, help="draws, orders and splits")
    workers = "tasks at a time (default: one a core, all of them on a cluster)"
    option("--workers", type=positive, help=workers, **no_default)
    place.add_argument(
        "--slurm", metavar="PARTITION", help="run the tasks there, and wait", **no_default
    )
    ray = "run the tasks at this Ray cluster: HOST:PORT, or auto"
    place.add_argument("--ray", metavar="ADDRESS", help=ray, **no_default)
    return parser


def parse_options(arguments: list[str] | None = None) -> SampleOptions:
    """The options of a command line; wrong usage ends the process with exit code 2. UserError."""
    parser = make_parser()
    given = {"input": RED_PAJAMA, "text_field": None, "workers": None, "slurm": None, "ray": None}
    given |= vars(parser.parse_args(arguments))
    is_red_pajama = given["input"] == RED_PAJAMA
    if given["fraction"] is None:
        given["fraction"] = 0.01 if is_red_pajama else 1.0
    is_whole = given.pop("whole") or is_red_pajama
    given["cut_longer"] = not (is_whole or given["passages"])
    windows = own_windows(given) if given["cut_longer"] else RECIPE
    options = SampleOptions(**(windows | given))
    if options.max_tokens - options.min_tokens < 2:
        lengths = f"--min-tokens {options.min_tokens} and --max-tokens {options.max_tokens}"
        parser.error(f"{lengths} leave no length between them")
    if options.max_chars < options.min_chars:
        parser.error(f"--max-chars {options.max_chars} is under --min-chars {options.min_chars}")
    if not is_red_pajama and options.sources != SOURCES:
        warn("--sources names folders of RedPajama; of your own --input all is read")
    return options
