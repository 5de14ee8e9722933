"""Bytes to text: what format they are of, in which encoding, and what of it may be shown."""

import codecs
import re
from contextlib import suppress

from charset_normalizer import from_bytes

from common.cli import UserError
from common.text import BYTE_ORDER_MARKS

SAMPLE = 100_000  # bytes or characters that are looked at where all of them would take long
NOT_TEXT = "it is neither text nor HTML nor PDF"

# What a file that is not read begins with.
FORMATS = {
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "an RTF document",
    b"%!PS": "a PostScript file",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"II*\0": "an image",
    b"MM\0*": "an image",
    b"AT&TFORM": "a DjVu document",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"SQLite format 3": "a database",
    b"PAR1": "a Parquet file",
    b"\x7fELF": "a program",
    b"ID3": "a sound",
    b"OggS": "a sound",
    b"fLaC": "a sound",
    b"\x00\x05\x16\x07": "a side file of macOS, with no text of its own",
}
# What the archive inside such a document names.
ZIPPED = {
    b"mimetypeapplication/epub+zip": "an EPUB book",
    b"mimetypeapplication/vnd.oasis.opendocument": "an OpenDocument file",
    b"word/": "a Word document",
    b"xl/": "an Excel workbook",
    b"ppt/": "a PowerPoint presentation",
}

MARKS = {codecs.BOM_UTF8: "utf-8"} | BYTE_ORDER_MARKS
# The labels that browsers read as a larger encoding (WHATWG, Encoding Standard, 4.2).
LARGER = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
NO_CHARSETS = {"idna", "punycode", "unicode_escape", "raw_unicode_escape", "undefined", "utf-7"}
PAGE = re.compile(rb"(?i)[^a-z]{0,1000}<(!doctype html|html)\b")
META = re.compile(rb"(?i)<meta\s[^>]{0,300}?charset\s*=\s*[\"']?\s*([\w.:-]+)")
XML = re.compile(rb"(?i)\s*<\?xml\s[^>]{0,300}?encoding\s*=\s*[\"']([\w.:-]+)")

TERMINAL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[^\n]\x08")
LINE_END = re.compile("\r(?!\n)|[\x0b\x0c\x85]")
# Controls, overrides of the direction of writing, byte order marks, what is no character.
HIDDEN = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
NO_LETTER = re.compile("[\0-\x06\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffd]")
SURROGATE = re.compile("[\ud800-\udfff]")


def unread_format(data: bytes) -> str:
    """What a document is whose format is not read, "" if it may be text."""
    if data.startswith(b"PK\x03\x04"):
        kinds = [kind for mark, kind in ZIPPED.items() if mark in data]
        return kinds[0] if kinds else "a zip archive"
    if (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or data[4:12] in (b"ftypheic", b"ftypavif"):
        return "an image"
    if data[60:68] == b"BOOKMOBI":
        return "a Mobipocket book"
    if data[4:8] == b"ftyp":
        return "a video or a sound"
    return next((kind for mark, kind in FORMATS.items() if data.startswith(mark)), "")


def charset_of(label: str | None) -> str | None:
    """Python's name of the encoding that a header or a page declares; None if there is none."""
    with suppress(LookupError, ValueError):
        codec = codecs.lookup((label or "").strip(" \t\"';"))
        if codec._is_text_encoding and codec.name not in NO_CHARSETS:
            return LARGER.get(codec.name, codec.name)
    return None


def declared_in(data: bytes) -> str | None:
    """The encoding that a page names in its first bytes; they can be read, so it is no UTF-16."""
    match = XML.match(data[:1000]) or META.search(data[:4096])
    charset = charset_of(match[1].decode("ascii", "ignore")) if match else None
    return None if charset and charset.startswith(("utf-16", "utf-32")) else charset


def wide_charset(data: bytes) -> str | None:
    """The encoding of text in two or four bytes a letter without a mark, told by where NULs are."""
    sample = data[: SAMPLE // 4 * 4]
    nuls = [sample[i::4].count(0) / max(1, len(sample[i::4])) for i in range(4)]
    if min(nuls[2:]) > 0.9 and nuls[0] < 0.1:
        return "utf-32-le"
    if min(nuls[:2]) > 0.9 and nuls[3] < 0.1:
        return "utf-32-be"
    even, odd = (nuls[0] + nuls[2]) / 2, (nuls[1] + nuls[3]) / 2
    if odd > 0.3 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.3 and odd < 0.05 else None


def decode_utf8(data: bytes) -> str | None:
    """The text if it is UTF-8, but for a letter cut at its end or a few broken ones; else None."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        pass
    with suppress(UnicodeDecodeError):
        return data.decode("utf-8", "surrogatepass")  # an emoji as Java and Oracle write it
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    whole = sum(len(part) for part in re.findall("[^\0-\x7f\ufffd]+", text))
    if text.endswith("\ufffd") and broken == 1 and whole:
        return text[:-1]
    return text if whole >= 4 * broken else None


def guess(data: bytes) -> str | None:
    """The likeliest encoding of text in one byte a letter, or in an Asian one; None if of none."""
    sample = data[:SAMPLE]
    matches = from_bytes(sample)
    best = matches.best()
    likely = {name for match in matches for name in match.could_be_from_charset}
    # Where few letters are beyond ASCII, many encodings fit: Western Europe's comes first, unless
    # the package knows the language (coherence) and it is written in another.
    few = sum(byte > 127 for byte in sample) < 0.3 * len(sample)
    if few and (not best or best.coherence < 0.3 or "cp1252" in likely):
        with suppress(UnicodeDecodeError):
            data.decode("cp1252")
            return "cp1252"
    return best.encoding if best else None


def decode_document(data: bytes, declared: str | None = None) -> tuple[str, str | None]:
    """(text, the encoding where it was guessed). `declared` is the label of a header, if any.

    Raises UserError if it is no text. Marks come first, then UTF-8, which nothing else looks
    like, then what a header or the page declares, then a guess.
    """
    text, guessed = None, None
    mark = next((mark for mark in MARKS if data.startswith(mark)), None)
    wide = wide_charset(data) if b"\0" in data[:SAMPLE] else None
    charset = charset_of(declared)
    is_page = bool(PAGE.match(data[:2000]))
    if is_page and not wide:  # browsers pass over the NULs of a page, and over what is broken
        data = data.replace(b"\0", b"")
    if mark:
        text = data[len(mark) :].decode(MARKS[mark], "replace")
    elif wide or (charset and charset.startswith(("utf-16", "utf-32"))):
        text = data.decode(wide or charset, "replace")
    elif re.search(rb"\x1b\$[@B]", data[:SAMPLE]) and data.isascii():
        text = data.decode("iso2022_jp", "replace")
    else:
        text = decode_utf8(data)
    for name in (charset, declared_in(data)):
        if text is None and name:
            with suppress(UnicodeDecodeError):
                text = data.decode(name)
    if text is None and b"\0" not in data and (guessed := guess(data)):
        text = data.decode(guessed, "replace")
    if text is None and is_page:
        text = data.decode("cp1252", "replace")
    if text is None or not is_plausible(text):
        raise UserError(NOT_TEXT)
    return without_commands(text), guessed


def is_plausible(text: str) -> bool:
    """Whether what was decoded is text: it has no NUL, and hardly a control or a broken letter."""
    sample = text[:SAMPLE]
    return "\0" not in text and 10 * len(NO_LETTER.findall(sample)) <= len(sample)


def without_commands(text: str) -> str:
    """`text` less what a terminal or a reader takes for a command; ordinary text stays as it is."""
    if SURROGATE.search(text):  # two halves make a letter, a half alone none
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    if "\x1b" in text or "\x08" in text:
        text = TERMINAL.sub("", text)
    return HIDDEN.sub("", LINE_END.sub("\n", text))
