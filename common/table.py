"""An append-only file of results, each found again by what it is of and what made it.

Everything that takes long or costs money goes on where it stopped through these functions: replies,
batches, summaries, comparisons. A record is told from others by its `key`, the names of some of its
fields: `("id", "model", "prompt_sha")` of a reply, `("id", "settings")` of a summary. A result made
otherwise stays in the file, and is found again when it is asked for again. Records are written with
`common.files.appending` and `append_record`, which flush each to the disk.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from common.files import read_records

Key = tuple[str, ...]


def key_of(record: dict, key: Key) -> str:
    """What tells a record from others: the fields of its `key` as JSON."""
    return json.dumps([record.get(field) for field in key], sort_keys=True)


def missing(path: Path, wanted: Iterable[dict], key: Key) -> list[dict]:
    """Those of `wanted`, which hold the fields of `key`, of which `path` has no record."""
    records = read_records(path, key) if path.exists() else ()
    there = {key_of(record, key) for record in records}
    return [one for one in wanted if key_of(one, key) not in there]


def load(path: Path, wanted: Iterable[dict], key: Key) -> dict[str, dict]:
    """id -> the latest record of each of `wanted` that `path` has, in the order of `wanted`."""
    places = {key_of(one, key): one["id"] for one in wanted}
    records = read_records(path, key) if path.exists() else ()
    found = {i: record for record in records if (i := places.get(key_of(record, key)))}
    return {i: found[i] for i in places.values() if i in found}
