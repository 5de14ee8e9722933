"""Summarize long documents with an instructed base: time, memory, what was cut, degeneration.

Takes the first articles of 16,000 to 60,000 characters that `just demo` lays out, one at a time,
and writes a row for each model and context to results/long_documents.md. Every answer is kept in
results/long_documents.jsonl, so that a run that was stopped goes on. A document that is not cut at
one context is read once: at a longer one its prompt is the same, and so are its greedy answer and
its time.

    python -m benchmarks.long_documents models/qwen2.5-coder-0.5b-instruct --contexts 8192 16384
"""

import resource
import time
from itertools import product
from pathlib import Path

import pandas as pd

from common.cli import positive, run, script_parser
from common.files import append_record, appending, load_records, read_records, write_text
from common.stats import markdown
from data_prep.filter_pairs import repetition
from inference.generate import build_prompt, generate_batch
from inference.weights import load_model, precision
from prompts.task import load_task

ARTICLES, ANSWERS = Path("data/demo/wikipedia.jsonl"), Path("results/long_documents.jsonl")
TABLE = Path("results/long_documents.md")


def summarize(model: str, texts: list[str], contexts: list[int], most: int) -> None:
    """Append a record for each text and context that lacks one."""
    with appending(ANSWERS):  # it is there, if empty
        made = [r for r in read_records(ANSWERS) if r["model"] == model]
    done = {(r["context"], r["document"]): r for r in made}
    loaded, tokenizer = load_model(model)
    task = load_task()
    template = task.student_template(instructed=True)
    for text, context in product(texts, sorted(contexts)):
        key = text[:80]
        if (context, key) in done:
            continue
        whole = [r for c in contexts if (r := done.get((c, key))) and not r["cut"]]
        if whole:
            record = whole[0] | {"context": context}
        else:
            prompt, cut = build_prompt(tokenizer, text, template, context - most, task)
            started = time.monotonic()
            (record,) = generate_batch(loaded, tokenizer, [prompt], most)
            record |= {"model": model, "context": context, "document": key}
            record |= {"cut": cut, "seconds": time.monotonic() - started, "precision": precision()}
            record["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        with appending(ANSWERS) as file:
            append_record(file, record)
        done[context, key] = record
        print(
            f"{context}: {record['n_prompt_tokens']} tokens, {record['seconds']:.0f} s", flush=True
        )


def table(records: list[dict]) -> pd.DataFrame:
    frame = pd.DataFrame(records)
    frame["repetition"] = frame["text"].map(repetition)
    frame["model"] = frame["model"].map(lambda model: Path(model).name)
    return frame.groupby(["model", "context", "precision"]).agg(
        documents=("text", "size"),
        cut=("cut", lambda cut: (cut > 0).sum()),
        tokens_read=("n_prompt_tokens", "mean"),
        seconds_each=("seconds", "mean"),
        peak_gib=("gib", "max"),
        words=("text", lambda texts: texts.str.split().str.len().mean()),
        ended_by_itself=("finish_reason", lambda reasons: (reasons == "stop").sum()),
        repetition=("repetition", "mean"),
        most_repetition=("repetition", "max"),
    )


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("model", help="a folder")
    parser.add_argument("--contexts", type=positive, nargs="+", default=[8192, 16384])
    parser.add_argument("--documents", type=positive, default=12)
    parser.add_argument("--max-new-tokens", type=positive, default=256)
    args = parser.parse_args()
    articles = load_records(ARTICLES, ("text",), "just demo")
    texts = [one["text"] for one in articles if 16_000 <= len(one["text"]) <= 60_000]
    summarize(args.model, texts[: args.documents], args.contexts, args.max_new_tokens)
    frame = table(list(read_records(ANSWERS))).round(2).reset_index()
    write_text(TABLE, markdown(frame.set_index("model")) + "\n")
    print(TABLE.read_text())


if __name__ == "__main__":
    run(main)
