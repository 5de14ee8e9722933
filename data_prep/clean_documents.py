"""Turn records into clean documents of a known source, and documents into passages."""

import ast
import json
import re
from collections.abc import Callable

from common.files import digest
from data_prep.read_blocks import subset_of

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
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


def meta_of(record: dict) -> dict:
    """RedPajama's meta, which is met as an object, as a JSON string and as a Python repr.

    Of a record without it, the fields beside the text.
    """
    meta = record.get("meta")
    if isinstance(meta, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                meta = parse(meta)
                break
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
    if isinstance(meta, dict) and meta:
        return meta
    return {key: value for key, value in record.items() if key != "text"}


def source_of(meta: dict, path: str, otherwise: str = "other") -> str:
    """Where a record says that it is from, or its file, if it is RedPajama's; or `otherwise`.

    Nothing else is claimed, for a source brings its licence along.
    """
    if meta.get("source"):
        return str(meta["source"])
    if "arxiv_id" in meta:
        return "arxiv"
    if "question_score" in meta:
        return "stackexchange"
    if re.match(r"https?://[a-z-]+\.wikipedia\.org/", str(meta.get("url"))) and meta.get("title"):
        return "wikipedia"  # RedPajama's rows of it carry no `source`
    subset = subset_of(path)
    return otherwise if subset == "other" else subset


def clean(text: str) -> str:
    """`text` with plain line ends and without control characters and empty sections."""
    text = text.replace("\r\n", "\n").replace("\x0c", "\n").replace("\r", "\n")
    text = CONTROL.sub("", text)
    for pattern, rest in EMPTY_SECTIONS:
        text = pattern.sub(rest, text)
    return text.strip()


def has_prose(text: str) -> bool:
    """Whether enough of `text`, as it begins, is words, once LaTeX's formulas and such are out.

    Stands in for Gopher's rule that 80% of the words hold a letter (Rae et al., 2021, appendix A),
    which a paper of nothing but LaTeX commands and a table of numbers under words both pass.
    """
    text = text[:8_000]
    prose = NOT_PROSE.sub(" ", text) if "\\" in text else text
    letters = sum(map(len, WORD.findall(prose)))
    return letters > LEAST_PROSE * len("".join(text.split()))


def to_document(text: str, meta: dict, source: str) -> dict | str:
    """{id, source, url, text} of a record, or the reason why it is left out."""
    if str(meta.get("language") or "en").lower() not in ("en", "english"):
        return "not English"
    if not (text := clean(text)):
        return "no text"
    url = str(meta.get("url") or "")
    key = url or meta.get("arxiv_id") or meta.get("title") or text
    return {"id": digest(source, key), "source": source, "url": url, "text": text}


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
