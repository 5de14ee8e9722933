"""An append-only file of results, each found again by what it is of and what made it.

Everything that takes long or costs money goes on where it stopped through these functions: replies,
batches, answers, comparisons. A record is told from others by its `key`, the names of some of its
fields: `("id", "model", "prompt_sha")` of a reply, `("id", "settings")` of an answer. A result made
otherwise stays in the file, and is found again when it is asked for again.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from common.files import read_records

Key = tuple[str, ...]


def key_of(record: dict, key: Key) -> str:
    return json.dumps([record.get(field) for field in key], sort_keys=True)


def load(path: Path, wanted: Iterable[dict], key: Key) -> dict[str, dict]:
    """id -> the latest record of each of `wanted`, no id twice, that `path` has, in their order."""
    ids = {key_of(one, key): one["id"] for one in wanted}
    # A record that tells no prompt is of an earlier version: it stays, and is not found.
    fields = [field for field in key if field != "prompt"]
    records = read_records(path, fields) if path.exists() else ()
    found = {i: record for record in records if (i := ids.get(key_of(record, key)))}
    return {i: found[i] for i in ids.values() if i in found}


def missing(path: Path, wanted: Iterable[dict], key: Key) -> list[dict]:
    """Those of `wanted` of which `path` has no record, as `load` finds them."""
    there = load(path, wanted, key)
    return [one for one in wanted if one["id"] not in there]
