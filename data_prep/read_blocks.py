"""Read JSON Lines and Parquet through fsspec: local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks of bytes, and a line belongs to the block in which it starts
(at its end still counts): any choice of blocks gives whole lines, all blocks give each line once,
and only the blocks chosen are transferred. Compressed files and Parquet cannot be entered midway:
they are streamed whole and sampled by line. For data_prep.sample_extracts.
"""

import argparse
import io
import random
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from glob import has_magic
from pathlib import Path
from typing import NamedTuple, TypeVar

import aiohttp
import fsspec
import httpx
import orjson
import zstandard
from fsspec.compression import compr
from fsspec.utils import infer_compression

from common.cli import UserError, one_line

SUBSETS = "arxiv|wikipedia|stackexchange|common_crawl|c4|github|book"  # RedPajama's folders
BLOCK = 1 << 20  # bytes; the last line of a block reaches beyond it, 3% to 10% in RedPajama
AHEAD = 1 << 16  # bytes transferred beyond a block at first, to end its last line
LONGEST_LINE = 16 << 20  # bytes; a longer line is skipped, so that memory stays bounded
RETRYABLE = {408, 425, 429}  # HTTP statuses worth another try, beside those from 500 up
UNREADABLE = (OSError, ValueError, aiohttp.ClientError, httpx.HTTPError)  # the last for hf://
BROKEN = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)
T = TypeVar("T")


class Unit(NamedTuple):
    """Bytes [start, end) of a file of `size` bytes."""

    path: str
    size: int
    start: int
    end: int


def subset_of(path: str) -> str:
    """RedPajama's subset as a file's name or the folders right above it tell, or "other"."""
    names = re.findall(rf"(?:^|/)({SUBSETS})(?=[/._])", "/".join(path.split("/")[-3:]))
    return names[-1] if names else "other"


def is_splittable(path: str) -> bool:
    return not path.endswith(".parquet") and not infer_compression(path)


def filesystem(path: str) -> fsspec.AbstractFileSystem:
    if path.startswith("http"):
        headers = {"Accept-Encoding": "identity"}  # ranges of the file, not of it packed
        return fsspec.filesystem("http", headers=headers, client_kwargs={"trust_env": True})
    return fsspec.core.url_to_fs(path)[0]


def with_retries(action: Callable[[], T], path: str, retries: int) -> T:
    """What `action` reads of `path`, over HTTP tried again with growing pauses. Raises UserError.

    The Hub's client tries again by itself.
    """
    for attempt in range(retries + 1):
        time.sleep(attempt and min(30, 2 ** (attempt - 2)) * random.uniform(0.8, 1.2))
        try:
            return action()
        except UNREADABLE as error:
            # fsspec takes any failure over HTTP for a missing file, and keeps the cause.
            cause = error.__cause__ or error
            status = getattr(cause, "status", None)
            reason = f"HTTP status {status}" if status else getattr(cause, "strerror", None)
            reason = reason or one_line(cause) or type(cause).__name__
            final = status and status < 500 and status not in RETRYABLE
            if final or not path.startswith("http"):
                break
    raise UserError(f"cannot read {path}: {reason}")


def fetch_range(fetch: Callable[[int, int], bytes], path: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a remote file, tried once."""
    try:
        data = fetch(start, end)
    except ValueError:  # fsspec reads no more than was asked for, but cannot begin in the middle
        reason = "the server ignores Range; download the file and pass its path"
        raise UserError(f"cannot read {path}: {reason}") from None
    if len(data) != end - start:
        raise OSError(f"{len(data):,} bytes came for {end - start:,}; has the file changed?")
    return data


def file_size(path: str, retries: int) -> int:
    info = with_retries(lambda: filesystem(path).info(path), path, retries)
    if info["type"] == "directory":
        raise UserError(f"cannot read {path}: Is a directory")
    if info["size"] is None:
        raise UserError(f"cannot read {path}: its size is unknown; download it and pass its path")
    return info["size"]


def open_unit(unit: Unit, ahead: int, retries: int) -> io.BufferedReader:
    """The unit's file, of which is transferred what is read and up to `ahead` bytes more."""
    cache = {"cache_type": "readahead", "block_size": ahead, "size": unit.size}
    opening = partial(filesystem(unit.path).open, unit.path, **cache)
    file = with_retries(opening, unit.path, retries)
    if "://" in unit.path:
        fetch = partial(fetch_range, file.cache.fetcher, unit.path)
        file.cache.fetcher = lambda a, b: with_retries(partial(fetch, a, b), unit.path, retries)
    return io.BufferedReader(file, ahead)


def block_lines(file: io.BufferedReader, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of every line that starts in bytes (start, end] of a file, or in [0, end].

    As fsspec's `read_block`, which transfers the borders twice. A line over LONGEST_LINE is cut.
    """
    file.seek(start)
    block = file.read(end - start)
    first = block.find(b"\n") + 1 if start else 0
    if start and not first:
        return  # the block lies within a line
    offset = start + first
    for line in io.BytesIO(block[first:] + file.readline(LONGEST_LINE + 1)):
        yield offset, line
        offset += len(line)


def stream_records(file: io.BufferedReader, path: str) -> Iterator[bytes | dict]:
    """The lines or rows of a compressed or a Parquet file; over-long lines come in pieces."""
    if path.endswith(".parquet"):
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            yield from batch.to_pylist()
    else:
        unpacked = io.BufferedReader(compr[infer_compression(path)](file, mode="rb"), BLOCK)
        yield from iter(partial(unpacked.readline, LONGEST_LINE + 1), b"")


def read_unit(unit: Unit, options: argparse.Namespace) -> Iterator[tuple[str, bytes | dict]]:
    """(place, line or row) of what is drawn of a unit. Raises UserError."""
    draw, splittable = random.Random(f"{options.seed}/{unit.path}"), is_splittable(unit.path)
    try:
        with open_unit(unit, AHEAD if splittable else BLOCK, options.retries) as file:
            if splittable:
                for offset, line in block_lines(file, unit.start, unit.end):
                    yield f"byte {offset}", line
                return
            for number, line in enumerate(stream_records(file, unit.path), 1):
                if draw.random() < options.fraction:
                    yield f"line {number}", line
    except BROKEN as error:
        raise UserError(f"cannot read {unit.path}: broken file, {one_line(error)}") from None


def parse_record(line: bytes | dict) -> dict | str:
    """A record with a text, or the reason why it has none."""
    if len(line) > LONGEST_LINE:
        return "line too long"
    try:
        record = line if isinstance(line, dict) else orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return "not UTF-8" if "UTF-8" in str(error) else "not valid JSON"
    if not isinstance(record, dict) or record.get("text") is None:
        return "no text"
    return record if isinstance(record["text"], str) else "text is not a string"


def expand_paths(inputs: list[str], retries: int) -> list[str]:
    """The files that paths, globs, URLs and .txt lists of such name. Raises UserError."""
    found = []
    for path in inputs:
        if path.endswith(".txt"):
            listed = with_retries(lambda p=path: filesystem(p).open(p).read(), path, retries)
            found += expand_paths(listed.decode(errors="replace").split(), retries)
        elif has_magic(path) and not path.startswith("http"):
            files = filesystem(path)
            matches = sorted(files.glob(path))
            found += matches if "://" not in path else map(files.unstrip_protocol, matches)
        else:
            found.append(path if "://" in path else str(Path(path).absolute()))
    if not found:
        raise UserError(f"no file matches {' '.join(inputs)}")
    return found


def draw_units(files: list[tuple[str, int]], fraction: float, seed: int) -> list[Unit]:
    """What to read of (path, size) files: blocks drawn uniformly over the bytes of each subset.

    Drawn without replacement, so each line of a subset has the same chance, the share of blocks
    drawn. Small inputs have smaller blocks, so that a fraction of them is still a sample.
    """
    units, subsets = [], defaultdict(list)
    for path, size in files:
        if is_splittable(path):
            subsets[subset_of(path)].append((path, size))
        elif size:
            units.append(Unit(path, size, 0, size))
    for subset, members in sorted(subsets.items()):
        step = max(4096, min(BLOCK, int(fraction * sum(size for _, size in members)) // 20))
        blocks = [
            Unit(path, size, start, min(start + step, size))
            for path, size in members
            for start in range(0, size, step)
        ]
        wanted = min(len(blocks), max(1, round(fraction * len(blocks))))
        units += sorted(random.Random(f"{seed}/{subset}").sample(blocks, wanted))
    return units
