"""Make extracts for training and documents for testing, of RedPajama (1% by default) or one's own.

Reads JSON Lines or Parquet records {"text", "meta"}, and an --input of PDF, HTML, text and Markdown
files, folders of them, web pages, arXiv addresses. Writes DATA/extracts/{train,test}.jsonl: clean
English in the token window for training and in the character window for testing, in a seeded order,
no near duplicates; and report.md. datatrove runs it, here, on Slurm or on Ray: where it runs, with
how many workers and what is killed meanwhile changes nothing.

    python -m data_prep.sample_extracts --fraction 0.001 --sources wikipedia --max-per-source 3000
    python -m data_prep.sample_extracts --input papers/ --licence "CC BY 4.0"
"""

import heapq
import json
import math
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import multiprocess
import orjson
import pandas as pd
from tqdm import tqdm

from common.cli import UserError, run, warn
from common.files import digest, mark_made, parse_object, write_records, write_text
from common.stats import markdown
from data_prep.count_tokens import load_counter
from data_prep.extract_options import SampleOptions, parse_options, told_windows
from data_prep.find_inputs import expand, is_document
from data_prep.load_extracts import LICENCE
from data_prep.read_blocks import Unit, draw_units, read_unit
from data_prep.read_document import is_address, read_document
from data_prep.run_tasks import run_tasks
from data_prep.select_extracts import Duplicates, select, text_fields, windows_overlap

NO_EFFECT = ("data", "workers", "slurm", "ray", "private", "licence")  # on the extracts
LATER = ("cut_longer", "text_field")  # options that came after 0.5.0; untold where they say nothing
TASKS = 64  # at most; what a kill can lose is one a worker
MOST_LOST = 5  # files of which nothing is kept, named one by one
MOST_REFUSED = 20  # documents that cannot be read, named one by one; the report names all


@dataclass(frozen=True)
class OwnDocument:
    """A document of one text, by its absolute path or its address."""

    where: str
    share: float  # in [0, 1), which draws its split


def draw_documents(places: list[str], fraction: float, seed: int) -> list[OwnDocument]:
    """A `fraction` of the documents, with shares that lie evenly: of a few some are for testing.

    With a fifth for testing there is a test document among two or more, and none of one.
    """

    def order(place: str) -> tuple[str, str]:  # which does not change with the folder's place
        return digest(seed, Path(place).name), place

    drawn = sorted(places, key=order)[: math.ceil(fraction * len(places))]
    return [OwnDocument(place, (i + 0.35) / len(drawn)) for i, place in enumerate(drawn)]


def read_own(document: OwnDocument, options: SampleOptions) -> dict:
    """A record with the document's text. Raises UserError."""
    text = read_document(document.where, options.private)
    url = document.where if is_address(document.where) else ""
    return {text_fields(options)[0]: text, "url": url}


def candidates_of(unit: Unit | OwnDocument, options: SampleOptions, report: dict) -> Iterator[dict]:
    """The candidates in a unit, and what was dropped; `report` is told the reasons."""
    share = None
    if isinstance(unit, OwnDocument):
        share = unit.share
        try:
            records = [read_own(unit, options)]
        except UserError as error:
            report["refused"] = str(error)
            yield {"source": options.source_name, "order": "", "dropped": "cannot be read"}
            return
    else:  # what cannot be read of it ends the task
        records = read_unit(unit, options.fraction, options.seed, text_fields(options))
    for record in records:
        for candidate in select(record, options, share):
            report["reasons"][candidate.get("dropped", "")] += 1
            report["fields"] = report["fields"] or candidate.get("fields", "")
            yield candidate


def find_candidates(
    _, rank: int, world_size: int, units: list, options: SampleOptions, work: Path
) -> None:
    """A task: write the candidates in every `world_size`-th unit, in their order, and for each of
    its files the reasons for which records were dropped, or it was refused."""
    if multiprocess.parent_process():  # datatrove starts its workers by this package
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, and ends us
    candidates = []
    reports: dict[str, dict] = {}  # by file
    for unit in tqdm(units[rank::world_size], f"task {rank + 1} of {world_size}", leave=False):
        path = unit.where if isinstance(unit, OwnDocument) else unit[0]
        report = reports.setdefault(path, {"reasons": Counter(), "fields": "", "refused": ""})
        candidates += candidates_of(unit, options, report)
    write_text(work / f"files/{rank}.json", json.dumps(reports))
    candidates.sort(key=itemgetter("order"))
    write_records(work / f"candidates/{rank}.jsonl", candidates)


def read_reports(work: Path) -> dict[str, dict]:
    """What the tasks say of each file: `reasons`, counted, `fields`, and why it is `refused`."""
    reports: dict[str, dict] = {}
    for task in sorted(work.glob("files/*.json")):
        for path, told in (parse_object(task.read_bytes()) or {}).items():
            report = reports.setdefault(path, {"reasons": Counter(), "fields": "", "refused": ""})
            report["reasons"].update(told["reasons"])
            report["fields"] = report["fields"] or told["fields"]
            report["refused"] = told.get("refused", "")
    return reports


def lost_files(reports: dict[str, dict]) -> list[str]:
    """A line for each file with records of which not one is a candidate: the commonest reason."""
    lines = []
    for path, report in reports.items():
        reasons = report["reasons"]
        if not reasons or reasons[""]:
            continue
        ((reason, number),) = reasons.most_common(1)
        line = f"{path}: none of its {reasons.total():,} records is kept, {number:,}: {reason}"
        if reasons.total() == 1:
            line = f"{path}: nothing of it is kept: {reason}"
        lines.append(f"{line} (fields: {report['fields']})" if report["fields"] else line)
    return lines


def tell(lines: list[str], most: int, rest: str) -> None:
    """Warn of each line, up to `most` of them, and say how many more there are."""
    for line in lines[:most]:
        warn(line)
    if len(lines) > most:
        warn(f"{len(lines) - most:,} more {rest}")


def run_all(options: SampleOptions, units: list[Unit | OwnDocument], work: Path) -> None:
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


def write_report(folder: Path, counts: Counter, refused: list[str]) -> None:
    table = pd.Series(counts).unstack(0, fill_value=0)
    text = markdown(table.assign(all=table.sum(axis=1)).map("{:,}".format))
    text += f"\n\nof {table.to_numpy().sum():,} records or passages"
    files = "".join(f"\n- {line}" for line in refused)
    told = f"\n\nThese could not be read:\n{files}" if refused else ""
    write_text(folder / "report.md", f"{text}{told}\n")
    print(f"{text}; see {folder}/report.md")


def settings_of(options: SampleOptions, paths: list[str]) -> dict:
    """What the extracts depend on, for made.json; local files with their size and time."""
    settings: dict = {}
    for name, value in vars(options).items():
        if name not in NO_EFFECT and (value or name not in LATER):
            settings[name] = str(value)
    settings["files"] = {}
    for path in paths:
        if is_address(path):
            continue
        with suppress(OSError):  # a link that leads nowhere is told of when it is read
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
    if options.is_own:
        return paths
    folder_of = {path: path.split("/")[-2] for path in paths}
    if strange := set(options.sources) - set(folder_of.values()):
        there = ", ".join(sorted(set(folder_of.values())))
        raise UserError(f"RedPajama has no {', '.join(sorted(strange))}; --sources of {there}")
    return [path for path in paths if folder_of[path] in options.sources]


def draw(options: SampleOptions, paths: list[str]) -> list[Unit | OwnDocument]:
    """What is drawn of the documents, and of the files of records. Raises UserError."""
    documents, record_files = [], inputs_of(options, paths)
    if options.is_own:
        is_one_text = {path: is_document(path) for path in paths}
        documents = [path for path, is_one in is_one_text.items() if is_one]
        record_files = [path for path in paths if not is_one_text[path]]
    units: list[Unit | OwnDocument] = [*draw_documents(documents, options.fraction, options.seed)]
    try:
        units += draw_units(record_files, options.fraction, options.seed)
    except UserError as error:
        if not documents:
            raise
        warn(str(error))
    if not units:
        raise UserError(f"the input is empty, or --fraction {options.fraction} draws none of it")
    return units


def keep_licence(output: Path, options: SampleOptions) -> None:
    """Write the licence of one's own texts beside them, or say how it is told."""
    if options.licence:
        write_text(output / LICENCE, f"{options.licence}\n")
    elif options.is_own and not (output / LICENCE).exists():
        print("no licence of your texts is told; --licence TEXT keeps it for the dataset's card")


def main() -> None:
    options = parse_options()
    load_counter(options.tokenizer)  # fails before anything is transferred
    output = (options.data / "extracts").absolute()
    work = output / "unfinished"
    paths = [file for path in options.input for file in expand(path, output)]
    settings = settings_of(options, paths)
    if is_done(output, settings):
        shutil.rmtree(work, ignore_errors=True)  # which a kill at the very end may leave
        print(f"{output} is done with these settings; delete it to sample again")
        keep_licence(output, options)
        return
    check_free(output, work, settings)
    if options.cut_longer:
        print(told_windows(options), flush=True)
    units = draw(options, paths)
    mark_made(work, settings)
    run_all(options, units, work)
    splits, counts = choose(work, options)
    reports = read_reports(work)
    refused = [report["refused"] for report in reports.values() if report["refused"]]
    tell(refused, MOST_REFUSED, "files could not be read; the report names all")
    lost = lost_files(reports)
    if not any(splits.values()):
        shutil.rmtree(work)
        if len(refused) == len(reports):
            raise UserError("no document could be read; why, is said above")
        why = f"{lost[0]}; " if lost else ""
        raise UserError(f"no document falls into the windows; {why}counted: {dict(counts)}")
    tell(lost, MOST_LOST, "files of which nothing is kept")
    for split, extracts in splits.items():
        write_records(output / f"{split}.jsonl", extracts)
        if options.cut_longer and not extracts:
            warn(f"{split}.jsonl is empty; more documents are needed, or another --seed")
    write_report(output, counts, refused)
    keep_licence(output, options)
    mark_made(output, settings)
    shutil.rmtree(work)
    if refused:
        warn(f"{len(refused):,} of {len(reports):,} files could not be read, as said above")


if __name__ == "__main__":
    from data_prep import sample_extracts  # the name by which workers import `find_candidates`

    run(sample_extracts.main)
