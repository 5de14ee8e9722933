"""The text of a PDF or a web page, in a process of its own that may be stopped.

Parsers of such formats can be made to run without end, or to fill the memory, by a small file. This
one reads the document from stdin and writes {"text", "notes"} or {"error"} as JSON to stdout; it is
started by data_prep/read_document.py, which waits for it no longer than told, and imports little.

    python -m data_prep.parse_document pdf 20 < paper.pdf
"""

import json
import logging
import re
import resource
import signal
import sys
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from unicodedata import normalize

from common.cli import UserError, one_line, positive, script_parser

MOST_MEMORY = 2**30  # bytes of address space
MOST_CHARS = 20_000_000
FEWEST_CHARS = 60  # of a page; less is a login or an error
TOO_MUCH_MEMORY = f"reading it took over {MOST_MEMORY >> 30} GiB"

LIGATURES = {code: normalize("NFKC", chr(code)) for code in range(0xFB00, 0xFB07)}  # ff to st
BROKEN_WORD = re.compile("(?<=([^\\W\\d_]))[-\u00ad\u2010]\n(?=([^\\W\\d_]))")  # melt-\ning
CATALOG = re.compile(rb"(\d{1,9}) 0 obj\s*<<[^>]{0,300}?/Type\s*/Catalog\b")
NUMBER = re.compile(r"\d+")
FEW_LINES = 5  # of a page that is a slide or a form, of which no line is taken for a header
NO_LETTER = re.compile("[\0-\x08\x0e-\x1f\ufffd\ue000-\uf8ff]")


class TimeIsUp(BaseException):
    """Raised by the clock wherever the parser is; no `except Exception` of its own holds it."""


def set_limits(seconds: int) -> None:
    """Bound memory and processor time, as far as the system lets us (macOS bounds no memory)."""
    limits = {
        resource.RLIMIT_AS: MOST_MEMORY,
        resource.RLIMIT_CPU: seconds + 5,
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        with suppress(ValueError, OSError):
            _, hard = resource.getrlimit(what)
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(what, (most, hard))


def join_words(text: str) -> str:
    """A PDF's text with its ligatures as letters, and the words that a line's end broke whole."""
    text = text.translate(LIGATURES)
    return BROKEN_WORD.sub(lambda m: "" if m[1].islower() and m[2].islower() else m[0], text)


def without_edges(pages: list[str]) -> list[str]:
    """The pages without a first or last line that two of five have, but for its numbers: a header,
    a footer, a page number. They would stand in the middle of sentences."""
    edges_by_page: list[set[str]] = []
    for page in pages:
        lines = page.strip().splitlines()
        edges_by_page.append({lines[0], lines[-1]} if len(lines) > FEW_LINES else set())
    counts = Counter()
    for edges in edges_by_page:
        counts.update({NUMBER.sub("0", edge) for edge in edges})
    rest = []
    for page, edges in zip(pages, edges_by_page, strict=True):
        for edge in edges:
            number = counts[NUMBER.sub("0", edge)]
            if number > 2 and number >= 0.4 * len(pages):
                page = page.strip().removeprefix(f"{edge}\n").removesuffix(f"\n{edge}")
        rest.append(page)
    return rest


def reason_of(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return TOO_MUCH_MEMORY
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return one_line(error, 100) or type(error).__name__


def read_pages(reader, seconds: int) -> tuple[list[str], list[str]]:
    """(texts of the pages that can be read, notes on the others). Raises UserError."""
    from tqdm import tqdm

    texts: list[str] = []
    failures: dict[int, str] = {}
    n_chars, stopped = 0, ""
    try:
        n_pages = len(reader.pages)
        often = 0.1 if sys.stderr.isatty() else 10  # seconds between two lines
        how = {"unit": "page", "delay": 2, "mininterval": often, "leave": False}
        bar = tqdm(reader.pages, "reading", **how)
        for number, page in enumerate(bar, 1):
            try:
                texts.append(page.extract_text())
            except Exception as error:  # what pypdf raises is of many kinds
                failures[number] = reason_of(error)
                continue
            n_chars += len(texts[-1])
            if n_chars > MOST_CHARS:
                stopped = f"its text is over {MOST_CHARS:,} characters"
                break
    except TimeIsUp:
        stopped = f"reading it took over {seconds} s"
    signal.setitimer(signal.ITIMER_REAL, 0)
    if not "".join(texts).strip() and (stopped or failures):
        raise UserError(stopped or f"its pages cannot be read ({next(iter(failures.values()))})")
    notes = []
    if stopped:
        done = len(texts) + len(failures)
        notes.append(f"{stopped}; pages 1 to {done:,} of {n_pages:,} are taken")
    if failures:
        number, reason = next(iter(failures.items()))
        which = f"{len(failures)} of {n_pages:,} pages cannot be read and are left out"
        notes.append(f"{which}, the first is page {number} ({reason})")
    return texts, notes


def open_pdf(data: bytes):
    """A reader, also of a file whose end is missing. Raises UserError, and what pypdf raises."""
    from pypdf import PdfReader
    from pypdf.errors import PdfReadError

    try:
        return PdfReader(BytesIO(data))
    except PdfReadError:
        catalog = CATALOG.search(data)
        if not catalog:
            raise
    # With a trailer, and a table that is not where it says, pypdf looks for the objects itself.
    trailer = b"\ntrailer\n<< /Root %b 0 R /Size 1 >>\nstartxref\n0\n%%%%EOF\n" % catalog[1]
    return PdfReader(BytesIO(data + trailer))


def parse_pdf(data: bytes, seconds: int) -> dict:
    from pypdf.errors import FileNotDecryptedError, PyPdfError

    is_cut = b"%%EOF" not in data.rstrip(b"\0 \r\n")[-2048:]
    notes = ["its end is missing, so there may be more of it"] if is_cut else []
    try:
        texts, more = read_pages(open_pdf(data), seconds)
    except FileNotDecryptedError:
        raise UserError("it is locked with a password; save it without one") from None
    except PyPdfError as error:
        if is_cut:
            raise UserError("it is cut: the end of the PDF is missing") from None
        raise UserError(f"it is a faulty PDF ({one_line(error, 100)})") from None
    text = join_words("\n".join(without_edges(without_edges(texts)))).replace("\0", "\ufffd")
    letters = len(text) - sum(map(text.count, " \n"))
    if not letters:
        raise UserError(
            f"no text in it; its pages, {len(texts)}, are pictures (a scan without OCR?)"
        )
    if len(NO_LETTER.findall(text)) > 0.3 * letters:
        raise UserError("its fonts do not tell which letters they draw; it needs OCR")
    empty = sum(not page.strip() for page in texts)
    if empty > len(texts) / 2:
        more.append(f"{empty} of {len(texts):,} pages hold no text (scans without OCR?)")
    return {"text": text, "notes": notes + more}


def memory_used() -> int:
    """The most bytes that this process held; 0 where the system does not tell. What getrusage
    tells is of the process that started this one, too."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return int(match[1]) * 1024 if match else 0


def parse_html(data: bytes, _: int) -> dict:
    from trafilatura import extract

    text = extract(data.decode(), include_comments=False, favor_precision=True) or ""
    if len(text) < FEWEST_CHARS:
        if memory_used() > MOST_MEMORY / 2:  # trafilatura says nothing when lxml has no memory left
            raise MemoryError
        raise UserError("no text in it (a page that wants a login?)")
    return {"text": text[:MOST_CHARS], "notes": []}


def time_is_up(*_: object) -> None:
    raise TimeIsUp


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("kind", choices=("pdf", "html"), help="of the document on stdin")
    parser.add_argument("seconds", type=positive, help="that it may take")
    args = parser.parse_args()
    kind, seconds = args.kind, args.seconds
    sys.excepthook = lambda *_: None  # the parent tells it in a line
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    logging.disable()
    set_limits(seconds)
    try:
        data = sys.stdin.buffer.read()
        if kind == "pdf":
            signal.signal(signal.SIGALRM, time_is_up)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        result = {"pdf": parse_pdf, "html": parse_html}[kind](data, seconds)
    except TimeIsUp:
        result = {"error": f"reading it took over {seconds} s"}
    except Exception as error:  # what parsers raise is of many kinds
        result = {"error": reason_of(error)}
    sys.stdout.buffer.write(json.dumps(result).encode())


if __name__ == "__main__":
    main()
