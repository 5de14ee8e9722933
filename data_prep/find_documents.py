"""The documents that a folder holds, told by their suffixes; nothing here reads their text."""

import os
from contextlib import suppress
from pathlib import Path

from common.cli import UserError, one_line, warn
from data_prep.decode_text import without_commands

MADE_TEXT = (".html", ".htm", ".xhtml", ".pdf")
READ = (".txt", ".text", ".md", ".markdown", *MADE_TEXT)  # of a folder
RECORDS = (".jsonl", ".ndjson", ".json", ".parquet")  # which hold many texts, and may be packed
PACKED = (".gz", ".zst", ".bz2", ".xz", ".zip")


def shown(name: str) -> str:
    """A file's name as a terminal may show it, whatever bytes it is of."""
    return one_line(without_commands(os.fsencode(name).decode(errors="replace")), 1000)


def files_below(
    folder: Path, output_dir: Path | None, suffixes: tuple[str, ...] = READ
) -> list[Path]:
    """The files of a folder that are read, less what is made in an `output_dir` within it.

    What is passed over is told in a line. Raises UserError if there is nothing to read.
    """
    errors: list[OSError] = []
    files = []
    for parent, _, names in os.walk(folder, onerror=errors.append):
        files += [Path(parent, name) for name in names if not name.startswith("._")]
    answers = output_dir and output_dir.resolve()
    if answers and answers != folder.resolve():
        files = [path for path in files if answers not in path.resolve().parents]
    readable = sorted(path for path in files if is_named(path, suffixes) and not is_pipe(path))
    hidden = [p for p in files if any(part[0] == "." for part in p.relative_to(folder).parts)]
    others = sorted(str(p.relative_to(folder)) for p in set(files).difference(readable, hidden))
    over = f"{len(others)} other files, such as {', '.join(map(shown, others[:3]))}"
    for error in errors:
        warn(f"{shown(str(error.filename))} is passed over: {error.strerror}")
    if not readable:
        there = f", but {over}" if others else ""
        raise UserError(f"there is no {', '.join(suffixes)} in {shown(str(folder))}{there}")
    if others:
        warn(f"{shown(str(folder))}: {over}, are passed over; {', '.join(suffixes)} are read")
    return readable


def is_named(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file is of one of these suffixes, which a file of records has before .gz, too."""
    suffix = path.suffix.lower()
    if suffix in PACKED:
        suffix = Path(path.stem).suffix.lower()
        return suffix in RECORDS and suffix in suffixes
    return suffix in suffixes


def is_folder(path: Path) -> bool:
    """False, too, for what can be no path at all, such as a name that is too long."""
    with suppress(OSError):
        return path.is_dir()
    return False


def is_pipe(path: Path) -> bool:
    """Whether it is a pipe or a device, which may never end; a broken link is a file to tell of."""
    return path.exists() and not path.is_file()
