"""An append-only file of results, each found again by what it is of and what made it.

Everything that takes long or costs money goes on where it stopped through these functions: replies,
batches, answers, comparisons. A record is told from others by its `key`, the names of some of its
fields: `("id", "model", "prompt")` of a reply, `("id", "settings")` of an answer. It is found where
all of these are equal, ids as strings (7 is "7"); a field that is not there counts as null. A
result made otherwise stays in the file, and is found again when it is asked for again. Of two
records that agree in their key, the later one counts.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from common.cli import UserError
from common.files import id_text, read_records
from common.text import whole

Key = tuple[str, ...]


def key_of(record: dict, key: Key) -> str:
    """The values of a record's key fields, as they are after it was written and read again."""
    values = [record.get(field) for field in key]
    if "id" in key:
        position = key.index("id")
        values[position] = id_text(values[position])
    return whole(json.dumps(values, sort_keys=True, ensure_ascii=False))


def records_by_key(path: Path, keys: set[str], key: Key) -> dict[str, dict]:
    """`key_of` -> the latest record that `path` has of each of `keys`, where it has any."""
    records = {}
    # A record that tells no prompt is of an earlier version: it stays, and is not found.
    fields = [field for field in key if field != "prompt"]
    if path.exists():
        for record in read_records(path, fields):
            record_key = key_of(record, key)
            if record_key in keys:
                records[record_key] = record
    return records


def load(path: Path, wanted: Iterable[dict], key: Key) -> dict[str, dict]:
    """id -> the latest record of each of `wanted` that `path` has, in the order of `wanted`.

    A row that stands twice is found once. Raises UserError if two rows of one id differ in their
    key: an id would then stand for either.
    """
    keys_by_id: dict[str, str] = {}
    for row in wanted:
        row_key = key_of(row, key)
        if keys_by_id.setdefault(row["id"], row_key) != row_key:
            raise UserError(
                f"{path}: id {row['id']!r} stands for two unlike texts; make ids unique"
            )
    records = records_by_key(path, set(keys_by_id.values()), key)
    return {i: records[row_key] for i, row_key in keys_by_id.items() if row_key in records}


def missing(path: Path, wanted: Iterable[dict], key: Key) -> list[dict]:
    """Those of `wanted` of whose key `path` has no record; of rows with one key the first."""
    rows_by_key: dict[str, dict] = {}
    for row in wanted:
        rows_by_key.setdefault(key_of(row, key), row)
    records = records_by_key(path, set(rows_by_key), key)
    return [row for row_key, row in rows_by_key.items() if row_key not in records]
