"""Stage the dataset repo as it will stand on the Hub: Parquet per split and a card.

Reads data/pairs and data/replies, writes data/hub/data/{train,test}-*.parquet and
data/hub/README.md. Loads with `datasets.load_dataset("data/hub")`.

    python -m data_prep.build_dataset
"""

import hashlib
import io
from pathlib import Path

from datasets import Dataset, disable_progress_bars

from data_prep.generate_replies import TEMPLATE
from data_prep.records import load_records, read_records, replacing, run, script_parser
from prompts import FOLDER, answer_message, render, student_messages, template_sha

CARD = "summarize/dataset_card.md.jinja"
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))


def to_row(pair: dict) -> dict:
    """A pair in the conversational preference format that axolotl and TRL read."""
    return {
        "id": pair["id"],
        "source": pair["source"],
        "url": pair["url"],
        "prompt": student_messages(pair["prompt"]),
        "chosen": answer_message(pair["chosen"]),
        "rejected": answer_message(pair["rejected"]),
        "chosen_position": pair["chosen_position"],
        "ratings": [float(rating) for rating in pair["ratings"]],
        "teacher": pair["teacher"],
        "prompt_sha": pair["prompt_sha"],
    }


def card_facts(train: list[dict], test: list[dict], replies: list[dict], made: dict) -> dict:
    """The variables of the dataset card; `made` is what build_pairs recorded of its run."""
    n_rows = len(train) + len(test)
    costs = [reply["cost_usd"] for reply in replies]
    prompt_sha = train[0]["prompt_sha"]
    longer = sum(len(pair["chosen"]) > len(pair["rejected"]) for pair in train)
    first = sum(pair["chosen_position"] == 1 for pair in train)
    return {
        **made,
        "size_category": next((name for limit, name in SIZES if n_rows < limit), "100K<n<1M"),
        "n_train": f"{len(train):,}",
        "n_test": f"{len(test):,}",
        "teacher": train[0]["teacher"],
        "sources": ", ".join(sorted({pair["source"] for pair in train + test})),
        "longer_wins": f"{100 * longer / len(train):.1f}%",
        "first_wins": f"{100 * first / len(train):.1f}%",
        "chosen_words": mean_words(train, "chosen"),
        "rejected_words": mean_words(train, "rejected"),
        "cost": "an unknown sum" if None in costs else f"${sum(costs):.2f}",
        "prompt_sha": prompt_sha,
        "teacher_prompt": (FOLDER / TEMPLATE).read_text()
        if prompt_sha == template_sha(TEMPLATE)
        else "An earlier version of prompts/summarize/teacher.jinja.",
    }


def mean_words(pairs: list[dict], side: str) -> str:
    return f"{sum(len(pair[side].split()) for pair in pairs) / len(pairs):.0f}"


def write_parquet(folder: Path, split: str, pairs: list[dict]) -> str:
    """Write one split and return its file name, which holds a hash of the content.

    `load_dataset` caches a folder by the file names in its card: a file that changed under the
    same name would go on being served as it was.
    """
    buffer = io.BytesIO()
    Dataset.from_list([to_row(pair) for pair in pairs]).to_parquet(buffer)
    content = buffer.getvalue()
    name = f"{split}-00000-of-00001-{hashlib.sha256(content).hexdigest()[:12]}.parquet"
    with replacing(folder / name) as temporary:
        temporary.write_bytes(content)
    print(f"{folder / name}: {len(pairs):,} rows")
    return name


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="folder")
    parser.add_argument("--replies", type=Path, default=Path("data/replies"), help="folder")
    parser.add_argument("--output", type=Path, default=Path("data/hub"), help="folder")
    args = parser.parse_args()
    disable_progress_bars()
    splits, replies = {}, []
    for split in ("train", "test"):
        splits[split] = load_records(args.pairs / f"{split}.jsonl", ("id", "chosen"), "just pairs")
        replies += read_records(args.replies / f"{split}.jsonl", ("id", "cost_usd"), "just replies")
    (made,) = load_records(args.pairs / "made.json", made_by="just pairs")
    data = args.output / "data"
    names = {split: write_parquet(data, split, pairs) for split, pairs in splits.items()}
    facts = card_facts(splits["train"], splits["test"], replies, made)
    with replacing(args.output / "README.md") as temporary:
        temporary.write_text(render(CARD, **facts, file_names=names) + "\n")
    for file in data.iterdir():
        if file.name not in names.values():
            file.unlink()
    print(
        f"staged in {args.output}; load_dataset({str(args.output)!r}) reads it, "
        "`just publish-dataset NAME` pushes it"
    )


if __name__ == "__main__":
    run(main)
