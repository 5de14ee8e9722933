"""Read JSON Lines and Parquet by byte ranges, from local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks of bytes, and a line belongs to the block in which it starts:
any choice of blocks gives whole lines, all blocks give each line once, and only the blocks chosen
are transferred. Compressed files and Parquet cannot be entered midway: they are streamed whole and
sampled by line. `ReadBlocks` is a datatrove step; data_prep.sample_extracts runs it.
"""

import argparse
import glob
import io
import os
import random
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import fsspec.utils
import httpx
import orjson
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from fsspec.compression import compr
from loguru import logger

from data_prep.records import UserError, warn

SUBSETS = "arxiv|wikipedia|stackexchange|common_crawl|c4|github|book"  # RedPajama's folders
BLOCK = 1 << 20  # bytes; the last line of a block reaches beyond it, 3% to 10% in RedPajama
AHEAD = 1 << 15  # bytes read at first beyond a block, to end its last line
LONGEST_LINE = 16 << 20  # bytes; a longer line is skipped, so that memory stays bounded
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another try


class Unit(NamedTuple):
    """Bytes [start, end) of a file, read by one task in one go."""

    path: str
    size: int
    start: int
    end: int


def subset_of(path: str) -> str:
    """RedPajama's subset as a file's path names it, or "other"."""
    names = re.findall(rf"(?:^|[/\\])({SUBSETS})(?=[/._])", path)
    return names[-1] if names else "other"


@lru_cache
def client() -> httpx.Client:
    return httpx.Client(timeout=60, follow_redirects=True)


class RangeFile(io.RawIOBase):
    """A file read by byte ranges (RFC 9110, section 14), local or over HTTP.

    An answer counts only if it is the range asked for, whole. Cut transfers and passing failures
    are tried again `retries` times with growing pauses. Raises UserError. `transferred`: bytes.
    """

    def __init__(self, path: str, size: int | None = None, retries: int = 6):
        self.path, self.retries, self.position, self.transferred = path, retries, 0, 0
        self.headers, self.url = {"Accept-Encoding": "identity"}, path
        if path.startswith("hf://"):
            from huggingface_hub import HfFileSystem
            from huggingface_hub.utils import build_hf_headers

            self.headers |= build_hf_headers()
            try:
                self.url = HfFileSystem().url(path)
            except (OSError, ValueError, httpx.HTTPError) as error:
                raise self.failure(error) from None
        self.remote = "://" in path
        self.size = size if size is not None else self._find_size()

    def failure(self, said: object) -> UserError:
        return UserError(f"cannot read {self.path}: {' '.join(str(said).split())[:300]}")

    def _find_size(self) -> int:
        if self.remote:
            return self._retrying(0, 1)[1]
        try:
            with Path(self.path).open("rb") as file:
                return file.seek(0, os.SEEK_END)
        except OSError as error:
            raise self.failure(error.strerror) from None

    def fetch(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the file."""
        if self.remote:
            return self._retrying(start, end)[0]
        try:
            with Path(self.path).open("rb") as file:
                data = os.pread(file.fileno(), end - start, start)
        except OSError as error:
            raise self.failure(error.strerror) from None
        self.transferred += len(data)
        return data

    def _retrying(self, start: int, end: int) -> tuple[bytes, int]:
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(30, 2 ** (attempt - 2)) * random.uniform(0.8, 1.2))
            try:
                return self._request(start, end)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                said = error
        raise self.failure(f"{said or type(said).__name__} ({self.retries + 1} tries)")

    def _request(self, start: int, end: int) -> tuple[bytes, int]:
        """(bytes, size of the whole file). Raises httpx.HTTPError for what may pass."""
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
        with client().stream("GET", self.url, headers=headers) as answer:
            if answer.status_code in PASSING:
                raise httpx.ReadError(f"HTTP status {answer.status_code}")
            told = answer.headers.get("Content-Range", "")
            if answer.status_code == 416 and told.endswith("*/0"):
                return b"", 0
            if answer.status_code == 200:
                raise self.failure("the server ignores Range; download the file and pass its path")
            if answer.status_code != 206:
                raise self.failure(f"HTTP status {answer.status_code}")
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
            if not match or (int(match[1]), int(match[2])) != (start, end - 1):
                raise self.failure(f"asked for bytes {start}-{end - 1}, the server sent {told!r}")
            data = bytearray()
            for chunk in answer.iter_raw():
                self.transferred += len(chunk)
                data += chunk
                if len(data) > end - start:
                    break
        if len(data) != end - start:
            raise httpx.ReadError(f"{len(data):,} bytes came for {end - start:,}")
        return bytes(data), int(match[3])

    def readable(self) -> bool:
        return True

    seekable = readable

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        end = min(self.size, self.position + len(buffer))
        if end <= self.position:
            return 0
        data = self.fetch(self.position, end)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def block_lines(
    fetch: Callable[[int, int], bytes], size: int, start: int, end: int, longest: int = LONGEST_LINE
) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of every line that starts in bytes [start, end) of a file of `size` bytes.

    `fetch(start, end)` gives bytes of the file. A line of more than `longest` bytes is None.
    """
    first = max(0, start - 1)  # one byte more: it tells whether a line starts with the block
    data = fetch(first, min(size, end + AHEAD)) if start < size else b""
    position = data.find(b"\n") + 1 if start else 0
    if start and not position:
        return
    while (offset := first + position) < min(end, size):
        stop = data.find(b"\n", position) + 1
        while not stop and first + len(data) < size and len(data) - position <= longest:
            reached, ahead = first + len(data), max(AHEAD, len(data) - position)
            more = fetch(reached, min(size, reached + ahead))
            stop = more.find(b"\n") + 1 and len(data) + more.find(b"\n") + 1
            data += more
        whole = stop or first + len(data) >= size
        stop = stop or len(data)
        yield offset, data[position:stop] if whole and stop - position <= longest else None
        if not whole:
            return  # the line ends in a later block
        position = stop


def stream_lines(file: io.BufferedIOBase, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line of a file without random access, over-long ones as None."""
    number = 0
    while line := file.readline(longest + 1):
        number, whole = number + 1, len(line) <= longest
        yield number, line if whole else None
        while line and not line.endswith(b"\n"):
            line = file.readline(longest)


def parquet_rows(file: RangeFile) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    number = 0
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            yield number, row


def parse_record(line: bytes | dict | None) -> dict | str:
    """A record with a text, or the reason why it has none."""
    if line is None:
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
            lines = io.BufferedReader(RangeFile(path, retries=retries)).read().decode().split()
            found += expand_paths(lines, retries)
        elif path.startswith("hf://") and glob.has_magic(path):
            from huggingface_hub import HfFileSystem

            found += [f"hf://{match}" for match in sorted(HfFileSystem().glob(path))]
        elif not glob.has_magic(path) or path.startswith(("http://", "https://", "hf://")):
            found.append(path)
        else:
            found += map(str, sorted(Path().glob(path)))
    if not found:
        raise UserError(f"no file matches {' '.join(inputs)}")
    return found


def is_splittable(path: str) -> bool:
    return not path.endswith(".parquet") and not fsspec.utils.infer_compression(path)


def draw_units(files: list[tuple[str, int]], fraction: float, seed: int) -> list[Unit]:
    """What to read of (path, size) files: blocks drawn uniformly over the bytes of each subset.

    Drawn without replacement, so each line of a subset has the same chance, the share of blocks
    drawn. Small inputs have smaller blocks, so that a fraction of them is still a sample.
    """
    subsets, units = defaultdict(list), []
    for path, size in files:
        if is_splittable(path):
            subsets[subset_of(path)].append((path, size))
        else:
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


class ReadBlocks(PipelineStep):
    """The documents of every `world_size`-th unit, with what was transferred in the statistics.

    Statistics are named subset|row; unusable lines are named on stderr, once per task and reason.
    """

    type, name = "READER", "blocks"

    def __init__(self, units: list[Unit], options: argparse.Namespace, progress: Path):
        super().__init__()
        self.units, self.options, self.progress = units, options, progress

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        if self.options.executor == "local":  # its errors reach the terminal as one line, not a log
            logger.disable("datatrove")

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        done, told = 0, set()
        for unit in map(Unit._make, self.units[rank::world_size]):
            started, subset = time.perf_counter(), subset_of(unit.path)
            file = RangeFile(unit.path, unit.size, self.options.retries)
            for where, line in self._lines(file, unit):
                record = parse_record(line)
                if isinstance(record, str):
                    self.stat_update(f"{subset}|dropped: {record}")
                    if record not in told:
                        told.add(record)
                        warn(f"{unit.path}:{where}: {record}, skipped; more of this are counted")
                    continue
                yield Document(record["text"], f"{unit.path}:{where}", metadata=record)
            done += unit.end - unit.start
            self.progress.joinpath(f"{rank:05d}").write_text(str(done))
            self.stat_update(f"{subset}|MB transferred", value=file.transferred / 1e6)
            self.stat_update(f"{subset}|seconds", value=time.perf_counter() - started)

    def _lines(self, file: RangeFile, unit: Unit) -> Iterator[tuple[str, bytes | dict | None]]:
        if is_splittable(unit.path):
            for offset, line in block_lines(file.fetch, unit.size, unit.start, unit.end):
                if line is None or line.strip():
                    yield f"byte {offset}", line
            return
        chance = random.Random(f"{self.options.seed}/{unit.path}")
        try:
            if unit.path.endswith(".parquet"):
                lines = parquet_rows(file)
            else:
                unpack = compr[fsspec.utils.infer_compression(unit.path)]
                unpacked = unpack(io.BufferedReader(file, BLOCK), mode="rb")
                lines = stream_lines(io.BufferedReader(unpacked, BLOCK), LONGEST_LINE)
            for number, line in lines:
                if chance.random() < self.options.fraction and line != b"\n":
                    yield f"line {number}", line
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise file.failure(f"broken file, {error}") from None
