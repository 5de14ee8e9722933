"""Files that survive a crash, hashes, and settings that tell what made a folder.

Every stage reads and writes through these functions: whole files appear under their name only
when finished, appended files are flushed record by record and repaired after a kill.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError, warn


def read_records(path: Path, fields: Iterable[str] = ()) -> Iterator[dict]:
    """Yield the records of a JSON Lines file; those without `fields` are named, skipped."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                warn(f"{path}:{number}: not valid JSON, line skipped")
                continue
            is_object = isinstance(record, dict)
            if lacking := [f for f in fields if f not in record] if is_object else ["an object"]:
                warn(f"{path}:{number}: lacks {', '.join(lacking)}, line skipped")
            elif record:
                yield record


def load_records(path: Path, fields: Iterable[str] = (), made_by: str = "") -> list[dict]:
    """All records of a file that must be there and hold some.

    Raises UserError, which says to make the file with the command `made_by`.
    """
    hint = f"; make it with `{made_by}`" if made_by else ""
    try:
        records = list(read_records(path, fields))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}{hint}") from None
    if not records:
        raise UserError(f"{path} holds no usable record{hint}")
    return records


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_records(path: Path, records: Iterable[dict]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open an append-only file for one writer, cutting off the torn last line of a kill.

    Raises UserError if another process is writing to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another run; wait for it") from None
        if size := path.stat().st_size:
            with mmap(file.fileno(), size, access=ACCESS_READ) as content:
                end_of_last_line = content.rfind(b"\n") + 1
            file.truncate(end_of_last_line)
        yield file


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path`'s lock while a file is read, changed and written: others wait for their turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def append_record(file: BinaryIO, *records: dict) -> None:
    """Append a line for each; on return they are on disk."""
    for record in records:
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def digest(*parts: object) -> str:
    """16 hex digits that tell `parts` from others, the same on every machine."""
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def share_of(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int(digest(seed, key), 16) / 16**16


def file_sha(path: Path) -> str:
    """First 12 hex digits of the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def read_json(path: Path) -> dict:
    """What a JSON file holds, nothing where there is none."""
    return json.loads(path.read_bytes()) if path.is_file() else {}


def is_made(folder: Path, settings: dict) -> bool:
    """Whether `folder` was finished with exactly these settings (see `mark_made`)."""
    try:
        return json.loads((folder / "made.json").read_bytes()) == json.loads(json.dumps(settings))
    except (OSError, ValueError):
        return False


def mark_made(folder: Path, settings: dict) -> None:
    """Record in `folder`/made.json the settings that made its files, once they are finished."""
    write_text(folder / "made.json", json.dumps(settings) + "\n")
