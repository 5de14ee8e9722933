"""Read JSON Lines and Parquet by byte ranges, from local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks of bytes, and a line belongs to the block in which it starts:
any choice of blocks gives whole lines, all blocks give each line once, and only the blocks chosen
are transferred. Compressed files and Parquet cannot be entered midway: they are streamed whole and
sampled by line. `ReadBlocks` is a datatrove step; data_prep.sample_extracts runs it.
"""

import argparse
import io
import os
import random
import re
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from glob import has_magic
from pathlib import Path

import fsspec
import httpx
import orjson
import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from fsspec.compression import compr
from fsspec.utils import infer_compression
from loguru import logger

from common.cli import UserError, warn

SUBSETS = "arxiv|wikipedia|stackexchange|common_crawl|c4|github|book"  # RedPajama's folders
BLOCK = 1 << 20  # bytes; the last line of a block reaches beyond it, 3% to 10% in RedPajama
AHEAD = 1 << 15  # bytes read at first beyond a block, to end its last line
LONGEST_LINE = 16 << 20  # bytes; a longer line is skipped, so that memory stays bounded
PASSING = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses worth another try
BROKEN = (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError)
Unit = tuple[str, int, int, int]  # bytes [start, end) of a file: path, size of the file, start, end


def subset_of(path: str) -> str:
    """RedPajama's subset as a file's path names it, or "other"."""
    names = re.findall(rf"(?:^|/)({SUBSETS})(?=[/._])", path)
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
        self.url, self.headers = path, {"Accept-Encoding": "identity"}
        try:
            if path.startswith("hf://"):
                from huggingface_hub.utils import build_hf_headers

                self.url = fsspec.filesystem("hf").url(path)
                self.headers |= build_hf_headers()
            self.size = self._request(0, 1)[1] if size is None else size
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise self.failure(getattr(error, "strerror", None) or error) from None

    def failure(self, said: object) -> UserError:
        return UserError(f"cannot read {self.path}: {' '.join(str(said).split())[:300]}")

    def fetch(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the file."""
        data, size = self._request(start, end)
        if size != self.size or len(data) != end - start:
            raise self.failure(f"its size changed from {self.size:,} to {size:,} bytes")
        return data

    def _request(self, start: int, end: int) -> tuple[bytes, int]:
        """(bytes, size of the whole file)."""
        if "://" not in self.path:
            with Path(self.path).open("rb") as file:
                data, size = os.pread(file.fileno(), end - start, start), file.seek(0, os.SEEK_END)
            self.transferred += len(data)
            return data, size
        for attempt in range(self.retries + 1):
            time.sleep(attempt and min(30, 2 ** (attempt - 2)) * random.uniform(0.8, 1.2))
            try:
                return self._ask_server(start, end)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                said = str(error) or type(error).__name__
        raise self.failure(f"{said} ({self.retries + 1} tries)")

    def _ask_server(self, start: int, end: int) -> tuple[bytes, int]:
        """As `_request`, once. Raises httpx.HTTPError for what may pass, else UserError."""
        headers = {**self.headers, "Range": f"bytes={start}-{end - 1}"}
        with client().stream("GET", self.url, headers=headers) as answer:
            if answer.status_code in PASSING:
                raise httpx.ReadError(f"HTTP status {answer.status_code}")
            told, data = answer.headers.get("Content-Range", ""), bytearray()
            if answer.status_code == 416 and told.endswith("*/0"):
                return b"", 0
            if answer.status_code == 200:
                raise self.failure("the server ignores Range; download the file and pass its path")
            if answer.status_code != 206:
                raise self.failure(f"HTTP status {answer.status_code}")
            match = re.fullmatch(rf"bytes {start}-{end - 1}/(\d+)", told)
            if not match:
                raise self.failure(f"asked for bytes {start}-{end - 1}, the server sent {told!r}")
            for chunk in answer.iter_raw():
                self.transferred += len(chunk)
                data += chunk
                if len(data) > end - start:
                    break
        if len(data) != end - start:
            raise httpx.ReadError(f"{len(data):,} bytes came for {end - start:,}")
        return bytes(data), int(match[1])

    def readable(self) -> bool:
        return True

    seekable = readable

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size)[whence]
        return self.position

    def readinto(self, buffer: memoryview) -> int:
        n = max(0, min(len(buffer), self.size - self.position))
        buffer[:n] = self.fetch(self.position, self.position + n) if n else b""
        self.position += n
        return n


def block_lines(
    fetch: Callable[[int, int], bytes], size: int, start: int, end: int, longest: int = LONGEST_LINE
) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of every line that starts in bytes [start, end) of a file of `size` bytes.

    `fetch(start, end)` gives bytes of the file. A line of more than `longest` bytes is None.
    """
    first = max(0, start - 1)  # one byte more: it tells whether a line starts with the block
    data = fetch(first, min(size, end + AHEAD))
    position = data.find(b"\n") + 1 if start else 0
    if start and not position:
        return
    while first + position < min(end, size):
        stop = data.find(b"\n", position) + 1
        while not stop and first + len(data) < size and len(data) - position <= longest:
            searched, ahead = len(data), max(AHEAD, len(data) - position)
            data += fetch(first + searched, min(size, first + searched + ahead))
            stop = data.find(b"\n", searched) + 1
        ends_here = stop or first + len(data) == size
        stop = stop or len(data)
        fits = ends_here and stop - position <= longest
        yield first + position, data[position:stop] if fits else None
        if not ends_here:
            return  # no other line starts before the one that is too long ends, in a later block
        position = stop


def stream_lines(file: io.BufferedIOBase, longest: int) -> Iterator[tuple[int, bytes | None]]:
    """(number, line) of every line of a file without random access, over-long ones as None."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        yield number, line if len(line) <= longest else None
        while line and not line.endswith(b"\n"):
            line = file.readline(longest)


def stream_records(file: RangeFile) -> Iterator[tuple[int, bytes | dict | None]]:
    """(number, line or row) of a compressed or a Parquet file."""
    if file.path.endswith(".parquet"):
        import pyarrow.parquet

        batches = pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    else:
        unpack = compr[infer_compression(file.path)]
        unpacked = unpack(io.BufferedReader(file, BLOCK), mode="rb")
        yield from stream_lines(io.BufferedReader(unpacked, BLOCK), LONGEST_LINE)


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
            listed = RangeFile(path, retries=retries).readall().decode(errors="replace").split()
            found += expand_paths(listed, retries)
        elif has_magic(path) and not path.startswith("http"):
            files, pattern = fsspec.core.url_to_fs(path)
            hub = "hf://" * path.startswith("hf://")
            found += [hub + match for match in sorted(files.glob(pattern))]
        else:
            found.append(path if "://" in path else str(Path(path).absolute()))
    if not found:
        raise UserError(f"no file matches {' '.join(inputs)}")
    return found


def is_splittable(path: str) -> bool:
    return not path.endswith(".parquet") and not infer_compression(path)


def draw_units(files: list[tuple[str, int]], fraction: float, seed: int) -> list[Unit]:
    """What to read of (path, size) files: blocks drawn uniformly over the bytes of each subset.

    Drawn without replacement, so each line of a subset has the same chance, the share of blocks
    drawn. Small inputs have smaller blocks, so that a fraction of them is still a sample.
    """
    units = [(path, size, 0, size) for path, size in files if not is_splittable(path)]
    subsets = defaultdict(list)
    for path, size in files:
        if is_splittable(path):
            subsets[subset_of(path)].append((path, size))
    for subset, members in sorted(subsets.items()):
        step = max(4096, min(BLOCK, int(fraction * sum(size for _, size in members)) // 20))
        blocks = [
            (path, size, start, min(start + step, size))
            for path, size in members
            for start in range(0, size, step)
        ]
        wanted = min(len(blocks), max(1, round(fraction * len(blocks))))
        units += sorted(random.Random(f"{seed}/{subset}").sample(blocks, wanted))
    return units


class ReadBlocks(PipelineStep):
    """The records of every `world_size`-th unit, with what was transferred in the statistics.

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
        for path, size, start, end in self.units[rank::world_size]:
            started, subset = time.perf_counter(), subset_of(path)
            file = RangeFile(path, size, self.options.retries)
            for where, line in self._lines(file, start, end):
                record = parse_record(line)
                if isinstance(record, dict):
                    yield Document(record["text"], f"{path}:{where}", metadata=record)
                    continue
                self.stat_update(f"{subset}|dropped: {record}")
                if record not in told:
                    told.add(record)
                    warn(f"{path}:{where}: {record}, skipped; more of this are only counted")
            done += end - start
            (self.progress / f"{rank:05d}").write_text(str(done))
            self.stat_update(f"{subset}|MB transferred", value=file.transferred / 1e6)
            self.stat_update(f"{subset}|seconds", value=time.perf_counter() - started)

    def _lines(self, file: RangeFile, start: int, end: int) -> Iterator[tuple[str, object]]:
        try:
            if is_splittable(file.path):
                for offset, line in block_lines(file.fetch, file.size, start, end):
                    if line is None or line.strip():
                        yield f"byte {offset}", line
                return
            chance = random.Random(f"{self.options.seed}/{file.path}")
            for number, line in stream_records(file):
                if chance.random() < self.options.fraction and line != b"\n":
                    yield f"line {number}", line
        except BROKEN as error:
            raise file.failure(f"broken file, {error}") from None
