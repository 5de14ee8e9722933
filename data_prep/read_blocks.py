"""Read JSON Lines and Parquet through fsspec: local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks, of which only those that are drawn are transferred. Compressed
files, UTF-16 and Parquet cannot be entered midway: they are streamed whole and sampled by line.
What a file is, its first bytes say before its name does; what is not read is named (data_prep.
file_forms).
"""

import random
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from io import BufferedReader, TextIOWrapper
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
COLUMNS = ("meta", "url", "source", "title", "arxiv_id", "language")
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


def read_rows(file: BinaryIO, text_fields: tuple[str, ...]) -> Iterator[dict]:
    """The rows of a Parquet file, as far as their fields are of use to us."""
    table = ParquetFile(file)
    there = set(table.schema_arrow.names)
    useful = [name for name in (*text_fields, *COLUMNS) if name in there]
    columns = None if there.isdisjoint(text_fields) else useful
    for batch in table.iter_batches(256, columns=columns):
        yield from batch.to_pylist()


def read_unit(
    unit: Unit, fraction: float, seed: int, text_fields: tuple[str, ...] = ("text",)
) -> Iterator[bytes | str | dict]:
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
                records = read_rows(file, text_fields)
            elif form.compression:
                records = read_lines(unpacked(file, form.compression, path))
            else:
                records = read_lines(file)
            yield from (record for record in records if draw.random() < fraction)
    except UserError:
        raise
    except Exception as error:  # each format raises its own
        raise UserError(f"cannot read {path}: broken, {one_line(error)}") from None


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
