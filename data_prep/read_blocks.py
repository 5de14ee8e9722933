"""Read JSON Lines and Parquet through fsspec: local files, http(s):// and hf:// alike.

Plain JSON Lines are cut into blocks, of which only those that are drawn are transferred. Compressed
files and Parquet cannot be entered midway: they are streamed whole and sampled by line.
"""

import random
import time
from collections.abc import Callable, Iterator

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs
from fsspec.utils import infer_compression
from pyarrow.parquet import ParquetFile
from tqdm import tqdm

from common.cli import UserError, one_line

conf["http"] = {"headers": {"Accept-Encoding": "identity"}, "client_kwargs": {"trust_env": True}}
BLOCK = 1 << 20  # bytes; the last line of a block reaches beyond it, 3% to 10% in RedPajama
AHEAD = 1 << 16  # bytes transferred beyond a block at first, to end its last line
PAUSES = (0.5, 1, 2, 4, 8, 16, 0)  # seconds after each try over HTTP; hf:// tries again by itself
Unit = tuple[str, int, int, int]  # a file, its size, which of its bytes: from, up to


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
    cache = {"cache_type": "readahead", "block_size": AHEAD, "size": size}
    with url_to_fs(path)[0].open(path, **cache) as file:  # `read_block` there fetches borders twice
        file.seek(start)
        block = file.read(end - start)
        first = block.find(b"\n") + 1 if start else 0
        if start and not first:
            return []  # the block lies within a line
        return (block[first:] + file.readline()).split(b"\n")


def read_unit(unit: Unit, fraction: float, seed: int) -> Iterator[bytes | str | dict]:
    """The lines or rows that are drawn of a unit. Raises UserError."""
    path, draw = unit[0], random.Random(f"{seed}/{unit[0]}")
    is_table = path.endswith(".parquet")
    if not is_table and not infer_compression(path):
        yield from filter(bytes.strip, retrying(path, read_block, *unit))
        return
    mode = {"mode": "rb"} if is_table else {"mode": "rt", "errors": "replace"}
    try:
        with fsspec.open(path, compression="infer", **mode) as file:
            batches = ParquetFile(file).iter_batches(256) if is_table else ()
            records = (row for batch in batches for row in batch.to_pylist()) if is_table else file
            yield from (record for record in records if draw.random() < fraction)
    except Exception as error:  # each format raises its own
        raise UserError(f"cannot read {path}: broken, {one_line(error)}") from None


def expand(path: str) -> list[str]:
    """The files that a path, a glob, a URL or a .txt list of such names. Raises UserError."""
    files, _ = url_to_fs(path)
    if path.endswith(".txt"):
        listed = retrying(path, files.cat_file, path).decode(errors="replace")
        return [file for line in listed.split() for file in expand(line)]
    is_url = path.startswith("http")
    matches = [path] if is_url else sorted(retrying(path, files.glob, path))
    if not matches:
        raise UserError(f"no file matches {path}")
    return [files.unstrip_protocol(match).removeprefix("file://") for match in matches]


def draw_units(paths: list[str], fraction: float, seed: int) -> list[Unit]:
    """Blocks drawn uniformly over the bytes of each file, none twice. Raises UserError."""
    units = []
    for path in tqdm(paths, "sizes of the files", unit="file"):
        size = retrying(path, url_to_fs(path)[0].size, path)
        if size is None:
            raise UserError(f"cannot read {path}: its size is not told; download it")
        if path.endswith(".parquet") or infer_compression(path):
            units.append((path, size, 0, size))
            continue
        draw, step = random.Random(f"{seed}/{path}"), int(fraction * size) // 20
        starts = range(0, size, max(4096, min(BLOCK, step)))
        wanted = min(len(starts), int(fraction * len(starts) + draw.random()))
        blocks = [(path, size, start, min(start + starts.step, size)) for start in starts]
        units += sorted(draw.sample(blocks, wanted))
    return units
