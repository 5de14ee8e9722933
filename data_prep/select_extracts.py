"""Turn a record into the extracts in it, clean and of a known source, and tell repeated ones."""

import ast
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
import orjson
import xxhash

from common.files import digest, share_of
from common.text import decode, whole
from data_prep.count_tokens import load_counter
from data_prep.cut_text import cut_text

TEXT_FIELDS = ("text", "raw_content")  # RedPajama's and RedPajama-V2's; the first that is there
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
# "en", "eng", "English", "en-US", "eng_Latn", "English (UK)", fastText's "__label__en"
ENGLISH = re.compile(r"(?:__label__)?en(?:g|glish)?(?:[^a-z].*)?", re.IGNORECASE | re.DOTALL)
RED_PAJAMA_SOURCES = ("arxiv", "wikipedia", "stackexchange")  # of which a key is of one document
MOST_REPR = 10_000  # characters of a meta that is parsed as Python, which recurses
TEST_SHARE = 0.3  # of documents that are fit for testing and for training
MOST_CHARS_A_TOKEN = 8  # prose has 3 to 6
OWN_TEST_SHARE = 0.2  # of one's own documents, whose windows for both are alike
RUN = 13  # words; the n-gram by which GPT-3 was cleared of its test sets (Brown et al., 2020)
SHINGLE, BANDS, ROWS = 5, 14, 8  # datatrove's MinHash settings: a Jaccard index over about 0.75
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: Knuth's for hashing
FACTORS, TERMS = np.random.default_rng(1).integers(0, 1 << 63, (2, BANDS * ROWS), np.uint64)


@dataclass(frozen=True)
class Windows:
    """What of a document is taken: for training more than `min_tokens` and fewer than `max_tokens`
    of the `tokenizer`, for testing from `min_chars` to `max_chars`; the document whole, its
    `passages`, or passages of what is longer alone (`cut_longer`)."""

    tokenizer: str
    min_tokens: int
    max_tokens: int
    min_chars: int
    max_chars: int
    passages: bool
    cut_longer: bool
    source_name: str  # of records that name no source
    text_field: str | None  # None: the first of TEXT_FIELDS that a record has
    seed: int  # of splits and orders


def parse_line(line: bytes | str) -> object:
    """What a line of JSON holds, None if it is no JSON.

    NaN, half a surrogate pair, numbers beyond 64 bits and bytes that are no UTF-8 are read as well.
    """
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        text = decode(line) if isinstance(line, bytes) else line
    try:
        return json.loads(text.strip("\0\ufeff \t\r\n"), parse_int=float)
    except (ValueError, RecursionError):
        return None


def parse_meta(text: str) -> object:
    """A meta written as JSON or as a Python repr ({'url': None}); None of another string."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    if len(text) > MOST_REPR:
        return None
    with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return None


def as_text(value: object) -> object:
    """A Parquet field of bytes as text; any other as it is."""
    return decode(value) if isinstance(value, bytes) else value


def meta_of(record: dict) -> dict:
    """RedPajama's meta, an object, JSON or a Python repr; else the fields beside the text."""
    meta = as_text(record.get("meta"))
    if isinstance(meta, str):
        meta = parse_meta(meta)
    with suppress(TypeError, ValueError):
        meta = dict(meta)  # of Parquet's maps, which are lists of pairs, too
    if not meta or not isinstance(meta, dict):
        meta = {name: value for name, value in record.items() if name not in ("text", "meta")}
    return {name: as_text(value) for name, value in meta.items()}


def string_of(value: object) -> str:
    """A field as a string, empty if it is, or if it is nested too deeply to be written."""
    with suppress(RecursionError):
        return str(as_text(value) or "")
    return ""


def is_english(language: object) -> bool:
    """Whether a record says it is English, and nothing else beside it; so it is if it says none."""
    languages = language if isinstance(language, list | tuple) else [language]
    named = [string_of(one).strip() for one in languages if one == one]  # NaN: an empty cell
    return all(ENGLISH.fullmatch(name) for name in named if name)


def clean_document(text: str) -> str:
    """`text` with plain line ends and without control characters and empty sections."""
    text = whole(text)
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


def cut_evenly(text: str, size: Callable[[str], int], low: int, high: int) -> list[str]:
    """`text` if low < size(text) < high; if it is longer, parts of much the same size, in order.

    `size` may stop counting at `high`.
    """
    if size(text) < high:
        return [text] if low < size(text) else []
    parts = [part.text.strip() for part in cut_text(text, size, high - 1)]
    return [part for part in parts if low < size(part) < high]


def windows_overlap(windows: Windows) -> bool:
    """Whether a document may be in both windows, of which one is in tokens and one in characters.

    A document is in both if it has more than `min_tokens` and fewer than `max_tokens` tokens and
    from `min_chars` to `max_chars` characters. No prose has 8 characters a token: where a document
    of `max_tokens` had not even so `min_chars` characters, none is taken to be in both, and what
    has the characters is for testing, its tokens uncounted. 1800 tokens and 16,000 characters, the
    defaults, do not overlap; 15,000 tokens and 16,000 characters do.
    """
    return MOST_CHARS_A_TOKEN * windows.max_tokens > windows.min_chars


def windows_of(document: dict, share: float, windows: Windows) -> Iterator[dict]:
    """Yield what of a document falls into the training or the test window, with its `split`.

    `share`, a number in [0, 1) that is the document's own, draws the split of one that is fit for
    both: of a document in both windows, and of any that is cut into passages.
    """
    if windows.passages:
        yield from passages_of(document, share, windows)
    elif windows.cut_longer:
        yield from parts_of(document, share, windows)
    else:
        split = split_of_whole(document["text"], share, windows)
        if split:
            yield document | {"split": split}


def split_of_whole(text: str, share: float, windows: Windows) -> str | None:
    """The split that a whole document is fit for; None if it is too short or too long."""
    low, high = windows.min_tokens, windows.max_tokens
    is_test = windows.min_chars <= len(text) <= windows.max_chars
    is_train = False
    if not is_test or windows_overlap(windows):  # counting tokens is what takes time
        is_train = low < load_counter(windows.tokenizer).count(text, enough=high) < high
    if is_test and is_train:
        return "test" if share < TEST_SHARE else "train"
    if is_test:
        return "test"
    return "train" if is_train else None


def passages_of(document: dict, share: float, windows: Windows) -> Iterator[dict]:
    """Yield the passages of a document that lie in its split's window, but for the first: it tends
    to sum the document up already, so that its first sentence would be the answer."""
    if share < TEST_SHARE:
        split, size = "test", len
        low, high = windows.min_chars - 1, windows.max_chars + 1
    else:
        split, low, high = "train", windows.min_tokens, windows.max_tokens
        size = partial(load_counter(windows.tokenizer).count, enough=high)
    passages = cut_passages(document["text"], size, low, high)
    for number, passage in enumerate(passages[1:], 1):
        yield document | {"id": digest(document["id"], number), "text": passage, "split": split}


def parts_of(document: dict, share: float, windows: Windows) -> Iterator[dict]:
    """Yield a document that lies in a window, or the parts of a longer one, all in one split.

    Its first part is among them, for in use a document is read from its beginning. What is too
    short for the split that `share` draws may be long enough for the other.
    """
    high = windows.max_tokens
    count = partial(load_counter(windows.tokenizer).count, enough=high)
    for_testing = ("test", len, windows.min_chars - 1, windows.max_chars + 1)
    for_training = ("train", count, windows.min_tokens, high)
    is_drawn = share < OWN_TEST_SHARE
    both = (for_testing, for_training) if is_drawn else (for_training, for_testing)
    for split, size, low, high in both:
        parts = cut_evenly(document["text"], size, low, high)
        for number, part in enumerate(parts):
            key = document["id"] if len(parts) == 1 else digest(document["id"], number)
            yield document | {"id": key, "text": part, "split": split}
        if parts:
            return


def to_document(text: str, meta: dict, source_name: str) -> tuple[dict, str]:
    """({id, source, url, text}, what draws its split).

    The id is RedPajama's key: the URL, arXiv's id, or the title. Outside RedPajama texts may share
    one (a site's URL, a book's title): the text draws the split there, and whoever chooses among
    the documents gives a second one of the same id an id of its own.
    """
    url, source = string_of(meta.get("url")), string_of(meta.get("source")) or source_name
    if not meta.get("source") and meta.get("title") and WIKIPEDIA.match(url):
        source = "wikipedia"  # RedPajama's rows of it carry no `source`
    source = " ".join(source.split())
    key = url or string_of(meta.get("arxiv_id")) or string_of(meta.get("title")) or text
    document = {"id": digest(source, key), "source": source, "url": url, "text": text}
    is_its_own = source in RED_PAJAMA_SOURCES or key is text
    return document, document["id"] if is_its_own else digest(document["id"], text)


def select(line: bytes | str | dict, windows: Windows, share: float | None = None) -> list[dict]:
    """The candidates in a line or row, or {source, order, dropped: why}; of a blank line none.

    A record that lacks a text tells its `fields` instead. `share`, in [0, 1), draws the split; by
    default the document's id does.
    """
    record = line if isinstance(line, dict) else parse_line(line)
    if record is None and isinstance(line, bytes):
        # Raw control characters are not in JSON: \r is the only line end of an old Mac's file.
        pieces = [piece for piece in line.split(b"\r") if piece.strip(b"\0 \t\r\n")]
        if len(pieces) != 1:
            return [candidate for piece in pieces for candidate in select(piece, windows)]
    return select_of_record(record if isinstance(record, dict) else {}, windows, share)


def text_fields(windows: Windows) -> tuple[str, ...]:
    """The fields of a record in one of which its text is."""
    return (windows.text_field,) if windows.text_field else TEXT_FIELDS


def select_of_record(record: dict, windows: Windows, share: float | None) -> list[dict]:
    """The candidates in a record, or why there are none."""
    meta = meta_of(record)
    values = [as_text(record[name]) for name in text_fields(windows) if name in record]
    text = next((value for value in values if isinstance(value, str)), None)
    text = clean_document(text) if isinstance(text, str) else None
    document, splits_by = to_document(text or "", meta, windows.source_name)
    if text is None:
        reason = "not JSON with a text"
        if windows.text_field:
            reason = f"not JSON with a text in {windows.text_field}"
    elif not (is_english(meta.get("language")) and is_english(record.get("language"))):
        reason = "not English"
    elif not text:
        reason = "no text"
    else:
        share = share_of(splits_by, windows.seed) if share is None else share
        inside = list(windows_of(document, share, windows))
        extracts = [extract for extract in inside if has_prose(extract["text"])]
        if extracts:
            return [extract | {"order": order_of(extract, windows.seed)} for extract in extracts]
        reason = "no prose" if inside else "outside the windows"
    dropped = {"source": document["source"], "order": "", "dropped": reason}
    if text is None and record:
        dropped["fields"] = ", ".join(map(str, list(record)[:6]))
    return [dropped]


def order_of(extract: dict, seed: int) -> str:
    """What extracts are sorted by: test first, as long documents are rarer, else as by chance."""
    return f"{extract['split']} {digest(seed, extract['id'])}{digest(extract['text'])}"


def ngrams(text: str, n: int) -> np.ndarray:
    """64-bit hashes of all runs of `n` lower-cased words, in order; of all words if fewer.

    A run's hash is a polynomial in its words' hashes, as in Rabin and Karp's search: shape
    (words - n + 1,), all runs at once, one word of each at a step.
    """
    words = re.findall(r"\w+", text.lower()) or [text]
    word_hashes = np.array([xxhash.xxh3_64_intdigest(word.encode()) for word in words], np.uint64)
    run_hashes = np.zeros(max(1, len(words) - n + 1), np.uint64)
    for i in range(min(n, len(words))):
        next_words = word_hashes[i : i + len(run_hashes)]
        run_hashes = run_hashes * MULTIPLIER + next_words  # modulo 2**64
    # The low bits of a product depend on low bits alone: the high ones are mixed in.
    return run_hashes ^ (run_hashes >> np.uint64(31))


def minhash(text: str) -> np.ndarray:
    """The MinHash signature of a text's shingles (Broder, 1997), of shape (BANDS, ROWS).

    Each of its numbers is the least of the shingles' hashes under another permutation of the 64-bit
    numbers, x -> x * factor + term: only an odd factor gives each number another one. Two texts
    agree in each with a probability of their shingles' Jaccard index.
    """
    shingles = ngrams(text, SHINGLE)
    permuted = shingles[:, None] * (FACTORS | np.uint64(1)) + TERMS
    return permuted.min(axis=0).reshape(BANDS, ROWS)


class Duplicates:
    """Near duplicates of what was kept, and texts that share a passage with a kept test text.

    Two texts are near duplicates if their signatures agree in all rows of a band.
    """

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.bands: set[tuple[int, bytes]] = set()  # (which band, its rows)
        self.test_runs: set[int] = set()

    def reason(self, extract: dict) -> str | None:
        """Why not to keep an extract; if there is no reason, it counts as kept from then on."""
        runs = ngrams(extract["text"], RUN).tolist()
        if extract["split"] == "train" and not self.test_runs.isdisjoint(runs):
            return "shares a run of words with a test document"
        signature = minhash(extract["text"])
        bands = {(number, rows.tobytes()) for number, rows in enumerate(signature)}
        if extract["id"] in self.ids or not self.bands.isdisjoint(bands):
            return "near duplicate"
        self.ids.add(extract["id"])
        self.bands |= bands
        if extract["split"] == "test":
            self.test_runs.update(runs)
        return None
