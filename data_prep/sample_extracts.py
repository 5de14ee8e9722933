"""Sample extracts for training and documents for testing from RedPajama, 1% of it by default.

Reads JSON Lines or Parquet records {"text", "meta"}. Writes DATA/extracts/{train,test}.jsonl: clean
English in the token window for training and in the character window for testing, in a seeded order,
no near duplicates; and report.md. datatrove runs it: kills and workers change nothing.

    python -m data_prep.sample_extracts --fraction 0.001 --sources wikipedia --max-per-source 3000
"""

import argparse
import heapq
import json
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

from common.cli import UserError, count, positive, run, script_parser, share, warn
from common.files import digest, mark_made, parse_object, write_records, write_text
from common.stats import markdown
from data_prep.count_tokens import load_counter
from data_prep.read_blocks import draw_units, expand, read_unit
from data_prep.select_extracts import Duplicates, select, windows_overlap

logger.disable("datatrove")  # in every worker: what goes wrong is reported by us, in one line
RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
SOURCES = ["arxiv", "wikipedia", "stackexchange"]
NO_EFFECT = ("data", "workers")  # on the extracts
TASKS = 64  # at most; what a kill can lose is one a worker
MOST_LOST = 5  # files of which nothing is kept, named one by one


def run_task(_, rank: int, world_size: int, units: list, options, work: Path) -> None:
    """A step of datatrove's: write the candidates in every `world_size`-th unit, in their order."""
    if multiprocess.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends us
    found, files = [], {}
    for unit in tqdm(units[rank::world_size], f"task {rank + 1} of {world_size}", leave=False):
        reasons = files.setdefault(unit[0], {"reasons": Counter(), "fields": ""})
        for record in read_unit(unit, options.fraction, options.seed):
            for one in select(record, options):
                reasons["reasons"][one.get("dropped", "")] += 1
                reasons["fields"] = reasons["fields"] or one.get("fields", "")
                found.append(one)
    write_text(work / f"files/{rank}.json", json.dumps(files))
    write_records(work / f"candidates/{rank}.jsonl", sorted(found, key=itemgetter("order")))


def lost_files(work: Path) -> list[str]:
    """A line for each file with records of which not one is a candidate: the commonest reason."""
    reasons_of, fields_of = {}, {}
    for task in sorted(work.glob("files/*.json")):
        for path, told in (parse_object(task.read_bytes()) or {}).items():
            reasons_of[path] = reasons_of.get(path, Counter()) + Counter(told["reasons"])
            fields_of[path] = fields_of.get(path) or told["fields"]
    lines = []
    for path, reasons in reasons_of.items():
        if not reasons or reasons[""]:
            continue
        ((reason, number),) = reasons.most_common(1)
        line = f"{path}: none of its {reasons.total():,} records is kept, {number:,}: {reason}"
        lines.append(f"{line} (fields: {fields_of[path]})" if fields_of[path] else line)
    return lines


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
    """The first candidates that repeat none kept before, up to the caps; what became of all.

    The first of an id keeps it; a later one that is no near duplicate gets one by its text. What
    is first depends on the candidates alone, not on who wrote them.
    """
    counter, duplicates, counts = load_counter(options.tokenizer), Duplicates(), Counter()
    splits, ids = {"train": [], "test": []}, set()
    paths = work.glob("candidates/*.jsonl")  # a kill leaves its unfinished one under another name
    files = [map(orjson.loads, path.open("rb")) for path in paths]
    for one in tqdm(heapq.merge(*files, key=itemgetter("order")), "choosing", unit=" candidates"):
        source, split, reason = one["source"], one.get("split"), one.get("dropped")
        if split:
            if one["id"] in ids:
                one["id"] = digest(one["id"], one["text"])
            full = len(splits[split]) == getattr(options, split)
            full = full or counts[source, split] == options.max_per_source
            reason = "over the cap" if full else duplicates.reason(one)
        counts[source, f"dropped: {reason}" if reason else split] += 1
        if not reason:
            lengths = {"n_chars": len(one["text"]), "n_tokens": counter.count(one["text"])}
            fields = {key: one[key] for key in ("id", "source", "url", "text")}
            splits[split].append(fields | lengths)
            ids.add(one["id"])
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
    option("--fraction", type=share, help="to read: 0.01 of RedPajama, all of another --input")
    option("--sources", nargs="+", default=SOURCES, help="folders of RedPajama to read")
    option("--source-name", default="other", help="source of records that are not RedPajama's")
    option("--data", type=Path, default=Path("data"), help="extracts/ in it is for all tasks")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: id or folder")
    option("--min-tokens", type=count, default=900, help="train: more than this")
    option("--max-tokens", type=count, default=1800, help="train: fewer than this")
    option("--min-chars", type=count, default=16_000, help="test: at least this")
    option("--max-chars", type=count, default=100_000, help="test: at most this")
    option("--train", type=positive, default=20_500, help="at most so many training extracts")
    option("--test", type=positive, default=200, help="at most so many test documents")
    option("--max-per-source", type=positive, help="at most so many of a source in each split")
    option("--passages", action="store_true", help="cut documents at paragraphs into the windows")
    option("--seed", type=int, default=0, help="draws, orders and splits")
    option("--workers", type=positive, default=multiprocess.cpu_count(), help="tasks at a time")
    options = parser.parse_args(arguments)
    is_red_pajama = options.input == RED_PAJAMA
    if options.fraction is None:
        options.fraction = 0.01 if is_red_pajama else 1.0
    if options.max_tokens - options.min_tokens < 2:
        lengths = f"--min-tokens {options.min_tokens} and --max-tokens {options.max_tokens}"
        parser.error(f"{lengths} leave no length between them")
    if options.max_chars < options.min_chars:
        parser.error(f"--max-chars {options.max_chars} is under --min-chars {options.min_chars}")
    if not is_red_pajama and options.sources != SOURCES:
        warn("--sources names folders of RedPajama; of another --input all is read")
    return options


def settings_of(options: argparse.Namespace, paths: list[str]) -> dict:
    """What the extracts depend on, for made.json; local files with their size and time."""
    settings = {name: str(v) for name, v in vars(options).items() if name not in NO_EFFECT}
    states = {path: Path(path).stat() for path in paths if "://" not in path}
    settings["files"] = {path: [s.st_size, s.st_mtime_ns] for path, s in states.items()}
    if windows_overlap(options) and not options.passages:
        settings["in_both_windows"] = "split by id"  # up to 0.3.7 it was all for testing
    return settings


def made_with(folder: Path, settings: dict, without: tuple[str, ...] = ()) -> bool:
    """Whether `folder`/made.json says so, of files of the same name, size and time anywhere."""
    made = folder / "made.json"
    there = (parse_object(made.read_bytes()) or {}) if made.is_file() else {}
    if not isinstance(there.get("files"), dict):
        return False

    def comparable(one: dict) -> dict:
        files = sorted([Path(path).name, *state] for path, state in one["files"].items())
        return {k: v for k, v in one.items() if k not in without} | {"files": files}

    return comparable(there) == comparable(settings)


def is_done(output: Path, settings: dict) -> bool:
    """Whether `output` is finished with these settings, also by 0.3.7."""
    if made_with(output, settings):
        return True
    if made_with(output, settings, without=("in_both_windows",)):
        warn(f"{output} has no long text in train.jsonl, as of 0.3.7; delete it to sample again")
        return True
    return False


def check_free(output: Path, work: Path, settings: dict) -> None:
    """Raise UserError if `output` holds what these settings did not make."""
    if not made_with(work, settings):
        if (work / "made.json").exists() or any(path != work for path in output.glob("[!.]*")):
            raise UserError(f"{output} was made with other settings or input; delete it")
        shutil.rmtree(work, ignore_errors=True)  # a kill came before it said what it is of


def inputs_of(options: argparse.Namespace, paths: list[str]) -> list[str]:
    """Those of the files to read: of RedPajama, which has a folder a source, its --sources."""
    if options.input != RED_PAJAMA:
        return paths
    folder_of = {path: path.split("/")[-2] for path in paths}
    if strange := set(options.sources) - set(folder_of.values()):
        there = ", ".join(sorted(set(folder_of.values())))
        raise UserError(f"RedPajama has no {', '.join(sorted(strange))}; --sources of {there}")
    return [path for path in paths if folder_of[path] in options.sources]


def main() -> None:
    options = parse_options()
    load_counter(options.tokenizer)  # fails before anything is transferred
    output = (options.data / "extracts").absolute()
    paths, work = [file for path in options.input for file in expand(path)], output / "unfinished"
    settings = settings_of(options, paths)
    if is_done(output, settings):
        shutil.rmtree(work, ignore_errors=True)  # which a kill at the very end may leave
        print(f"{output} is done with these settings; delete it to sample again")
        return
    check_free(output, work, settings)
    units = draw_units(inputs_of(options, paths), options.fraction, options.seed)
    if not units:
        raise UserError(f"the input is empty, or --fraction {options.fraction} draws none of it")
    mark_made(work, settings)
    run_tasks(options, units, work)
    splits, counts = choose(work, options)
    lost = lost_files(work)
    if not any(splits.values()):
        shutil.rmtree(work)
        why = f"{lost[0]}; " if lost else ""
        raise UserError(f"no document falls into the windows; {why}counted: {dict(counts)}")
    for line in lost[:MOST_LOST]:
        warn(line)
    if len(lost) > MOST_LOST:
        warn(f"{len(lost) - MOST_LOST:,} more files of which nothing is kept")
    for split, extracts in splits.items():
        write_records(output / f"{split}.jsonl", extracts)
    write_report(output, counts)
    mark_made(output, settings)
    shutil.rmtree(work)


if __name__ == "__main__":
    from data_prep import sample_extracts  # under the name by which workers can import `run_task`

    run(sample_extracts.main)
