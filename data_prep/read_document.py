"""The text of a file, a web page or a paper on arXiv; nothing in it is executed or fetched.

PDF and HTML are parsed in a process of their own (data_prep/parse_document.py), which is ended
where it takes too long or too much memory.
"""

import asyncio
import json
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.cli import UserError, one_line, warn
from data_prep import fetch_page
from data_prep.decode_text import decode_document, unread_format, without_commands
from data_prep.fetch_page import Page

MOST_SECONDS = 20  # to parse a document; its process is ended a little later
PARSER = (sys.executable, "-m", "data_prep.parse_document")
ROOT = Path(__file__).parents[1]
ARXIV = r"(?i)^(?:arxiv:|(?:https?://)?(?:\w+\.)?arxiv\.org/(?:abs|pdf)/)([\w./-]+?)(?:\.pdf)?$"
ADVICE = "save it as PDF or text"

HTML_TYPES = ("text/html", "application/xhtml+xml")
TEXT_TYPES = ("text/plain", "text/markdown", "text/x-markdown")
# What the suffix of a file says, as a server's header would.
SUFFIXES = dict.fromkeys((".html", ".htm", ".xhtml"), "text/html")
SUFFIXES |= dict.fromkeys((".md", ".markdown"), "text/markdown")

SPACE = re.compile(r"\s*")
PAGE = re.compile(r"(?i)[^a-z]{0,1000}<(!doctype html|html)\b")
TAG = re.compile(r"(?i)<(!doctype|/?[a-z][a-z0-9]*)[\s>/]")
# Of what a part of a page may begin with, as editors and mail programs write it.
FRAGMENT = re.compile(
    r"(?i)<(head|body|title|meta|link|style|script|main|article|section|header|nav|div|p|table"
    r"|h[1-6]|ul|ol|dl|blockquote|pre|span|font|center)(\s[^<>]*)?>"
)


@dataclass(frozen=True)
class Document:
    """A text, and what the reader of it should know, each in a line."""

    text: str
    notes: tuple[str, ...] = ()


def pdf_start(data: bytes) -> int:
    """Where a PDF begins, within the first 1,024 bytes as Acrobat takes it; -1 if it is none."""
    start = data[:1032].find(b"%PDF-")
    # A text about PDF names the mark too, but holds no objects.
    return start if start <= 0 or b"endobj" in data else -1


def page_start(text: str) -> int:
    """Where a page begins behind XML declarations, comments and white space."""
    start = SPACE.match(text).end()
    while text.startswith(("<?", "<!--"), start):
        closing = "?>" if text.startswith("<?", start) else "-->"
        end = text.find(closing, start)
        if end < 0:
            break
        start = SPACE.match(text, end + len(closing)).end()
    return start


def find_page(text: str, media_type: str) -> str | None:
    """The HTML in `text`, made a whole page of; None if it is no HTML."""
    start = page_start(text)
    beginning = text[start : start + 2000]
    if PAGE.match(beginning):
        return text[start:]
    if media_type in TEXT_TYPES:
        return None
    # A readme in Markdown may begin with a tag, but does not end with one too.
    fragment = FRAGMENT.match(beginning) and text[-200:].rstrip().endswith(">")
    if fragment or (media_type in HTML_TYPES and TAG.search(text)):
        return f"<html>\n{text[start:]}\n</html>"
    return None


def parse_apart(kind: str, data: bytes) -> Document:
    """What data_prep/parse_document.py makes of it. Raises UserError."""
    command = [*PARSER, kind, str(MOST_SECONDS)]
    too_long = f"reading it took over {MOST_SECONDS} s"
    try:
        ended = subprocess.run(
            command, input=data, stdout=subprocess.PIPE, cwd=ROOT, timeout=MOST_SECONDS + 3
        )
        if ended.returncode == -signal.SIGINT:  # Ctrl-C reaches it, though a worker ignores it
            raise KeyboardInterrupt
        result = json.loads(ended.stdout)
    except subprocess.TimeoutExpired:
        raise UserError(too_long) from None
    except ValueError:  # the system ended it, or the parser's own code failed
        raise UserError("its parser broke down on it, maybe for want of memory") from None
    if "error" in result:
        raise UserError(without_commands(result["error"]))
    notes = tuple(map(without_commands, result["notes"]))
    return Document(without_commands(result["text"]), notes)


def parse(page: Page) -> Document:
    """The text of a document by its bytes and what is said of them. Raises UserError."""
    data = page.body
    if len(data) > fetch_page.MOST_BYTES:
        raise UserError(f"it is over {fetch_page.MOST_BYTES // 10**6} MB")
    start = pdf_start(data)
    if start >= 0:
        return parse_apart("pdf", data[start:])
    if kind := unread_format(data):
        raise UserError(f"it is {kind}, which is not read; {ADVICE}")
    text, guessed = decode_document(data, page.charset)
    html = find_page(text, page.media_type)
    document = parse_apart("html", html.encode()) if html else Document(text)
    if not document.text.strip():
        raise UserError("no text in it")
    note = f"nothing says its encoding; it is read as {guessed}"
    return Document(document.text, document.notes + ((note,) if guessed else ()))


def is_address(source: str) -> bool:
    return "://" in source or bool(re.match(ARXIV, source))


def load(source: str, private: bool = False) -> Document:
    """The document at a path or an address. Raises UserError, in one line that names it."""
    url = re.sub(ARXIV, r"https://arxiv.org/pdf/\1", source)
    try:
        if "://" in url:
            return parse(asyncio.run(fetch_page.fetch(url, private)))
        with Path(url).open("rb") as file:
            data = file.read(fetch_page.MOST_BYTES + 1)
        return parse(Page(data, SUFFIXES.get(Path(url).suffix.lower(), "")))
    except Exception as error:  # what network, disk and parsers raise is of many kinds
        no_end = f"no end in {fetch_page.MOST_SECONDS} s"
        reason = getattr(error, "strerror", "") or one_line(error) or no_end
        advice = "" if ADVICE in reason else "; check it, or save it as text"
        name = "stdin" if source == "/dev/stdin" else one_line(without_commands(source), 1000)
        raise UserError(f"cannot read {name}: {reason}{advice}") from None


def read_document(source: str, private: bool = False) -> str:
    """Raises UserError; `private` allows addresses of the machine's own network."""
    document = load(source, private)
    for note in document.notes:
        warn(f"{one_line(without_commands(source), 1000)}: {note}")
    return document.text
