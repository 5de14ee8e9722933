"""Decide the windows of a large file three ways side by side: ours, plain `datasets`, JSON alone.

The documents are of the lengths of RedPajama's three subsets and in real words, cut anew from the
demo's articles (or those of --documents, a folder of RedPajama-shaped *.jsonl, repeated). Ours are
the tasks of data_prep.sample_extracts, up to the candidates on disk; the plain way is
load_dataset("json") and a filter that calls the tokenizer. Prints MB/s of file, the ratios, peak
memory, whether the kept sets are identical; then the whole command, duplicates and report included.

    python -m benchmarks.extracts --mb 600
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import orjson
import psutil

from benchmarks.demo import resident_bytes
from data_prep.read_blocks import draw_units
from data_prep.sample_extracts import parse_options, run_all
from data_prep.select_extracts import clean_document, has_prose

ROOT = Path(__file__).parent.parent
TOKENIZER = "models/smollm2-135m-instruct"
LENGTHS = {"arxiv": (0.33, 45_000, 0.8), "stackexchange": (0.27, 1_500, 0.9)}  # share of bytes,
LENGTHS["wikipedia"] = (0.4, 1_500, 1.2)  # median characters, sigma of the logarithm


def generate(path: Path, size: int) -> None:
    """Write about `size` bytes of documents that start and end anywhere in the demo's articles."""
    draw = random.Random(0)
    articles = map(json.loads, Path("data/demo/wikipedia.jsonl").read_text().splitlines())
    words = re.findall(r"\S+\s*", "\n\n".join(article["text"] for article in articles))
    with path.open("w", encoding="utf-8") as file:
        for source, (share, median, sigma) in LENGTHS.items():
            end = file.tell() + share * size
            while file.tell() < end:
                n = int(draw.lognormvariate(0, sigma) * median / 6.2)  # characters a word, here
                start = draw.randrange(len(words))
                # Clean already, for the plain way cleans nothing.
                text = clean_document("".join(words[start : start + n]))
                if not has_prose(text):
                    continue
                url = f"{source}/{file.tell()}"
                meta = {"url": url, "source": source, "language": "en"}
                file.write(json.dumps({"text": text, "meta": meta}) + "\n")


def repeat(path: Path, size: int, folder: Path) -> None:
    rows = [json.loads(line) for one in sorted(folder.glob("*.jsonl")) for line in one.open()]
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < size:
            for row in rows:
                meta = {**row["meta"], "url": str(file.tell())}
                file.write(json.dumps({"text": row["text"], "meta": meta}) + "\n")


def inside_windows(text: str, count_tokens) -> bool:
    return 16_000 <= len(text) <= 100_000 or 900 < count_tokens(text) < 1800


def ours(path: str, output: str, workers: int, tokenizer: str) -> None:
    arguments = ["--input", path, "--whole", "--tokenizer", tokenizer, "--workers", str(workers)]
    options, work = parse_options(arguments), Path(output)
    run_all(options, draw_units([path], options.fraction, options.seed), work)
    lines = (line for one in work.glob("candidates/*.jsonl") for line in one.open("rb"))
    candidates = map(orjson.loads, lines)
    write_kept(work, [one["url"] for one in candidates if "dropped" not in one])


def plain(path: str, output: str, workers: int, tokenizer: str) -> None:
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenize = AutoTokenizer.from_pretrained(tokenizer, model_max_length=10**9)
    rows = load_dataset("json", data_files=path, split="train", cache_dir=f"{output}/cache")
    kept = rows.filter(
        lambda row: inside_windows(row["text"], lambda text: len(tokenize(text)["input_ids"])),
        num_proc=workers if workers > 1 else None,
    )
    kept.to_json(f"{output}/kept.jsonl")
    write_kept(Path(output), [meta["url"] for meta in kept["meta"]])


def parse(path: str, output: str, workers: int, tokenizer: str) -> None:
    with Path(path).open("rb") as file:
        number = sum("text" in orjson.loads(line) for line in file)
    write_kept(Path(output), [number])


def write_kept(folder: Path, urls: list) -> None:
    (folder / "kept.json").write_text(json.dumps(sorted(urls)))


def measured(*command: object) -> tuple[float, float]:
    """(seconds, peak GB of resident memory of all processes) of a command that must not fail."""
    started, peak = time.monotonic(), 0
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    process = psutil.Popen(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, resident_bytes(process))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"failed: {command}")
    return time.monotonic() - started, peak / 1e9


def compare(folder: Path, size: int, options: argparse.Namespace) -> None:
    path = folder / "documents.jsonl"
    if options.documents:
        repeat(path, size, options.documents)
    else:
        generate(path, size)
    size = path.stat().st_size / 1e6
    print(f"{size:,.0f} MB of documents, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    seconds, kept = {}, {}
    for way, workers in (("parse", 1), ("ours", 1), ("plain", 1), ("ours", 2), ("plain", 2)):
        output = folder / f"{way}{workers}"
        output.mkdir()
        run = ("benchmarks.extracts", "--way", way, path, output, workers, options.tokenizer)
        took, memory = measured(*run)
        seconds[way, workers] = took
        kept[way, workers] = json.loads((output / "kept.json").read_text())
        print(
            f"{way}, {workers} process(es): {took:.1f} s, {size / took:.1f} MB/s, "
            f"peak {memory:.2f} GB, {len(kept[way, workers]):,} kept",
            flush=True,
        )
    for workers in (1, 2):
        ratio = seconds["plain", workers] / seconds["ours", workers]
        same = kept["plain", workers] == kept["ours", workers]
        verdict = "identical" if same else "DIFFERENT"
        print(f"ours is {ratio:.1f} times the plain way on {workers}, kept sets {verdict}")
    print(f"ours on two processes: {seconds['ours', 1] / seconds['ours', 2]:.2f} times one")
    whole = ("data_prep.sample_extracts", "--input", path, "--whole", "--data", folder / "w")
    took, memory = measured(*whole, "--tokenizer", options.tokenizer, "--workers", 2)
    print(f"the whole command on two: {took:.1f} s, {size / took:.1f} MB/s, peak {memory:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mb", type=int, default=600, help="MB of documents (default: 600)")
    parser.add_argument("--documents", type=Path, help="folder of *.jsonl (default: generated)")
    parser.add_argument("--tokenizer", default=TOKENIZER, help=f"folder (default: {TOKENIZER})")
    parser.add_argument("--way", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        way, path, output, workers, tokenizer = options.way
        {"ours": ours, "plain": plain, "parse": parse}[way](path, output, int(workers), tokenizer)
        return
    if options.tokenizer == TOKENIZER or not options.documents:
        measured("demo.prepare_parts")
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options.mb * 1_000_000, options)


if __name__ == "__main__":
    main()
