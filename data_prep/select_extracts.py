"""Select the extracts in what a task was given to read: the part of the work that is spread out.

`run_task` is a step of a datatrove pipeline. It writes its candidates, and what it read and dropped
by source, into the folder of the unfinished run; data_prep.sample_extracts puts them together.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from loguru import logger

from common.cli import warn
from common.files import digest, share_of, write_records, write_text
from data_prep.clean_documents import cut_passages, has_prose, meta_of, source_of, to_document
from data_prep.count_tokens import TokenCounter, load_counter
from data_prep.read_blocks import Unit, parse_record, read_unit, subset_of

logger.disable("datatrove")  # in every worker: what goes wrong is reported by us, in one line
Counts = Counter[tuple[str, str]]  # by source and row of the report


def run_task(
    data, rank: int, world_size: int, units: list[Unit], options: argparse.Namespace, work: Path
) -> None:
    """Write what every `world_size`-th unit holds into `work`/candidates and `work`/counts."""
    counts = Counter()
    candidates = find_candidates([Unit(*u) for u in units[rank::world_size]], options, counts)
    write_records(work / "candidates" / f"{rank:05d}.jsonl", candidates)
    rows = [[*key, number] for key, number in counts.items()]
    write_text(work / "counts" / f"{rank:05d}.json", json.dumps(rows))


def load_counts(work: Path) -> Counts:
    """What all tasks counted."""
    counts = Counter()
    for path in (work / "counts").glob("*.json"):
        for source, row, number in json.loads(path.read_bytes()):
            counts[source, row] += number
    return counts


def find_candidates(
    units: list[Unit], options: argparse.Namespace, counts: Counts
) -> Iterator[dict]:
    """Yield the extracts of `units`, with `split` and `order`; count what is read and dropped."""
    counter = load_counter(options.tokenizer)
    for record, path in read_records(units, options, counts):
        meta = meta_of(record)
        source = source_of(meta, path, options.source_name)
        counts[source, "documents read"] += 1
        if options.sources and source not in options.sources:
            counts[source, "dropped: other source"] += 1
            continue
        document = to_document(record["text"], meta, source)
        if isinstance(document, str):
            counts[source, f"dropped: {document}"] += 1
            continue
        inside = list(inside_windows(document, counter, options))
        extracts = [extract for extract in inside if has_prose(extract["text"])]
        if not extracts:
            counts[source, f"dropped: {'no prose' if inside else 'outside the windows'}"] += 1
        for extract in extracts:
            order = digest(options.seed, extract["id"]) + digest(extract["text"])
            yield {**extract, "order": order}


def read_records(
    units: list[Unit], options: argparse.Namespace, counts: Counts
) -> Iterator[tuple[dict, str]]:
    """Yield the usable records of `units` and their files; of others the first are named."""
    named = set()
    for unit in units:
        subset = subset_of(unit.path)
        for where, line in read_unit(unit, options):
            if line in (b"\n", b"\r\n"):
                continue
            record = parse_record(line)
            if isinstance(record, dict):
                yield record, unit.path
                continue
            counts[subset, f"dropped: {record}"] += 1
            if record not in named:
                named.add(record)
                warn(f"{unit.path}:{where}: {record}, skipped; more of this are only counted")
        counts[subset, "MB drawn"] += (unit.end - unit.start) / 1e6


def inside_windows(
    document: dict, counter: TokenCounter, options: argparse.Namespace
) -> Iterator[dict]:
    """Yield what of `document` falls into the training or the test window, with its `split`."""
    text, low, high = document["text"], options.min_tokens, options.max_tokens
    if not options.passages:
        if options.min_chars <= len(text) <= options.max_chars:
            yield {**document, "split": "test"}
        elif low < (number := counter.count(text, enough=high)) < high:
            yield {**document, "split": "train", "n_tokens": number}
        return
    split = "test" if share_of(document["id"], options.seed) < options.test_share else "train"
    window = (partial(counter.count, enough=high), low, high)
    if split == "test":
        window = (len, options.min_chars - 1, options.max_chars + 1)
    # The first passage tends to sum the document up already, so that its first sentence answers.
    for number, passage in list(enumerate(cut_passages(text, *window)))[1:]:
        yield {**document, "id": digest(document["id"], number), "text": passage, "split": split}
