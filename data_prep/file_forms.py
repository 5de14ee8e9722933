"""Tell by its first bytes what a file of texts is: read as it is, unpacked, or not read at all."""

import bz2
import json
import lzma
import zlib
from contextlib import suppress
from dataclasses import dataclass

from fsspec.utils import infer_compression
from zstandard import ZstdDecompressor, ZstdError

from common.text import encoding_of

HEAD = 1 << 12  # bytes at the start of a file by which it is told
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
NOT_READ = {  # how files begin that hold texts and are not read
    b"%PDF": "a PDF",
    b"PK\3\4": "a zip archive or an Office file",  # unless its name ends in .zip
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"\xd0\xcf\x11\xe0": "an Office file",
    b"{\\rtf": "an RTF file",
    b"ARROW1": "an Arrow file",
    b"\xff\xff\xff\xff": "an Arrow stream",
    b"ORC": "an ORC file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
SAVE = 'it is not read: save it as JSON Lines, {"text": ...} a line, or as Parquet'
SPLIT = "it is not read: write an object a line, as `jq -c {filter} FILE > FILE.jsonl` does"


@dataclass(frozen=True)
class Form:
    """`compression` as fsspec names it; `fault`: why a file is not read, and what to do."""

    is_parquet: bool = False
    compression: str | None = None
    encoding: str = "utf-8"
    fault: str = ""

    @property
    def in_blocks(self) -> bool:
        """Whether a reader may enter it midway and find the next line by its end."""
        return not (self.is_parquet or self.compression or self.encoding != "utf-8")


def form_by(head: bytes, path: str) -> Form:
    """What a file is whose first bytes, up to HEAD of them, are `head`."""
    name = path.lower()
    if head.startswith(b"PAR1") or name.endswith(".parquet"):
        return Form(is_parquet=True)
    for start, compression in PACKED.items():
        if head.startswith(start):
            return Form(compression=compression, fault=fault_in(unpack_head(head), name))
    if name.endswith(".zip") and head.startswith(b"PK"):
        return Form(compression="zip")
    for start, what in NOT_READ.items():
        if head.startswith(start):
            return Form(fault=f"{what}; {SAVE}")
    by_name = infer_compression(path)
    if by_name and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return Form(compression=by_name)
    return Form(encoding=encoding_of(head), fault=fault_in(head, name))


def unpack_head(head: bytes) -> bytes:
    """What the start of a compressed file holds, as far as it can be told; nothing of bz2's."""
    unpackers = (
        zlib.decompressobj(31).decompress,
        bz2.BZ2Decompressor().decompress,
        lzma.LZMADecompressor().decompress,
        ZstdDecompressor().decompressobj().decompress,
    )
    for unpack in unpackers:
        with suppress(OSError, zlib.error, lzma.LZMAError, ZstdError):
            return unpack(head)
    return b""


def fault_in(head: bytes, name: str) -> str:
    """Why a file that begins with `head` is no JSON Lines for sure, and what to do; else ""."""
    if head[257:262] == b"ustar":
        return "a tar archive; it is not read: unpack it"
    text = head.decode(encoding_of(head), "replace").strip("\ufeff\0 \t\r\n")
    lines = text.splitlines() or [""]
    first = lines[0].strip()
    if text and name.endswith(TABLES) and first[0] not in "{[":
        return f"a CSV table; {SAVE}"
    if text.lower().startswith(("<!doctype", "<html", "<?xml")):
        return f"HTML or XML; {SAVE}"
    if first[:1] not in ("{", "["):
        return ""
    with suppress(ValueError, RecursionError):
        json.loads(first)
        if first[0] == "{" or len(lines) > 1:
            return ""  # a line of its own
    if first[0] == "[":
        return "a JSON array; " + SPLIT.format(filter="'.[]'")
    goes_on = len(lines) > 1 and not lines[1].startswith("{")
    if first == "{" or (goes_on and lines[1][:1] in (" ", "\t", '"')):
        return "JSON with an object over several lines; " + SPLIT.format(filter=".")
    return ""
