"""Stage the dataset repo as it will stand on the Hub: Parquet files, plots and a card.

Reads data/pairs and data/replies, writes data/hub: data/*.parquet, sft/*.parquet, plots/ and
README.md. `datasets.load_dataset("data/hub")` reads it; the configs pairs-8000 and pairs-20500 are
nested, seeded subsets of the sizes of the published runs, sft holds the chosen summaries alone.

    python -m data_prep.build_dataset
"""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from common.cli import run, script_parser, warn
from common.files import file_sha, load_records, read_records, share_of, write_text
from data_prep.teacher.prices import teacher_terms
from prompts import FOLDER, answer_message, load_task, render, student_messages, template_sha

SUBSETS = (8_000, 20_500)  # pairs, as in the published runs
ROW_GROUP = 1_000  # rows made, written and later read at a time; all at once take ten times the RAM
COPIED = ("id", "source", "url", "chosen_position", "teacher", "prompt_sha")
LICENCES = {
    "arxiv": "each paper under the licence its authors chose on arXiv",
    "wikipedia": "CC BY-SA",
    "stackexchange": "CC BY-SA",
}


def to_row(pair: dict, split: str) -> dict:
    """A pair in the conversational preference format that axolotl and TRL read."""
    return {name: pair[name] for name in COPIED} | {
        "prompt": student_messages(pair["prompt"]),
        "chosen": answer_message(pair["chosen"]),
        "rejected": answer_message(pair["rejected"]),
        "reference": pair["chosen"] if split == "test" else None,
        "ratings": [float(rating) for rating in pair["ratings"]],
    }


def to_sft_row(pair: dict, split: str = "train") -> dict:
    """The prompt and the chosen summary as one conversation; alike in both splits."""
    messages = student_messages(pair["prompt"]) + answer_message(pair["chosen"])
    return {"id": pair["id"], "source": pair["source"], "messages": messages}


def write_parquet(folder: Path, stem: str, pairs: list[dict], to: Callable) -> str:
    """Write the rows that `to` makes of pairs and the split in `stem`; return the path in the repo.

    The name holds a hash of the content: `load_dataset` caches a folder by the file names in its
    card, so a file that changed under the same name would go on being served as it was.
    """
    from datasets import Dataset, concatenate_datasets

    folder.mkdir(parents=True, exist_ok=True)
    temporary, split = folder / f".{stem}.tmp", stem.split("-")[0]
    features = Dataset.from_list([to(pairs[0], "test")]).features  # `reference` is null in train
    groups = [
        Dataset.from_list([to(p, split) for p in pairs[i : i + ROW_GROUP]], features=features)
        for i in range(0, len(pairs), ROW_GROUP)
    ]
    concatenate_datasets(groups).to_parquet(temporary, batch_size=ROW_GROUP)
    path = temporary.rename(folder / f"{stem}-{file_sha(temporary)}.parquet")
    print(f"{path}: {len(pairs):,} rows")
    return f"{folder.name}/{path.name}"


def write_files(hub: Path, train: list[dict], test: list[dict]) -> dict[str, dict]:
    """Write all Parquet files; return config -> split -> files."""
    sizes = [size for size in SUBSETS if size <= len(train)]
    shards = [
        write_parquet(hub / "data", f"train-{i}", train[start:end], to_row)
        for i, (start, end) in enumerate(pairwise(sorted({0, *sizes, len(train)})))
    ]
    tests = [write_parquet(hub / "data", "test", test, to_row)]
    subsets = {
        f"pairs-{size}": {"train": shards[:i], "test": tests} for i, size in enumerate(sizes, 1)
    }
    sft = {
        "train": [write_parquet(hub / "sft", "train", train, to_sft_row)],
        "test": [write_parquet(hub / "sft", "test", test, to_sft_row)],
    }
    return {"default": {"train": shards, "test": tests}, **subsets, "sft": sft}


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--pairs", type=Path, default=Path("data/pairs"), help="folder")
    option("--replies", type=Path, default=Path("data/replies"), help="folder")
    option("--output", type=Path, default=Path("data/hub"), help="folder")
    option("--seed", type=int, default=0, help="of the rows' order, and so of the subsets")
    option("--licence", default="", help="of texts that are not RedPajama's, for the card")
    args = parser.parse_args()
    task, splits, dates = load_task(), {}, set()
    (made,) = load_records(args.pairs / "made.json", ("audit", "funnel"), "just pairs")
    for split in ("train", "test"):
        pairs = load_records(args.pairs / f"{split}.jsonl", ("id", "chosen"), "just pairs")
        splits[split] = sorted(pairs, key=lambda pair: share_of(pair["id"], args.seed))
        replies = read_records(args.replies / f"{split}.jsonl", ("created",), "just replies")
        dates |= {reply["created"][:10] for reply in replies}
    sources = {pair["source"] for pairs in splits.values() for pair in pairs}
    licensed = bool(args.licence) or sources <= LICENCES.keys()
    if not licensed:
        warn("the licence of some texts is not known; name it with --licence, or in the card")
    by_length = sorted(splits["train"], key=lambda pair: len(pair["prompt"]))
    example = by_length[len(by_length) // 2]
    known = example["prompt_sha"] == template_sha(task.template("teacher"))
    facts = made | {
        "task": task,
        "splits": splits,
        "configs": write_files(args.output, **splits),
        "example": example,
        "dates": sorted({min(dates), max(dates)}),
        "terms": teacher_terms(example["teacher"]),
        "teacher_prompt": (FOLDER / task.template("teacher")).read_text() if known else "",
        "licences": {source: LICENCES.get(source, args.licence) for source in sources},
        "licensed": licensed,
    }
    shutil.copytree(args.pairs / "plots", args.output / "plots", dirs_exist_ok=True)
    card = render(task.template("dataset_card.md"), **facts)
    write_text(args.output / "README.md", card + "\n")
    for path in args.output.glob("*/*.parquet"):
        if path.name not in card:  # of an earlier state
            path.unlink()
    print(f"staged in {args.output}; `just publish-dataset NAME` pushes it")


if __name__ == "__main__":
    run(main)
