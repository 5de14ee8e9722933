"""Turn a record into the extracts in it, clean and of a known source, and tell repeated ones."""

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

import numpy as np
import orjson
import xxhash

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
RUN = 13  # words; the n-gram by which GPT-3 was cleared of its test sets (Brown et al., 2020)
SHINGLE, BANDS, ROWS = 5, 14, 8  # datatrove's MinHash settings: a Jaccard index over about 0.75
FACTORS, TERMS = np.random.default_rng(1).integers(0, 1 << 63, (2, BANDS * ROWS), np.uint64)


def meta_of(record: dict) -> dict:
    """RedPajama's meta, an object, JSON or a Python repr; else the fields beside the text."""
    meta, others = record.get("meta"), {k: v for k, v in record.items() if k != "text"}
    if isinstance(meta, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            meta = ast.literal_eval(meta)  # which reads its JSON as well
    return meta if meta and isinstance(meta, dict) else others


def clean(text: str) -> str:
    """`text` with plain line ends and without control characters and empty sections."""
    text = CONTROL.sub("", text.replace("\r\n", "\n").replace("\x0c", "\n").replace("\r", "\n"))
    for pattern, rest in EMPTY_SECTIONS.items():
        text = re.sub(pattern, rest, text)
    return text.strip()


def has_prose(text: str) -> bool:
    """Whether a fourth of `text` is words; Gopher's rule (Rae et al., 2021) passes bare LaTeX."""
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
        is_test = options.min_chars <= len(text) <= options.max_chars
        if is_test or low < size(text) < high:
            yield document | {"split": "test" if is_test else "train"}
        return
    split = "test" if share_of(document["id"], options.seed) < 0.3 else "train"
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
    url, source = str(meta.get("url") or ""), str(meta.get("source") or options.source_name)
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


def ngrams(text: str, n: int) -> np.ndarray:
    """64-bit hashes of all runs of `n` lower-cased words, in order; of all words if fewer."""
    words = re.findall(r"\w+", text.lower()) or [text]
    hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)
    found = np.zeros(max(1, len(hashes) - n + 1), np.uint64)
    for i in range(min(n, len(hashes))):
        found = found * np.uint64(0x9E3779B97F4A7C15) + hashes[i : i + len(found)]
    return found ^ (found >> np.uint64(31))


class Duplicates:
    """Near duplicates of what was kept, by MinHash (Broder, 1997), and passages of test texts."""

    def __init__(self):
        self.marks, self.test_runs = set(), set()

    def reason(self, extract: dict) -> str | None:
        """Why not to keep an extract; if there is no reason, it counts as kept from then on."""
        runs = ngrams(extract["text"], RUN).tolist()
        if extract["split"] == "train" and not self.test_runs.isdisjoint(runs):
            return "shares a run of words with a test document"
        hashes = ngrams(extract["text"], SHINGLE)[:, None] * (FACTORS | np.uint64(1)) + TERMS
        bands = map(np.ndarray.tobytes, hashes.min(axis=0).reshape(BANDS, ROWS))
        marks = {extract["id"], *enumerate(bands)}
        if not self.marks.isdisjoint(marks):
            return "near duplicate"
        self.marks |= marks
        if extract["split"] == "test":
            self.test_runs.update(runs)
        return None
