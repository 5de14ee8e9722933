"""Turn a record into a clean document of a known source, and that into its extracts."""

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import orjson

from common.files import digest, share_of
from data_prep.count_tokens import load_counter

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
TAIL_HEADING = "(?:See also|References|External links|Further reading|Notes|Bibliography)[ \\t]*"
EMPTY_SECTIONS = {  # headings with another of their rank, or the end, right behind them
    rf"\n(?:{TAIL_HEADING}(?:\n\s*)?(?={TAIL_HEADING}(?:\n|\Z)|\Z))+": "\n",
    r"\n(?:(={2,6})[^=\n]+\1\s*(?=\1[^=]|\Z))+": "\n",
    r"(\\(?:sub)*section)\*?\{[^\n]*\}\s*(?=\1\*?\{|\Z)": "",
}
NOT_PROSE = re.compile(
    r"(?<!\\)%.*|\\begin\{(equation|align|eqnarray|gather|multline|figure|table|tabular|picture"
    r"|verbatim|lstlisting|thebibliography|tikzpicture)(\*?)\}(?s:.*?)\\end\{\1\2\}"
    r"|\$\$?[^$]*\$\$?|\\[a-zA-Z]+\*?(?:\[[^\]]*\]|\{[^{}]*\})*"
)
WORD = re.compile(r"[A-Za-z\xc0-\u1fff\u3040-\uffff]{2,}")  # ranges: twice as fast as \w
WIKIPEDIA = re.compile(r"https?://[a-z-]+\.wikipedia\.org/")
TEST_SHARE = 0.3  # of the documents, with --passages


def meta_of(record: dict) -> dict:
    """RedPajama's meta, an object, JSON or a Python repr; else the fields beside the text."""
    meta, others = record.get("meta"), {k: v for k, v in record.items() if k != "text"}
    if isinstance(meta, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            meta = ast.literal_eval(meta)  # which reads its JSON as well
    return meta if meta and isinstance(meta, dict) else others


def clean(text: str) -> str:
    """`text` with plain line ends and without control characters and empty sections."""
    text = text.replace("\r\n", "\n").replace("\x0c", "\n").replace("\r", "\n")
    text = CONTROL.sub("", text)
    for pattern, rest in EMPTY_SECTIONS.items():
        text = re.sub(pattern, rest, text)
    return text.strip()


def has_prose(text: str) -> bool:
    """Whether enough of `text`, as it begins, is words, once LaTeX's formulas and such are out.

    Stands in for Gopher's rule that 80% of the words hold a letter (Rae et al., 2021, appendix A),
    which a paper of nothing but LaTeX commands and a table of numbers under words both pass.
    """
    text = text[:8_000]
    prose = NOT_PROSE.sub(" ", text) if "\\" in text else text
    letters = sum(map(len, WORD.findall(prose)))
    return letters > 0.25 * len("".join(text.split()))


def cut_passages(text: str, size: Callable[[str], int], low: int, high: int) -> list[str]:
    """Cut `text` at blank lines into passages with low < size(passage) < high, in order."""
    passages, passage = [], ""
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        longer = f"{passage}\n\n{paragraph}" if passage else paragraph
        if size(longer) < high:
            passage = longer
        else:
            passages.append(passage)
            passage = paragraph
    return [p for p in [*passages, passage] if low < size(p) < high]


def windows_of(document: dict, options: argparse.Namespace) -> Iterator[dict]:
    """Yield what of a document falls into the training or the test window, with its `split`."""
    text, low, high = document["text"], options.min_tokens, options.max_tokens
    size = partial(load_counter(options.tokenizer).count, enough=high)
    if not options.passages:
        if options.min_chars <= len(text) <= options.max_chars:
            yield document | {"split": "test"}
        elif low < size(text) < high:
            yield document | {"split": "train"}
        return
    split = "test" if share_of(document["id"], options.seed) < TEST_SHARE else "train"
    if split == "test":
        size, low, high = len, options.min_chars - 1, options.max_chars + 1
    # The first passage tends to sum the document up already, so that its first sentence answers.
    for number, passage in list(enumerate(cut_passages(text, size, low, high)))[1:]:
        yield document | {"id": digest(document["id"], number), "text": passage, "split": split}


def select(line: bytes | str | dict, options: argparse.Namespace) -> list[dict]:
    """The candidates in a line or row, or {source, order, dropped: why}."""
    try:
        record = line if isinstance(line, dict) else orjson.loads(line)
    except orjson.JSONDecodeError:
        record = None
    record, found = record if isinstance(record, dict) else {}, []
    text, meta = record.get("text"), meta_of(record)
    url, source = str(meta.get("url") or ""), meta.get("source") or options.source_name
    if not meta.get("source") and meta.get("title") and WIKIPEDIA.match(url):
        source = "wikipedia"  # RedPajama's rows of it carry no `source`
    if not isinstance(text, str):
        reason = "not JSON with a text"
    elif str(meta.get("language") or "en").lower() not in ("en", "english"):
        reason = "not English"
    elif not (text := clean(text)):
        reason = "no text"
    else:
        key = url or meta.get("arxiv_id") or meta.get("title") or text
        document = {"id": digest(source, key), "source": source, "url": url, "text": text}
        inside = list(windows_of(document, options))
        reason = "no prose" if inside else "outside the windows"
        found = [extract for extract in inside if has_prose(extract["text"])]
    for one in found:
        order = digest(options.seed, one["id"]) + digest(one["text"])
        one["order"] = f"{one['split']} {order}"  # test first, for long documents are the rarer
    return found or [{"source": source, "order": "", "dropped": reason}]
