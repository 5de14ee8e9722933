"""Summarize long documents with an instructed base: time, memory, what was cut, degeneration.

Takes the first articles of 16,000 to 60,000 characters that `just demo` lays out, one at a time,
and writes a row for each model and context to results/long_documents.md. Every answer is kept in
outputs/long_documents.jsonl, so that a run that was stopped goes on.

    python -m benchmarks.long_documents models/qwen2.5-coder-0.5b-instruct --contexts 8192 16384
"""

import resource
import time
from pathlib import Path

import pandas as pd

from common.cli import positive, run, script_parser
from common.files import append_record, appending, load_records, read_records, write_text
from common.report import markdown
from data_prep.filter_pairs import repetition
from eval.generate_answers import build_prompt, generate_batch
from eval.load_model import load_model, precision
from prompts import load_task

ARTICLES, ANSWERS = Path("data/demo/wikipedia.jsonl"), Path("outputs/long_documents.jsonl")
TABLE = Path("results/long_documents.md")


def summarize(model: str, texts: list[str], contexts: list[int], most: int) -> None:
    """Append a record for each text and context that lacks one."""
    with appending(ANSWERS):  # it is there, if empty
        done = [(r["model"], r["context"], r["document"]) for r in read_records(ANSWERS)]
    loaded, tokenizer = load_model(model)
    task = load_task()
    for context in contexts:
        for text in texts:
            if (model, context, text[:80]) in done:
                continue
            template = task.student_template(instructed=True)
            prompt, cut = build_prompt(tokenizer, text, template, context - most, task)
            started = time.monotonic()
            (made,) = generate_batch(loaded, tokenizer, [prompt], most)
            made |= {"model": model, "context": context, "document": text[:80]}
            made |= {"cut": cut, "seconds": time.monotonic() - started, "precision": precision()}
            made["gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            with appending(ANSWERS) as file:
                append_record(file, made)
            print(
                f"{context}: {made['n_prompt_tokens']} tokens, {made['seconds']:.0f} s", flush=True
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
