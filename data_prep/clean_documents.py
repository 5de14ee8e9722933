"""Turn records into extracts: mend them, check them, decide the token window fast."""

import argparse
import ast
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import repeat
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from tokenizers import Tokenizer

from common.cli import UserError
from common.files import digest, share_of
from data_prep.read_blocks import subset_of

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
C0 = bytes({*range(32), 127} - {9, 10})
TAIL_HEADING = "(?:See also|References|External links|Further reading|Notes|Bibliography)[ \\t]*"
EMPTY_SECTIONS = [  # headings with another of their rank, or the end, right behind them
    (re.compile(pattern), rest)  # each begins with a character, which `re` finds fast
    for pattern, rest in (
        (rf"\n(?:{TAIL_HEADING}(?:\n\s*)?(?={TAIL_HEADING}(?:\n|\Z)|\Z))+", "\n"),
        (r"\n(?:(={2,6})[^=\n]+\1\s*(?=\1[^=]|\Z))+", "\n"),
        (r"(\\(?:sub)*section)\*?\{[^\n]*\}\s*(?=\1\*?\{|\Z)", ""),
    )
]
NOT_PROSE = re.compile(
    r"(?<!\\)%.*|\\begin\{(equation|align|eqnarray|gather|multline|figure|table|tabular|picture"
    r"|verbatim|lstlisting|thebibliography|tikzpicture)(\*?)\}(?s:.*?)\\end\{\1\2\}"
    r"|\$\$?[^$]*\$\$?|\\[a-zA-Z]+\*?(?:\[[^\]]*\]|\{[^{}]*\})*"
)
WORD = re.compile(r"[A-Za-z\xc0-\u1fff\u3040-\uffff]{2,}")  # ranges: twice as fast as \w
LEAST_PROSE = 0.25  # letters in prose, as a share of all characters but white space
PROBE = 'Two words, a (b) "c" 1 22 x. Y é ß 漢 字 -- ; \'s $x$ \\foo {a} _b_ 3.5 % end'
LONGEST_REMEMBERED, MOST_REMEMBERED = 40, 200_000  # characters, words: some 30 MB


def parse_meta(meta: object) -> dict:
    """RedPajama's meta, which is met as an object, as a JSON string and as a Python repr."""
    if isinstance(meta, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                meta = parse(meta)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    return meta if isinstance(meta, dict) else {}


def source_of(meta: dict) -> str:
    """The subset a record belongs to; Wikipedia's records carry no `source`."""
    if meta.get("source"):
        return str(meta["source"])
    if "arxiv_id" in meta:
        return "arxiv"
    return "stackexchange" if "question_score" in meta else "wikipedia"


def mend(text: str) -> tuple[str, list[str]]:
    """`text` without control characters and empty sections, and which of the two it had."""
    text, mended = text.replace("\r\n", "\n").replace("\x0c", "\n").replace("\r", "\n"), []
    raw = text.encode(errors="replace")  # bytes are searched ten times faster than patterns
    if b"\xc2" in raw or len(raw.translate(None, C0)) < len(raw):
        text, n = CONTROL.subn("", text)
        mended += ["control characters"] * bool(n)
    headed = text
    for pattern, rest in EMPTY_SECTIONS:
        text = pattern.sub(rest, text)
    mended += ["empty section"] * (text != headed)
    return text.strip(), mended


def has_prose(text: str) -> bool:
    """Whether enough of `text`, as it begins, is words, once LaTeX's formulas and such are out."""
    text = text[:8_000]
    prose = NOT_PROSE.sub(" ", text) if "\\" in text else text
    letters = sum(map(len, WORD.findall(prose)))
    return letters > LEAST_PROSE * len("".join(text.split()))


def to_document(record: dict) -> dict | str:
    """{id, source, url, text, mended} of a record, or the reason why it is left out."""
    meta = parse_meta(record.get("meta")) or {k: v for k, v in record.items() if k != "text"}
    if str(meta.get("language") or "en").lower() not in ("en", "english"):
        return "not English"
    text, mended = mend(record["text"])
    if not text:
        return "no text"
    source, url = source_of(meta), str(meta.get("url") or "")
    key = url or meta.get("arxiv_id") or meta.get("title") or text
    return {"id": digest(source, key), "source": source, "url": url, "text": text, "mended": mended}


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
    passages.append(passage)
    return [p for p in passages if low < size(p) < high]


class TokenCounter:
    """Counts tokens exactly as tokenizing the whole text would, an order of magnitude faster.

    A byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) first cuts the text into pieces
    and merges within them. Where each single space begins a piece, the counts of words add up, so
    that each word is tokenized once and then remembered. Other tokenizers are run on whole texts.
    """

    def __init__(self, tokenizer: Tokenizer):
        settings = json.loads(tokenizer.to_str())
        cutter, normalizer = tokenizer.pre_tokenizer, settings["normalizer"] or {"normalizers": []}
        starts = {start for _, (start, _) in cutter.pre_tokenize_str(PROBE)} if cutter else set()
        tokenizer.no_truncation()
        self.additive = (
            settings["model"]["type"] == "BPE"
            and {part["type"] for part in normalizer.get("normalizers", [normalizer])} <= {"NFC"}
            and starts >= {i for i, c in enumerate(PROBE) if c == " "}
            and not any(
                " " in added["content"] or added["lstrip"] or added["rstrip"]
                for added in settings["added_tokens"]
            )
        )
        self.tokenizer, self.known = tokenizer, {}
        self.longest = max(map(len, tokenizer.get_vocab()))

    def count(self, text: str, low: float = -1, high: float = math.inf) -> int | None:
        """The number of tokens if low < number < high, else None, mostly with no tokenizing."""
        if not self.additive:
            number = self._counts([text])[0]
            return number if low < number < high else None
        # A token covers a byte or more, of the text or of a space put before it, and at most the
        # longest one (NFC shortens at most fourfold); every word begins a token.
        if (text.isascii() and len(text) < low) or len(text) > 4 * self.longest * high:
            return None
        if high < math.inf and len(text.split(None, int(high))) >= high:
            return None
        first, *words = text.split(" ")
        new = [word for word in words if word not in self.known]
        # A space beside other white space may belong to the piece before it; no such word is known.
        if first[-1:].isspace() or any(word.strip() != word or not word for word in new):
            first, *words = re.split(r"(?<=\S) (?=\S)", text)
            new = [word for word in words if word not in self.known]
        sure = sum(map(self.known.get, words, repeat(0)))
        most = sum(len(word) * (1 if word.isascii() else 12) + 1 for word in [first, *new])
        if sure + len(new) >= high or sure + most <= low:
            return None
        fresh = list(set(new))
        begins, *found = self._counts([first, *(f" {word}" for word in fresh)])
        counts = dict(zip(fresh, found, strict=True))
        number = sure + begins + sum(map(counts.__getitem__, new))
        if len(self.known) > MOST_REMEMBERED:
            self.known.clear()
        plain = (w for w in counts if len(w) <= LONGEST_REMEMBERED and not w[-1].isspace())
        self.known |= {word: counts[word] for word in plain}
        return number if low < number < high else None

    def _counts(self, texts: list[str]) -> list[int]:
        found = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [len(encoding) for encoding in found]


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer from a model folder or from the Hub. Raises UserError."""
    try:
        local = Path(name) / "tokenizer.json"
        if local.exists():
            return Tokenizer.from_file(str(local))
        return Tokenizer.from_pretrained(name)
    except Exception:  # the tokenizers package raises plain Exception
        raise UserError(
            f"no tokenizer at {name}: not a folder with tokenizer.json, and not to be had from the "
            "Hub; pass --tokenizer FOLDER (`hf download NAME --local-dir FOLDER` makes one)"
        ) from None


@lru_cache
def load_counter(name: str) -> TokenCounter:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one core per task
    return TokenCounter(load_tokenizer(name))


class SelectExtracts(PipelineStep):
    """A datatrove step, documents in, extracts out; all dropped is counted, named source|row."""

    type, name = "FILTER", "extracts"

    def __init__(self, options: argparse.Namespace):
        super().__init__()
        self.options = options

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        counter = load_counter(self.options.tokenizer)
        for record in data:
            document = to_document(record.metadata)
            dropped = document if isinstance(document, str) else None
            source = subset_of(record.id) if dropped else document["source"]
            self.stat_update(f"{source}|documents read")
            if not dropped and self.options.sources and source not in self.options.sources:
                dropped = "other source"
            for what in () if dropped else document.pop("mended"):
                self.stat_update(f"{source}|mended: {what}")
            found = [] if dropped else list(select(document, counter, self.options))
            prose = [extract for extract in found if has_prose(extract["text"])]
            if dropped or not prose:
                reason = dropped or ("no prose" if found else "outside the windows")
                self.stat_update(f"{source}|dropped: {reason}")
            for extract in prose:
                order = digest(self.options.seed, extract["id"]) + digest(extract["text"])
                yield Document(
                    extract.pop("text"), extract.pop("id"), [], {**extract, "order": order}
                )


def select(document: dict, counter: TokenCounter, options: argparse.Namespace) -> Iterator[dict]:
    """Yield what of `document` falls into the training or the test window, with its `split`."""
    text, low, high = document["text"], options.min_tokens, options.max_tokens
    if not options.passages:
        if options.min_chars <= len(text) <= options.max_chars:
            yield {**document, "split": "test"}
        elif number := counter.count(text, low, high):
            yield {**document, "split": "train", "n_tokens": number}
        return
    split = "test" if share_of(document["id"], options.seed) < options.test_share else "train"
    window = (counter.count, low, high)
    if split == "test":
        window = (len, options.min_chars - 1, options.max_chars + 1)
    for number, passage in enumerate(cut_passages(text, *window)):
        yield {**document, "id": digest(document["id"], number), "text": passage, "split": split}
