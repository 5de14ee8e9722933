"""Files that survive a crash, hashes, and settings that tell what made a folder.

Every stage reads and writes through these functions: whole files appear under their name only
when finished, appended files are flushed record by record and repaired after a kill. What is
written is UTF-8 (`to_line`), and what is read again equals it.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from common.cli import UserError, warn
from common.text import encoding_of, utf8

MOST_NAMED = 10  # lines of a file that are named one by one when they cannot be read
BETWEEN = re.compile(r"[\[\],\ufeff\0\s]*")  # what may stand between the records of one line
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # escaped: "\\ud83d"
DAY = 86_400  # seconds


def to_line(record: dict) -> bytes:
    """A record as a line of JSON in UTF-8; half a surrogate pair becomes U+FFFD (`text.utf8`)."""
    return utf8(json.dumps(record, ensure_ascii=False)) + b"\n"


def parse_object(line: bytes | str) -> dict | None:
    """The object that a line of JSON holds, as `to_line` writes it; None if it holds none."""
    try:
        record = json.loads(line)
        if isinstance(record, dict) and SURROGATE.search(
            utf8(line) if isinstance(line, str) else line
        ):
            record = json.loads(to_line(record))
    except (ValueError, RecursionError):  # ValueError also of bytes that are no UTF-8
        return None
    return record if isinstance(record, dict) else None


def objects_in(line: bytes | str) -> tuple[list[dict], bool]:
    """(objects, whether they are all of it) of a line that holds several instead of one.

    So it does where a file without its last newline was joined with another, or an editor wrote
    \\r for \\n or an array: `{...}{...}`, `[{...}, {...}]`.
    """
    text = line if isinstance(line, str) else line.decode("utf-8", "replace")
    decoder, objects, position = json.JSONDecoder(), [], BETWEEN.match(text).end()
    while position < len(text):
        try:
            record, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        objects.append(json.loads(to_line(record)))
        position = BETWEEN.match(text, end).end()
    return objects, position == len(text)


def lines_of(path: Path) -> Iterator[bytes | str]:
    """The lines of a text file, as text if it is in UTF-16 or UTF-32. Blank ones are empty."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
        file.seek(0)
        if encoding != "utf-8":
            for line in TextIOWrapper(file, encoding, errors="replace", newline="\n"):
                yield line.strip("\0\ufeff \t\r\n")
            return
        for line in file:  # NULs are what a power loss leaves in place of what was not yet on disk
            yield line.removeprefix(b"\xef\xbb\xbf").strip(b"\0 \t\r\n")


def read_records(path: Path, fields: Iterable[str] = ()) -> Iterator[dict]:
    """Yield the records of a JSON Lines file; those without `fields` are named, skipped."""
    skipped = 0
    for number, line in enumerate(lines_of(path), 1):
        if not line:
            continue
        record = parse_object(line)
        records, is_all = objects_in(line) if record is None else ([record], True)
        faults = []
        if not records or not is_all:
            is_list = line[:1] in (b"[", "[")
            faults.append("not a JSON object" if is_list else "not valid JSON")
        for record in records:
            lacking = [field for field in fields if field not in record]
            if lacking:
                faults.append(f"lacks {', '.join(lacking)}")
            elif record:
                yield record
        for fault in faults:
            skipped += 1
            if skipped <= MOST_NAMED:
                warn(f"{path}:{number}: {fault}, line skipped")
    if skipped > MOST_NAMED:
        warn(f"{path}: {skipped - MOST_NAMED:,} more lines skipped, for the like")


def load_as_written(path: Path, fields: Iterable[str] = (), made_by: str = "") -> list[dict]:
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


def load_records(path: Path, fields: Iterable[str] = (), made_by: str = "") -> list[dict]:
    """Those of `load_as_written`; their ids are strings, 7 is "7". Raises UserError."""
    records = load_as_written(path, fields, made_by)
    for record in records:
        if "id" in record:
            record["id"] = id_text(record["id"])
    return records


def id_text(value: object) -> str:
    """An id as it joins records; in JSON it may be a number. The empty string is of none."""
    return str(value) if isinstance(value, str | int | float) else ""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def remove_stale(path: Path) -> None:
    """Remove what killed processes left of `path` under their temporary names (`replacing`)."""
    pattern = rf"\.{re.escape(path.name)}\.(\d+)(@.*)?\.tmp"
    for other in path.parent.iterdir():
        match = re.fullmatch(pattern, other.name)
        if not match:
            continue
        with suppress(OSError):  # another process may remove it as well
            of_here = match[2] in (None, f"@{platform.node()}")
            is_old = time.time() - other.stat().st_mtime > DAY
            if is_old or (of_here and not is_running(int(match[1]))):
                other.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(utf8(text))


def write_records(path: Path, records: Iterable[dict]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        for record in records:
            file.write(to_line(record))


def repair_end(file: BinaryIO, path: Path) -> None:
    """Make an append-only file end with a whole line.

    A last record that lacks its newline gets it: it is whole, by an editor or as the very last
    byte of a kill. What a kill tore, and NULs of a power loss, are cut off and named; a line that
    holds any whole record, as no kill leaves it, stays.
    """
    size = os.fstat(file.fileno()).st_size
    if not size:
        return
    with mmap(file.fileno(), size, access=ACCESS_READ) as content:
        end_of_last_line = content.rfind(b"\n") + 1
        rest = content[end_of_last_line:]
    whole = rest.rstrip(b"\0 \t\r")
    if objects_in(whole)[0]:
        file.truncate(end_of_last_line + len(whole))
        file.write(b"\n")
        file.flush()
        return
    file.truncate(end_of_last_line)
    if whole:
        warn(f"{path}: its last line, {len(whole):,} bytes, was torn by a kill and is cut off")


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Open an append-only file for one writer, its end made whole (`repair_end`).

    Raises UserError if another process is writing to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another run; wait for it") from None
        file.seek(0)
        if (encoding := encoding_of(file.read(4))) != "utf-8":
            hint = f"iconv -f {encoding} -t utf-8"
            raise UserError(f"{path} is in {encoding}; save it as UTF-8 ({hint}) to go on with it")
        repair_end(file, path)
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
        file.write(to_line(record))
    file.flush()
    os.fsync(file.fileno())


def digest(*parts: object) -> str:
    """16 hex digits that tell `parts` from others, the same on every machine."""
    return hashlib.sha256(utf8("\x1f".join(map(str, parts)))).hexdigest()[:16]


def share_of(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int(digest(seed, key), 16) / 16**16


def file_sha(path: Path) -> str:
    """First 12 hex digits of the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def bytes_sha(content: bytes) -> str:
    """First 12 hex digits of the SHA-256 of bytes, as `file_sha` of a file that holds them."""
    return hashlib.sha256(content).hexdigest()[:12]


def read_json(path: Path) -> dict:
    """The object that a JSON file holds, nothing where there is no file. Raises UserError."""
    if not path.is_file():
        return {}
    value = parse_object(path.read_bytes())
    if value is None:
        raise UserError(f"{path} is not a JSON object any more; mend it or delete it")
    return value


def is_made(folder: Path, settings: dict) -> bool:
    """Whether `folder` was finished with exactly these settings (see `mark_made`)."""
    try:
        made = json.loads((folder / "made.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return made == json.loads(to_line(settings))


def mark_made(folder: Path, settings: dict) -> None:
    """Record in `folder`/made.json the settings that made its files, once they are finished."""
    write_text(folder / "made.json", json.dumps(settings) + "\n")
