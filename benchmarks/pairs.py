"""Parse, filter, audit and stage 20,500 generated replies; compare similarity filters side by side.

Replies have the lengths of real ones (two summaries of about 150 words to an extract of about 1,000
words), in random mixtures of shapes. Prints time, rate and peak memory of the real command lines,
the parse errors on 10,000 replies, and, on a sample, the time of the similarity filter against
difflib and against plain Python, with the dropped sets compared.

    python -m benchmarks.pairs
"""

import argparse
import difflib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rapidfuzz.distance import Levenshtein

from benchmarks.reply_shapes import render_reply
from common.files import digest
from data_prep.parse_replies import ParseError, parse_reply
from prompts.task import load_task

ROOT = Path(__file__).parent.parent
WORDS, TOKENIZER = ROOT / "prompts/summarize/teacher.jinja", ROOT / "models/smollm2-135m-instruct"


def prose(rng: random.Random, words: list[str], n: int) -> str:
    sentences = []
    while n > 0:
        length = rng.randint(12, 28)
        sentences.append(" ".join(rng.choices(words, k=length)).capitalize() + ".")
        n -= length
    return " ".join(sentences)


def generate(folder: Path, n: int) -> None:
    """Write extracts and replies of `n` training pairs and 200 test documents."""
    rng = random.Random(0)
    words = [w for w in WORDS.read_text().split() if w.isalpha()]  # as frequent as in English
    for split, count in (("train", n), ("test", 200)):
        for stage in ("extracts", "summarize/replies"):
            (folder / stage).mkdir(parents=True, exist_ok=True)
        with (
            (folder / f"extracts/{split}.jsonl").open("w") as extracts,
            (folder / f"summarize/replies/{split}.jsonl").open("w") as replies,
        ):
            for i in range(count):
                key, text = f"{split}{i}", prose(rng, words, rng.randint(700, 1300))
                one = prose(rng, words, rng.randint(100, 200))
                two = prose(rng, words, rng.randint(80, 160)) if rng.random() > 0.1 else one[:-5]
                extract = {
                    "id": key,
                    "source": rng.choice(("arxiv", "wikipedia")),
                    "url": "",
                    "text": text,
                    "n_tokens": int(1.35 * len(text.split())),
                }
                reply = {
                    "id": key,
                    "model": "m",
                    "prompt_sha": "p",
                    "text_digest": digest(text),
                    "finish_reason": "stop",
                    "text": render_reply(rng, one, two),
                    "created": "2026-01-01",
                    "usage": {"prompt_tokens": 1700, "completion_tokens": 700},
                    "cost_usd": 0.001,
                }
                extracts.write(json.dumps(extract) + "\n")
                replies.write(json.dumps(reply) + "\n")


def measured(*command: object) -> tuple[float, float]:
    """(seconds, peak GiB) of a stage's command line. Raises if it fails."""
    started, peak = time.monotonic(), 0
    process = psutil.Popen(
        [sys.executable, "-m", *map(str, command)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        try:
            peak = max(peak, process.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"failed: {command}")
    return time.monotonic() - started, peak / 2**30


def plain_similarity(a: str, b: str) -> float:
    """Levenshtein similarity in plain Python, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return 1 - row[-1] / max(len(a), len(b))


def compare_filters(pairs: list[dict]) -> None:
    ways = {
        "rapidfuzz (ours)": lambda p: Levenshtein.normalized_similarity(p["chosen"], p["rejected"]),
        "plain Python Levenshtein": lambda p: plain_similarity(p["chosen"], p["rejected"]),
        "difflib ratio": lambda p: difflib.SequenceMatcher(
            None, p["chosen"], p["rejected"], autojunk=False
        ).ratio(),
    }
    seconds, dropped = {}, {}
    for name, way in ways.items():
        started = time.monotonic()
        dropped[name] = {p["id"] for p in pairs if way(p) > 0.75}
        seconds[name] = time.monotonic() - started
    ours = seconds["rapidfuzz (ours)"]
    for name in ways:
        same = "same drops" if dropped[name] == dropped["rapidfuzz (ours)"] else "OTHER DROPS"
        print(
            f"{name}: {1000 * seconds[name] / len(pairs):.3f} ms a pair, "
            f"{seconds[name] / ours:,.0f} times ours, "
            f"{len(dropped[name])} of {len(pairs)} dropped, {same}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=20_500, help="training replies (default: 20500)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, args.n)
        if not TOKENIZER.exists():
            measured("demo.prepare_parts")
        data = ("--data", folder)
        one = measured("data_prep.build_pairs", *data, "--tokenizer", TOKENIZER)
        two = measured("data_prep.build_dataset", *data)
        total = one[0] + two[0]
        print(
            f"\nbuild_pairs {one[0]:.1f} s, {one[1]:.2f} GiB; build_dataset {two[0]:.1f} s, "
            f"{two[1]:.2f} GiB; together {total:.1f} s, {args.n / total:,.0f} replies a second"
        )
        kept = [json.loads(line) for line in (folder / "summarize/pairs/train.jsonl").open()]
    rng, errors = random.Random(1), 0
    for i in range(10_000):
        try:
            answers = f"One {i}: it is so.", f"- Two {i}.\n- And so on."
            errors += parse_reply(render_reply(rng, *answers), load_task()).answers != answers
        except ParseError:
            errors += 1
    print(f"parse errors on 10,000 generated replies: {errors}")
    alike = [{**p, "id": p["id"] + "x", "rejected": p["chosen"][:-9]} for p in kept[:10]]
    compare_filters(kept[:50] + alike)


if __name__ == "__main__":
    main()
