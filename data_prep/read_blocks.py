"""Read JSON Lines and Parquet through fsspec: local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks, of which only those that are drawn are transferred. Compressed
files, UTF-16 and Parquet cannot be entered midway: they are streamed whole and sampled by line.
What a file is, its first bytes say before its name does; what is not read is named (data_prep.
file_forms).
"""

import random
import stat
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import BinaryIO
from zipfile import ZipFile

import pyarrow
from fsspec import AbstractFileSystem
from fsspec.compression import compr
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

from common.cli import UserError, one_line, warn
from common.text import encoding_of
from data_prep.file_forms import HEAD, Form, form_by

conf["http"] = {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"trust_env": True}}
BLOCK = 1 << 20  # bytes; the last line of a block reaches beyond it, 3% to 10% in RedPajama
AHEAD = 1 << 16  # bytes transferred beyond a block at first, to end its last line
# What is read of a table: a column that pyarrow cannot turn into Python would end it otherwise.
COLUMNS = ("text", "meta", "url", "source", "title", "arxiv_id", "language", "lang")
PAUSES = (0.5, 1, 2, 4, 8, 16, 0)  # seconds after each try over HTTP; hf:// tries again by itself
Unit = tuple[str, int, int, int]  # a file, its size, which of its bytes: from, up to


def file_system(path: str) -> tuple[AbstractFileSystem, str]:
    """Where a path lies, and its name there; of a local name every character is its own."""
    return url_to_fs(path) if "://" in path else (LocalFileSystem(), path)


def open_file(path: str, size: int, ahead: int) -> BinaryIO:
    """A file to read ranges of, `ahead` bytes beyond each range."""
    cache = {"cache_type": "readahead", "block_size": ahead, "size": size}
    files, name = file_system(path)
    return files.open(name, **cache)


def retrying(path: str, read: Callable, *arguments: object):
    """What `read` reads of `path`, over HTTP tried again after pauses. Raises UserError."""
    for pause in PAUSES:
        try:
            return read(*arguments)
        except Exception as error:  # each file system raises its own
            cause = error.__cause__ or error  # fsspec makes a missing file of any over HTTP
        status = getattr(cause, "status", None if isinstance(cause, ValueError) else 500)
        if not path.startswith("http") or status not in (408, 425, 429, *range(500, 600)):
            break  # fsspec's ValueError: the server ignores Range
        time.sleep(pause)
    raise UserError(f"cannot read {path}: {one_line(cause) or type(cause).__name__}")


def read_block(path: str, size: int, start: int, end: int) -> list[bytes]:
    """The lines that start in bytes (start, end] of a file, or in [0, end]."""
    with open_file(path, size, AHEAD) as file:  # `read_block` of fsspec fetches borders twice
        file.seek(start)
        block = file.read(end - start)
        first = block.find(b"\n") + 1 if start else 0
        if start and not first:
            return []  # the block lies within a line
        return (block[first:] + file.readline()).split(b"\n")


def read_head(path: str, size: int) -> bytes:
    with open_file(path, size, HEAD) as file:
        return file.read(min(HEAD, size))


@lru_cache(1 << 14)
def form_of(path: str, size: int) -> Form:
    """What a file is, by its first bytes and its name. Raises UserError."""
    return form_by(retrying(path, read_head, path, size), path)


def unpacked(file: BinaryIO, compression: str, path: str) -> BinaryIO:
    """What a compressed file holds. Raises OSError or EOFError where its end is cut off."""
    if compression == "zstd":  # fsspec's takes a cut file for a whole one
        return BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd"))
    if compression == "zip":
        archive = ZipFile(file)
        names = [name for name in archive.namelist() if not name.endswith("/")]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise UserError(f"{path} is an archive of {len(names)} files; unpack it")
        return archive.open(names[0])
    return compr[compression](file, mode="rb")


def read_lines(file: BinaryIO) -> Iterator[bytes | str]:
    """The lines of a stream, as text if it is in UTF-16 or UTF-32."""
    file = file if hasattr(file, "peek") else BufferedReader(file)
    encoding = encoding_of(file.peek(4)[:4])
    yield from file if encoding == "utf-8" else TextIOWrapper(file, encoding, errors="replace")


def read_rows(file: BinaryIO) -> Iterator[dict]:
    """The rows of a Parquet file, as far as their fields are of use to us."""
    table = ParquetFile(file)
    there = table.schema_arrow.names
    columns = [name for name in COLUMNS if name in there] if "text" in there else None
    for batch in table.iter_batches(256, columns=columns):
        yield from batch.to_pylist()


def read_unit(unit: Unit, fraction: float, seed: int) -> Iterator[bytes | str | dict]:
    """The lines or rows that are drawn of a unit. Raises UserError."""
    path, size = unit[:2]
    form = form_of(path, size)
    if form.in_blocks:
        yield from filter(bytes.strip, retrying(path, read_block, *unit))
        return
    draw = random.Random(f"{seed}/{path}")
    files, name = file_system(path)
    try:
        with files.open(name) as file:
            if form.is_parquet:
                records = read_rows(file)
            elif form.compression:
                records = read_lines(unpacked(file, form.compression, path))
            else:
                records = read_lines(file)
            yield from (record for record in records if draw.random() < fraction)
    except UserError:
        raise
    except Exception as error:  # each format raises its own
        raise UserError(f"cannot read {path}: broken, {one_line(error)}") from None


def kind_of(name: str) -> str:
    """What a local name stands for: a "file", a "folder", a dead "link", "other", or nothing."""
    is_link = False
    try:
        is_link = Path(name).is_symlink()
        mode = Path(name).stat().st_mode
    except (OSError, ValueError):  # too long, a NUL in it, links in a circle
        return "link" if is_link else ""
    if stat.S_ISREG(mode):
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "other"


def is_there(name: str) -> bool:
    """Whether a name in a list can be expanded: a file, a glob that matches some, or a URL."""
    if "://" in name:
        return not any(map(str.isspace, name))
    return bool(kind_of(name) or retrying(name, LocalFileSystem().glob, name))


def read_list(path: str) -> list[str]:
    """The names in a .txt list: one a line, or several parted by white space. Raises UserError."""
    files, name = file_system(path)
    content = retrying(path, files.cat_file, name)
    names = []
    for line in content.decode(encoding_of(content), "replace").split("\n"):
        line = line.strip("\ufeff \t\r")
        if not line:
            continue
        parts = [line] if is_there(line) else line.split()  # a name may have spaces in it
        lost = [part for part in parts if not is_there(part)]
        if lost:
            start = one_line(line, 60)
            raise UserError(
                f"no file matches {lost[0]} in {path}: a .txt is read as a list of files, one a "
                f'line, and "{start}" is none; texts are read from JSON Lines or Parquet'
            )
        names += parts
    if not names:
        raise UserError(f"{path} is empty; a .txt is read as a list of files, one a line")
    return names


def expand(path: str, lists: tuple[str, ...] = ()) -> list[str]:
    """The files that a path, a glob, a URL or a .txt list of such names; a name before a glob.

    `lists` are those in which the path was named. Raises UserError.
    """
    if path.lower().endswith(".txt") and ("://" in path or kind_of(path) == "file"):
        if path in lists:
            raise UserError(f"{path} is a list that names itself")
        return [file for name in read_list(path) for file in expand(name, (*lists, path))]
    if path.startswith("http"):
        return [path]
    files, name = file_system(path)
    if "://" not in path and (kind := kind_of(path)):
        check_kind(path, kind)
        return [files.unstrip_protocol(name).removeprefix("file://")]
    details_by_match = retrying(path, lambda: files.glob(name, detail=True))
    matches = []
    for match in sorted(details_by_match):
        is_local = "://" not in path
        if details_by_match[match]["type"] == "directory" or (
            is_local and kind_of(match) != "file"
        ):
            warn(f"{match} is no file, passed over")
        else:
            matches.append(match)
    if not matches:
        raise UserError(f"no file matches {path}")
    return [files.unstrip_protocol(match).removeprefix("file://") for match in matches]


def check_kind(path: str, kind: str) -> None:
    """Raise UserError if a local path that is there leads to no file."""
    if kind == "folder":
        raise UserError(
            f"cannot read {path}: [Errno 21] Is a directory; name its files, '{path}/*.jsonl'"
        )
    if kind == "link":
        raise UserError(f"no file matches {path}: it is a link that leads nowhere")
    if kind == "other":
        raise UserError(f"cannot read {path}: it is no regular file; save it to one first")


def draw_units(paths: list[str], fraction: float, seed: int) -> list[Unit]:
    """Blocks drawn uniformly over the bytes of each file, none twice.

    A file of a form that is not read is named and passed over. Raises UserError if all are.
    """
    units, faults = [], []
    for path in tqdm(paths, "sizes of the files", unit="file"):
        files, name = file_system(path)
        size = retrying(path, files.size, name)
        if size is None:
            raise UserError(f"cannot read {path}: its size is not told; download it")
        if not size:
            continue
        form = form_of(path, size)
        if form.fault:
            faults.append(f"{path}: {form.fault}")
            continue
        if not form.in_blocks:
            units.append((path, size, 0, size))
            continue
        draw, step = random.Random(f"{seed}/{path}"), int(fraction * size) // 20
        starts = range(0, size, max(4096, min(BLOCK, step)))
        wanted = min(len(starts), int(fraction * len(starts) + draw.random()))
        blocks = [(path, size, start, min(start + starts.step, size)) for start in starts]
        units += sorted(draw.sample(blocks, wanted))
    if faults and len(faults) == len(paths):
        others = f"; {len(faults) - 1} more files alike" if faults[1:] else ""
        raise UserError(faults[0] + others)
    for fault in faults:
        warn(f"{fault}; passed over")
    return units
