"""Sample extracts for training and documents for testing from RedPajama-shaped JSON Lines.

Reads JSON Lines records {"text", "meta"} from files, globs, http(s):// or hf:// paths, plain or
compressed, as a stream. Writes data/extracts/{train,test}.jsonl: documents in the token window for
training and in the character window for testing, English, without repeats, in a seeded order.

    python -m data_prep.sample_extracts --input my_docs/*.jsonl --train 8000 --test 200
"""

import argparse
import ast
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import fsspec
import httpx
from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.records import (
    UserError,
    is_made,
    mark_made,
    parse_line,
    positive,
    run,
    script_parser,
    write_records,
)

# What files, decompressors, http:// (aiohttp) and hf:// (httpx) raise.
READ_ERRORS = (OSError, EOFError, zlib.error, aiohttp.ClientError, httpx.HTTPError)
RED_PAJAMA_SAMPLE = [
    f"hf://datasets/togethercomputer/RedPajama-Data-1T-Sample/{source}_sample.jsonl"
    for source in ("arxiv", "wikipedia", "stackexchange")
]


def parse_meta(meta: object) -> dict:
    """RedPajama's meta, which is met as an object, as a JSON string and as a Python repr."""
    if isinstance(meta, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                meta = parse(meta)
                break
            except (ValueError, SyntaxError):
                continue
    return meta if isinstance(meta, dict) else {}


def source_of(meta: dict) -> str:
    """The subset a record belongs to; Wikipedia's records carry no `source`."""
    if meta.get("source"):
        return str(meta["source"])
    if "arxiv_id" in meta:
        return "arxiv"
    return "stackexchange" if "question_score" in meta else "wikipedia"


def digest(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def to_document(record: dict) -> dict | str:
    """{id, source, url, text} of a record, or the reason why it is left out."""
    text, meta = record["text"], parse_meta(record.get("meta"))
    if not isinstance(text, str) or not text.strip():
        return "no text"
    if meta.get("language", "en") not in ("en", "english"):
        return "not English"
    source, url = source_of(meta), meta.get("url") or ""
    key = url or meta.get("arxiv_id") or meta.get("title") or text
    text = text.replace("\r\n", "\n").strip()
    return {"id": digest(source, key), "source": source, "url": url, "text": text}


def cut_passages(text: str, size, low: int, high: int) -> list[str]:
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


def share_of(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on `key` and `seed` alone."""
    return int(digest(seed, key), 16) / 16**16


def read_documents(paths: list[str], dropped: Counter) -> Iterator[dict]:
    """Yield the usable documents of all `paths`, each id once, counting what is dropped."""
    try:
        files = [f for path in paths for f in fsspec.open_files(path, "rb", compression="infer")]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot open the input: {' '.join(str(error).split())}") from None
    if not files:
        raise UserError(f"no file matches {' '.join(paths)}")
    seen: set[str] = set()
    for number, entry in enumerate(files, 1):
        bar = tqdm(desc=f"reading file {number} of {len(files)}", unit="B", unit_scale=True)
        try:
            with bar, entry as file:
                bar.total = getattr(file, "size", None) or _local_size(entry)
                for line_number, line in enumerate(file, 1):
                    bar.update(len(line))
                    if not line.strip():
                        continue
                    record = parse_line(line, f"{entry.path}:{line_number}", ["text"])
                    document = to_document(record) if record else "broken line"
                    if isinstance(document, dict) and document["id"] in seen:
                        document = "repeated document"
                    if isinstance(document, str):
                        dropped[document] += 1
                        continue
                    seen.add(document["id"])
                    yield document
        except READ_ERRORS as error:
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"cannot read {entry.path}: {said}") from None


def _local_size(entry: fsspec.core.OpenFile) -> int | None:
    path = Path(entry.path)
    return path.stat().st_size if path.is_file() and entry.compression is None else None


def select(document: dict, count_tokens, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Yield (split, extract) for what of `document` falls into the training or test window."""
    text = document["text"]
    if not args.passages:
        if args.min_chars <= len(text) <= args.max_chars:
            yield "test", document
        # A token holds at least one byte, so fewer bytes cannot hold enough tokens.
        elif len(text.encode()) > args.min_tokens < count_tokens(text) < args.max_tokens:
            yield "train", document
        return
    split = "test" if share_of(document["id"], args.seed) < args.test_share else "train"
    window = (
        (len, args.min_chars - 1, args.max_chars + 1)
        if split == "test"
        else (count_tokens, args.min_tokens, args.max_tokens)
    )
    for number, passage in enumerate(cut_passages(text, *window)):
        yield split, {**document, "id": digest(document["id"], number), "text": passage}


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
            "Hub; pass --tokenizer FOLDER"
        ) from None


def sample(args: argparse.Namespace) -> tuple[dict[str, list[dict]], Counter]:
    """The extracts of each split, in seeded order, and the count of dropped by reason."""
    tokenizer = load_tokenizer(args.tokenizer)

    def count_tokens(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    splits: dict[str, list[dict]] = {"train": [], "test": []}
    dropped: Counter = Counter()
    seen_texts: set[str] = set()
    for document in read_documents(args.input, dropped):
        found = list(select(document, count_tokens, args))
        dropped["outside the windows"] += not found
        for split, extract in found:
            fingerprint = digest(" ".join(extract["text"].split()).lower())
            if fingerprint in seen_texts:
                dropped["repeated text"] += 1
                continue
            seen_texts.add(fingerprint)
            splits[split].append(extract)
    for split, limit in (("train", args.train), ("test", args.test)):
        splits[split].sort(key=lambda extract: share_of(extract["id"], args.seed))
        dropped[f"over --{split}"] += max(0, len(splits[split]) - (limit or len(splits[split])))
        splits[split] = splits[split][:limit]
        for extract in splits[split]:
            extract["n_chars"] = len(extract["text"])
            extract["n_tokens"] = count_tokens(extract["text"])
    return splits, +dropped


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--input", nargs="+", default=RED_PAJAMA_SAMPLE, help="JSON Lines: files, globs, URLs")
    option("--output", type=Path, default=Path("data/extracts"), help="folder")
    option(
        "--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: Hub id or folder"
    )
    option("--min-tokens", type=int, default=900, help="train: more than this")
    option("--max-tokens", type=int, default=1800, help="train: fewer than this")
    option("--min-chars", type=int, default=16_000, help="test: at least this")
    option("--max-chars", type=int, default=100_000, help="test: at most this")
    option("--train", type=positive, default=20_500, help="at most so many training extracts")
    option("--test", type=positive, default=200, help="at most so many test documents")
    option("--passages", action="store_true", help="cut documents at paragraphs into the windows")
    option("--test-share", type=float, default=0.3, help="with --passages: documents for test")
    option("--seed", type=int, default=0, help="orders and splits")
    args = parser.parse_args()

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    if is_made(args.output, settings):
        print(f"{args.output} is done with these settings; delete it to sample again")
        return
    if any(args.output.glob("*.jsonl")):
        raise UserError(
            f"{args.output} holds extracts made with other settings (see made.json "
            "there); delete it or pass another --output"
        )
    splits, dropped = sample(args)
    if not splits["train"] and not splits["test"]:
        raise UserError(f"no document falls into the windows; dropped: {dict(dropped)}")
    for split, extracts in splits.items():
        write_records(args.output / f"{split}.jsonl", extracts)
        sources = dict(Counter(extract["source"] for extract in extracts))
        print(f"{args.output / split}.jsonl: {len(extracts):,} extracts {sources}")
    for reason, number in dropped.most_common():
        print(f"  dropped {number:,}: {reason}")
    mark_made(args.output, settings)


if __name__ == "__main__":
    run(main)
