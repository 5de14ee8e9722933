"""The documents that a command line names, and the names of their answers.

Nothing here reads a document's text but `read_texts`. No two answers share a name on any file
system, and none takes the place of a document.
"""

import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import normalize

from tqdm import tqdm

from common.cli import UserError
from common.files import digest
from data_prep.find_documents import MADE_TEXT, files_below, is_folder, shown
from data_prep.read_document import is_address, read_document

TABLE = "answers.jsonl"  # the name of the file of all answers, beside them
STDIN = "/dev/stdin"
LONGEST_NAME = 200  # bytes; systems take 255, of which temporary names need some


@dataclass(frozen=True)
class Source:
    """A document: what `read_document` takes, and the name of its answer, a path below a folder."""

    where: str
    name: str

    @property
    def called(self) -> str:
        """What the user called it."""
        return "stdin" if self.where == STDIN else self.where


@dataclass(frozen=True)
class Document:
    """A document that was read: what the user called it, the name of its answer, its text."""

    called: str
    name: str
    text: str


def short(part: str) -> str:
    """A file's name without controls, of at most 200 bytes, so that it may be written anywhere."""
    plain = re.sub(r"[\0-\x1f\x7f]", "-", part)
    if len(os.fsencode(plain)) <= LONGEST_NAME:
        return plain
    end = f"-{digest(ascii(part))[:8]}{Path(part).suffix[:10]}"
    room = LONGEST_NAME - len(os.fsencode(end))
    return os.fsencode(plain)[:room].decode(errors="ignore") + end


def answer_name(name: str) -> str:
    """The name of the answer to a document: of a PDF or a page it is a .txt beside it."""
    if Path(name).suffix.lower() in MADE_TEXT:
        name += ".txt"
    return str(Path(*[short(part) for part in Path(name).parts]))


def page_name(address: str) -> str:
    """The name of the answer to a web page: its address, of letters, digits and hyphens."""
    return short((re.sub(r"\W+", "-", address).strip("-") or "page") + ".txt")


def folded(path: Path) -> str:
    """What two names share that some file systems take for one."""
    return normalize("NFC", str(path)).casefold()


def make_unique(sources: list[Source]) -> list[Source]:
    """The sources, each once, under names that no file system takes for another's, or the table's.

    A name that is taken gets a digest of where its document is, so it is the same in the next run.
    """
    files, folders, unique = {TABLE, f".{TABLE}.lock"}, set(), {}
    for source in sources:
        if source.where in unique:
            continue
        path = Path(source.name)
        under_file = any(folded(parent) in files for parent in path.parents)
        if under_file or folded(path) in files | folders:
            name = f"{path.stem}-{digest(ascii(source.where))[:8]}{path.suffix}"
            path = Path(short(name)) if under_file else path.with_name(short(name))
        files.add(folded(path))
        folders.update(folded(parent) for parent in path.parents)
        unique[source.where] = Source(source.where, str(path))
    return list(unique.values())


def find_sources(inputs: list[str], output_dir: Path | None) -> tuple[list[Source], list[str]]:
    """(the documents that the command line names, what is wrong with some of them, a line each)."""
    sources: list[Source] = []
    failures: list[str] = []
    for given in inputs:
        path = Path(given)
        if not given:  # of a shell's variable that is not set; as a path it would be this folder
            failures.append("an empty name is given, which is no text")
        elif given == "-":
            sources.append(Source(STDIN, "stdin"))
            if sys.stdin and sys.stdin.isatty():
                print("type or paste a text; Ctrl-D ends it", file=sys.stderr)
        elif is_address(given):
            sources.append(Source(given, page_name(given)))
        elif is_folder(path):
            try:
                files = files_below(path, output_dir)
            except UserError as error:
                failures.append(str(error))
                continue
            names = [answer_name(str(file.relative_to(path))) for file in files]
            sources += [Source(str(f), name) for f, name in zip(files, names, strict=True)]
        else:
            sources.append(Source(given, answer_name(path.name)))
    return make_unique(sources), failures


def check_outputs(sources: list[Source], output_dir: Path) -> None:
    """Raise UserError if a file of answers would take the place of a document.

    Files are told by their number on disk: there are links, and systems that fold names.
    """

    def number(path: Path) -> tuple[int, int] | None:
        with suppress(OSError, ValueError):
            status = path.stat()
            return status.st_dev, status.st_ino
        return None

    documents = {number(Path(one.where)) for one in sources if not is_address(one.where)} - {None}
    for name in (TABLE, *(source.name for source in sources)):
        if number(output_dir / name) in documents:
            path = shown(str(output_dir / name))
            raise UserError(f"{path} would be overwritten, and is read; name another --output-dir")


def read_texts(sources: list[Source], private: bool) -> tuple[list[Document], list[str]]:
    """(the documents that can be read, what is wrong with the others, a line each)."""
    documents: list[Document] = []
    failures: list[str] = []
    for source in tqdm(sources, "reading", unit="text", delay=3, leave=False):
        try:
            text = read_document(source.where, private)
        except UserError as error:
            failures.append(str(error))
            continue
        documents.append(Document(shown(source.called), source.name, text))
    return documents, failures
