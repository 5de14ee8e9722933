"""Sample extracts for training and documents for testing from RedPajama, 1% of it by default.

Reads JSON Lines or Parquet records {"text", "meta"}. Writes DATA/extracts/{train,test}.jsonl: clean
English in the token window for training and in the character window for testing, in a seeded order,
no near duplicates; and report.md. datatrove runs it, here, on Slurm or on Ray: where it runs, with
how many workers and what is killed meanwhile changes nothing.

    python -m data_prep.sample_extracts --fraction 0.001 --sources wikipedia --max-per-source 3000
"""

import argparse
import heapq
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import multiprocess
import orjson
import pandas as pd
from tqdm import tqdm

from common.cli import UserError, count, positive, run, script_parser, share, warn
from common.files import digest, mark_made, parse_object, write_records, write_text
from common.stats import markdown
from data_prep.count_tokens import load_counter
from data_prep.read_blocks import Unit, draw_units, expand, read_unit
from data_prep.run_tasks import Place, run_tasks
from data_prep.select_extracts import Duplicates, Windows, select, windows_overlap

RED_PAJAMA = ["https://data.together.xyz/redpajama-data-1T/v1.0.0/urls.txt"]  # lists 2,084 files
SOURCES = ["arxiv", "wikipedia", "stackexchange"]
NO_EFFECT = ("data", "workers", "slurm", "ray")  # on the extracts
TASKS = 64  # at most; what a kill can lose is one a worker
MOST_LOST = 5  # files of which nothing is kept, named one by one


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
    workers: int | None
    slurm: str | None
    ray: str | None

    @property
    def place(self) -> Place:
        return Place(self.workers, self.slurm, self.ray)


def find_candidates(
    _, rank: int, world_size: int, units: list[Unit], options: SampleOptions, work: Path
) -> None:
    """A task: write the candidates in every `world_size`-th unit, in their order, and for each of
    its files the reasons for which records were dropped."""
    if multiprocess.parent_process():  # datatrove starts its workers by this package
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends us
    candidates = []
    reports: dict[str, dict] = {}  # by file
    for unit in tqdm(units[rank::world_size], f"task {rank + 1} of {world_size}", leave=False):
        path = unit[0]
        report = reports.setdefault(path, {"reasons": Counter(), "fields": ""})
        for record in read_unit(unit, options.fraction, options.seed):
            for candidate in select(record, options):
                report["reasons"][candidate.get("dropped", "")] += 1
                report["fields"] = report["fields"] or candidate.get("fields", "")
                candidates.append(candidate)
    write_text(work / f"files/{rank}.json", json.dumps(reports))
    candidates.sort(key=itemgetter("order"))
    write_records(work / f"candidates/{rank}.jsonl", candidates)


def lost_files(work: Path) -> list[str]:
    """A line for each file with records of which not one is a candidate: the commonest reason."""
    reasons_by_path: dict[str, Counter] = {}
    fields_by_path: dict[str, str] = {}
    for task in sorted(work.glob("files/*.json")):
        reports = parse_object(task.read_bytes()) or {}
        for path, report in reports.items():
            reasons_by_path.setdefault(path, Counter()).update(report["reasons"])
            fields_by_path[path] = fields_by_path.get(path) or report["fields"]
    lines = []
    for path, reasons in reasons_by_path.items():
        if not reasons or reasons[""]:
            continue
        ((reason, number),) = reasons.most_common(1)
        line = f"{path}: none of its {reasons.total():,} records is kept, {number:,}: {reason}"
        fields = fields_by_path[path]
        lines.append(f"{line} (fields: {fields})" if fields else line)
    return lines


def run_all(options: SampleOptions, units: list[Unit], work: Path) -> None:
    """Write the candidates of all units, where they are not there. Raises UserError."""
    step = partial(find_candidates, units=units, options=options, work=work)
    run_tasks(step, min(TASKS, len(units)), options.place, work)


def merged_candidates(work: Path) -> Iterator[dict]:
    """All tasks' candidates in their order, which does not depend on who wrote them."""
    paths = work.glob("candidates/*.jsonl")  # a kill leaves its unfinished one under another name
    files = [map(orjson.loads, path.open("rb")) for path in paths]
    merged = heapq.merge(*files, key=itemgetter("order"))
    return tqdm(merged, "choosing", unit=" candidates")


def choose(work: Path, options: SampleOptions) -> tuple[dict[str, list[dict]], Counter]:
    """The first candidates that repeat none kept before, up to the caps; what became of all.

    The first of an id keeps it; a later one that is no near duplicate gets one by its text.
    """
    counter, duplicates = load_counter(options.tokenizer), Duplicates()
    most = {"train": options.train, "test": options.test}
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    counts: Counter[tuple[str, str]] = Counter()  # by source and what became of it
    ids: set[str] = set()
    for candidate in merged_candidates(work):
        source = candidate["source"]
        if "dropped" in candidate:
            counts[source, f"dropped: {candidate['dropped']}"] += 1
            continue
        split, text = candidate["split"], candidate["text"]
        if candidate["id"] in ids:
            candidate["id"] = digest(candidate["id"], text)
        is_full = len(splits[split]) == most[split]
        if is_full or counts[source, split] == options.max_per_source:
            reason = "over the cap"
        else:
            reason = duplicates.reason(candidate)
        if reason:
            counts[source, f"dropped: {reason}"] += 1
            continue
        counts[source, split] += 1
        ids.add(candidate["id"])
        extract = {field: candidate[field] for field in ("id", "source", "url", "text")}
        extract |= {"n_chars": len(text), "n_tokens": counter.count(text)}
        splits[split].append(extract)
    return splits, counts


def write_report(folder: Path, counts: Counter) -> None:
    table = pd.Series(counts).unstack(0, fill_value=0)
    text = markdown(table.assign(all=table.sum(axis=1)).map("{:,}".format))
    text += f"\n\nof {table.to_numpy().sum():,} records or passages"
    write_text(folder / "report.md", f"{text}\n")
    print(f"{text}; see {folder}/report.md")


def parse_options(arguments: list[str] | None = None) -> SampleOptions:
    """The options of a command line; wrong usage ends the process with exit code 2."""
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
    # Where None is the default, --help says in words what it means.
    no_default, place = {"default": argparse.SUPPRESS}, parser.add_mutually_exclusive_group()
    workers = "tasks at a time (default: one a core, all of them on a cluster)"
    option("--workers", type=positive, help=workers, **no_default)
    place.add_argument(
        "--slurm", metavar="PARTITION", help="run the tasks there, and wait", **no_default
    )
    ray = "run the tasks at this Ray cluster: HOST:PORT, or auto"
    place.add_argument("--ray", metavar="ADDRESS", help=ray, **no_default)
    given = {"workers": None, "slurm": None, "ray": None} | vars(parser.parse_args(arguments))
    is_red_pajama = given["input"] == RED_PAJAMA
    if given["fraction"] is None:
        given["fraction"] = 0.01 if is_red_pajama else 1.0
    options = SampleOptions(**given)
    if options.max_tokens - options.min_tokens < 2:
        lengths = f"--min-tokens {options.min_tokens} and --max-tokens {options.max_tokens}"
        parser.error(f"{lengths} leave no length between them")
    if options.max_chars < options.min_chars:
        parser.error(f"--max-chars {options.max_chars} is under --min-chars {options.min_chars}")
    if not is_red_pajama and options.sources != SOURCES:
        warn("--sources names folders of RedPajama; of another --input all is read")
    return options


def settings_of(options: SampleOptions, paths: list[str]) -> dict:
    """What the extracts depend on, for made.json; local files with their size and time."""
    settings: dict = {name: str(v) for name, v in vars(options).items() if name not in NO_EFFECT}
    settings["files"] = {}
    for path in paths:
        if "://" not in path:
            state = Path(path).stat()
            settings["files"][path] = [state.st_size, state.st_mtime_ns]
    if windows_overlap(options) and not options.passages:
        settings["in_both_windows"] = "split by id"  # up to 0.3.7 it was all for testing
    return settings


def made_with(folder: Path, settings: dict, without: tuple[str, ...] = ()) -> bool:
    """Whether `folder`/made.json says so, of files of the same name, size and time anywhere."""
    path = folder / "made.json"
    made = parse_object(path.read_bytes()) if path.is_file() else None
    if not made or not isinstance(made.get("files"), dict):
        return False

    def comparable(told: dict) -> dict:
        kept = {name: value for name, value in told.items() if name not in without}
        kept["files"] = sorted([Path(path).name, *state] for path, state in told["files"].items())
        return kept

    return comparable(made) == comparable(settings)


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


def inputs_of(options: SampleOptions, paths: list[str]) -> list[str]:
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
    work = output / "unfinished"
    paths = [file for path in options.input for file in expand(path)]
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
    run_all(options, units, work)
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
    from data_prep import sample_extracts  # the name by which workers import `find_candidates`

    run(sample_extracts.main)
