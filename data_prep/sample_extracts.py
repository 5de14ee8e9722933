"""Sample extracts for training and documents for testing from RedPajama, 1% of it by default.

Reads JSON Lines or Parquet records {"text", "meta"}. Writes DATA/extracts/{train,test}.jsonl: clean
English in the token window for training and in the character window for testing, in a seeded order,
no near duplicates; and report.md. datatrove runs it: kills and workers change nothing.

    python -m data_prep.sample_extracts --fraction 0.001 --sources wikipedia --max-per-source 3000
"""

import argparse
import heapq
import shutil
import signal
from collections import Counter
from functools import partial
from operator import itemgetter
from pathlib import Path

import multiprocess
import orjson
import pandas as pd
from loguru import logger
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import is_made, mark_made, write_records, write_text
from common.report import markdown
from data_prep.count_tokens import load_counter
from data_prep.read_blocks import draw_units, expand, read_unit
from data_prep.select_extracts import Duplicates, select

logger.disable("datatrove")  # in every worker: what goes wrong is reported by us, in one line
RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
SOURCES = ["arxiv", "wikipedia", "stackexchange"]
NO_EFFECT = ("data", "workers")  # on the extracts
TASKS = 64  # at most; what a kill can lose is one a worker


def run_task(_, rank: int, world_size: int, units: list, options, work: Path) -> None:
    """A step of datatrove's: write the candidates in every `world_size`-th unit, in their order."""
    if multiprocess.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends us
    found = []
    for unit in tqdm(units[rank::world_size], f"task {rank + 1} of {world_size}", leave=False):
        for record in read_unit(unit, options.fraction, options.seed):
            found += select(record, options)
    write_records(work / f"candidates/{rank}.jsonl", sorted(found, key=itemgetter("order")))


def run_tasks(options: argparse.Namespace, units: list, work: Path) -> None:
    """Run the tasks that are not yet complete. Raises UserError if any is left."""
    from datatrove.executor import LocalPipelineExecutor

    step = partial(run_task, units=units, options=options, work=work)
    tasks = min(TASKS, len(units))
    executor = LocalPipelineExecutor([step], tasks, min(options.workers, tasks), f"{work}/logs")
    executor.run()
    if left := len(executor.get_incomplete_ranks(skip_completed=True)):
        raise UserError(f"{left} of {tasks} tasks are left, see {work}/logs; then run this again")


def choose(work: Path, options: argparse.Namespace) -> tuple[dict[str, list[dict]], Counter]:
    """The first candidates that repeat none kept before, up to the caps; what became of all."""
    counter, duplicates, counts = load_counter(options.tokenizer), Duplicates(), Counter()
    splits = {"train": [], "test": []}
    files = [map(orjson.loads, path.open("rb")) for path in work.glob("candidates/*")]
    for one in tqdm(heapq.merge(*files, key=itemgetter("order")), "choosing", unit=" candidates"):
        source, split, reason = one["source"], one.get("split"), one.get("dropped")
        if split:
            full = len(splits[split]) == getattr(options, split)
            full = full or counts[source, split] == options.max_per_source
            reason = "over the cap" if full else duplicates.reason(one)
        counts[source, f"dropped: {reason}" if reason else split] += 1
        if not reason:
            lengths = {"n_chars": len(one["text"]), "n_tokens": counter.count(one["text"])}
            fields = {key: one[key] for key in ("id", "source", "url", "text")}
            splits[split].append(fields | lengths)
    return splits, counts


def write_report(folder: Path, counts: Counter) -> None:
    table = pd.Series(counts).unstack(0, fill_value=0)
    text = markdown(table.assign(all=table.sum(axis=1)).map("{:,}".format))
    text += f"\n\nof {table.to_numpy().sum():,} records or passages"
    write_text(folder / "report.md", f"{text}\n")
    print(f"{text}; see {folder}/report.md")


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--input", nargs="+", default=RED_PAJAMA, help="files, globs, URLs, .txt lists of them")
    option("--fraction", type=float, help="to read: 0.01 of RedPajama, all of another --input")
    option("--sources", nargs="+", default=SOURCES, help="folders of RedPajama to read")
    option("--source-name", default="other", help="source of records that are not RedPajama's")
    option("--data", type=Path, default=Path("data"), help="extracts/ in it is for all tasks")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: id or folder")
    option("--min-tokens", type=int, default=900, help="train: more than this")
    option("--max-tokens", type=int, default=1800, help="train: fewer than this")
    option("--min-chars", type=int, default=16_000, help="test: at least this")
    option("--max-chars", type=int, default=100_000, help="test: at most this")
    option("--train", type=positive, default=20_500, help="at most so many training extracts")
    option("--test", type=positive, default=200, help="at most so many test documents")
    option("--max-per-source", type=positive, help="at most so many of a source in each split")
    option("--passages", action="store_true", help="cut documents at paragraphs into the windows")
    option("--seed", type=int, default=0, help="draws, orders and splits")
    option("--workers", type=positive, default=multiprocess.cpu_count(), help="tasks at a time")
    options = parser.parse_args(arguments)
    options.fraction = options.fraction or (0.01 if options.input == RED_PAJAMA else 1.0)
    if not 0 < options.fraction <= 1:
        parser.error(f"--fraction {options.fraction} is not over 0 and up to 1")
    return options


def main() -> None:
    options = parse_options()
    load_counter(options.tokenizer)  # fails before anything is transferred
    output = (options.data / "extracts").absolute()
    paths, work = [file for path in options.input for file in expand(path)], output / "unfinished"
    states = {path: Path(path).stat() for path in paths if "://" not in path}
    settings = {name: str(v) for name, v in vars(options).items() if name not in NO_EFFECT}
    settings["files"] = {path: [s.st_size, s.st_mtime_ns] for path, s in states.items()}
    if is_made(output, settings):
        print(f"{output} is done with these settings; delete it to sample again")
        return
    if any(output.glob("*")) and not is_made(work, settings):
        raise UserError(f"{output} was made with other settings or input; delete it")
    mark_made(work, settings)
    if options.input == RED_PAJAMA:  # a folder for each source
        paths = [path for path in paths if path.split("/")[-2] in options.sources]
    units = draw_units(paths, options.fraction, options.seed)
    run_tasks(options, units, work)
    splits, counts = choose(work, options)
    if not any(splits.values()):
        shutil.rmtree(work)
        raise UserError(f"no document falls into the windows; counted: {dict(counts)}")
    for split, extracts in splits.items():
        write_records(output / f"{split}.jsonl", extracts)
    write_report(output, counts)
    mark_made(output, settings)
    shutil.rmtree(work)


if __name__ == "__main__":
    from data_prep import sample_extracts  # under the name by which workers can import `run_task`

    run(sample_extracts.main)
