"""Find what an --input names: documents, each of which is one text, and files of records."""

import stat
from pathlib import Path
from urllib.parse import urlsplit

from fsspec.implementations.local import LocalFileSystem

from common.cli import UserError, one_line, warn
from common.text import encoding_of
from data_prep.file_forms import HEAD, TABLES, form_by
from data_prep.find_documents import PACKED, READ, RECORDS, files_below, is_named
from data_prep.read_blocks import file_system, retrying
from data_prep.read_document import is_address

LOOKED_AT = 100  # lines of a .txt by which a list is told from a text
SPACE = b"\xef\xbb\xbf \t\r\n"


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
    """Whether a name in a list can be expanded: a file, a glob that matches some, or an address."""
    if is_address(name):
        return not any(map(str.isspace, name))
    return bool(kind_of(name) or retrying(name, LocalFileSystem().glob, name))


def looks_like_names(line: str) -> bool:
    """Whether a line of a .txt is of a list, though a file that it names may be gone."""
    suffixes = (*READ, *RECORDS, *PACKED)
    return is_there(line) or all(
        is_there(part) or part.lower().endswith(suffixes) for part in line.split()
    )


def read_list(path: str) -> list[str] | None:
    """The names in a .txt list: one a line, or several parted by white space.

    None if it is no list but a text: fewer than half of its first lines are names. Raises
    UserError where a list names what is not there.
    """
    files, name = file_system(path)
    content = retrying(path, files.cat_file, name)
    lines = content.decode(encoding_of(content), "replace").split("\n")
    lines = [line for line in (line.strip("\ufeff \t\r") for line in lines) if line]
    first_lines = lines[:LOOKED_AT]
    if 2 * sum(map(looks_like_names, first_lines)) < max(1, len(first_lines)):
        return None
    names = []
    for line in lines:
        parts = [line] if is_there(line) else line.split()  # a name may have spaces in it
        lost = [part for part in parts if not is_there(part)]
        if lost:
            raise UserError(
                f"no file matches {lost[0]} in {path}, which is read as a list of files, one a "
                f'line, and "{one_line(line, 60)}" is none'
            )
        names += parts
    return names


def may_hold_records(name: str) -> bool:
    """Whether a file of that name is none that holds one text."""
    return Path(name).suffix.lower() in (*RECORDS, *PACKED) or name.lower().endswith(TABLES)


def is_page(path: str) -> bool:
    """Whether it is the address of one text: a page, or a paper on arXiv."""
    if "://" not in path:
        return is_address(path)
    parts = urlsplit(path)
    return parts.scheme in ("http", "https") and not may_hold_records(parts.path)


def is_document(path: str) -> bool:
    """Whether a file or an address is one text, as a PDF is; else it holds records."""
    if is_address(path):
        return is_page(path)
    if may_hold_records(path):
        return False
    try:
        with Path(path).open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return True  # who reads it says why it cannot be read
    begins = head.lstrip(SPACE)
    if is_named(Path(path), READ):
        return not begins.startswith(b'{"')
    form = form_by(head, path)
    return not (form.is_parquet or form.compression or begins.startswith((b"{", b"[")))


def expand(path: str, output: Path | None = None, lists: tuple[str, ...] = ()) -> list[str]:
    """The files and addresses that a path, a folder, a glob, an address or a .txt list of such
    names; a name before a glob. Of a folder all that is read, less what is in `output`.

    Files are told by absolute names. `lists` are those in which the path was named. UserError.
    """
    is_local = not is_address(path)
    kind = kind_of(path) if is_local else ""
    if path.lower().endswith(".txt") and (kind == "file" or "://" in path):
        if path in lists:
            raise UserError(f"{path} is a list that names itself")
        names = read_list(path)
        if names is None:
            return [str(Path(path).absolute()) if is_local else path]
        return [file for name in names for file in expand(name, output, (*lists, path))]
    if is_page(path) or path.startswith("http"):
        return [path]
    if kind == "folder":
        return list(map(str, files_below(Path(path).absolute(), output, (*READ, *RECORDS))))
    if kind:
        check_kind(path, kind)
        return [str(Path(path).absolute())]
    files, name = file_system(path)
    details_by_match = retrying(path, lambda: files.glob(name, detail=True))
    matches = []
    for match in sorted(details_by_match):
        is_folder = details_by_match[match]["type"] == "directory"
        if is_folder or (is_local and kind_of(match) != "file"):
            warn(f"{match} is no file, passed over")
        else:
            matches.append(match)
    if not matches:
        raise UserError(f"no file matches {path}")
    return [files.unstrip_protocol(match).removeprefix("file://") for match in matches]


def check_kind(path: str, kind: str) -> None:
    """Raise UserError if a local path that is there leads to no file."""
    if kind == "link":
        raise UserError(f"no file matches {path}: it is a link that leads nowhere")
    if kind == "other":
        raise UserError(f"cannot read {path}: it is no regular file; save it to one first")
