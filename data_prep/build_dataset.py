"""Stage the dataset repo as it will stand on the Hub: Parquet files, plots and a card.

Reads data/pairs and data/replies, writes data/hub: data/*.parquet, sft/*.parquet, plots/ and
README.md. `datasets.load_dataset("data/hub")` reads it; the configs pairs-8000 and pairs-20500 are
nested, seeded subsets of the sizes of the published runs, sft holds the chosen summaries alone.

    python -m data_prep.build_dataset
"""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from common.cli import run, script_parser, warn
from common.files import file_sha, load_records, read_records, share_of, write_text
from data_prep.teacher.prices import teacher_terms
from prompts import FOLDER, Task, answer_message, load_task, render, student_messages, template_sha

SUBSETS = (8_000, 20_500)  # pairs, as in the published runs
ROW_GROUP = 1_000  # rows written, and later read, at a time
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
LICENCES = {
    "arxiv": "each paper under the licence its authors chose on arXiv",
    "wikipedia": "CC BY-SA",
    "stackexchange": "CC BY-SA",
}
UNKNOWN = "under a licence that is not known here; its owner has to name it, outside of these lines"


def to_row(pair: dict, split: str) -> dict:
    """A pair in the conversational preference format that axolotl and TRL read."""
    return {
        "id": pair["id"],
        "source": pair["source"],
        "url": pair["url"],
        "prompt": student_messages(pair["prompt"]),
        "chosen": answer_message(pair["chosen"]),
        "rejected": answer_message(pair["rejected"]),
        "reference": pair["chosen"] if split == "test" else None,
        "chosen_position": pair["chosen_position"],
        "ratings": [float(rating) for rating in pair["ratings"]],
        "teacher": pair["teacher"],
        "prompt_sha": pair["prompt_sha"],
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
    # In train `reference` is null and shows no type.
    features = Dataset.from_list([to(pairs[0], "test")]).features
    groups = [  # as the rows of all pairs at once would take ten times their size
        Dataset.from_list([to(pair, split) for pair in group], features=features)
        for group in (pairs[i : i + ROW_GROUP] for i in range(0, len(pairs), ROW_GROUP))
    ]
    concatenate_datasets(groups).to_parquet(temporary, batch_size=ROW_GROUP)
    path = temporary.rename(folder / f"{stem}-{file_sha(temporary)}.parquet")
    print(f"{path}: {len(pairs):,} rows")
    return f"{folder.name}/{path.name}"


def write_files(hub: Path, train: list[dict], test: list[dict]) -> list[dict]:
    """Write all Parquet files; return the card's `configs`."""
    sizes = [size for size in SUBSETS if size <= len(train)]
    shards = [
        write_parquet(hub / "data", f"train-{i}", train[a:b], to_row)
        for i, (a, b) in enumerate(pairwise(sorted({0, *sizes, len(train)})))
    ]
    tests = write_parquet(hub / "data", "test", test, to_row)
    sft = write_parquet(hub / "sft", "train", train, to_sft_row)
    sft_tests = write_parquet(hub / "sft", "test", test, to_sft_row)

    def config(name: str, train_files: list[str], test_file: str) -> dict:
        files = [{"split": "train", "path": train_files}, {"split": "test", "path": test_file}]
        return {"config_name": name, "data_files": files}

    subsets = [config(f"pairs-{size}", shards[: i + 1], tests) for i, size in enumerate(sizes)]
    return [config("default", shards, tests), *subsets, config("sft", [sft], sft_tests)]


def remove_stale(hub: Path, configs: list[dict]) -> None:
    """Delete the Parquet files that the card no longer names."""
    named = json.dumps(configs)
    for path in hub.glob("*/*.parquet"):
        if f"{path.parent.name}/{path.name}" not in named:
            path.unlink()


def front_matter(configs: list[dict], n_rows: int, licensed: bool, task: Task) -> str:
    """The card's front matter, as the Hub reads it."""
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        language=["en"],
        license="other" if licensed else "unknown",
        license_name="mixed-see-card" if licensed else None,
        task_categories=[task.hub["task_category"], "text-generation"],
        tags=["dpo", "preference", "synthetic", "axolotl", "trl"],
        size_categories=[next((name for limit, name in SIZES if n_rows < limit), "100K<n<1M")],
        configs=configs,
    ).to_yaml()


def card_facts(
    splits: dict[str, list[dict]], dates: list[str], made: dict, licence: str, task: Task
) -> dict:
    """The variables of the dataset card; `made` is what build_pairs recorded of its run."""
    train, template = splits["train"], task.template("teacher")
    sha, teacher = train[0]["prompt_sha"], train[0]["teacher"]
    known = sha == template_sha(template)
    sources = sorted({pair["source"] for pairs in splits.values() for pair in pairs})
    return {
        **made,
        "criteria": task.criteria,
        "scores": f"{task.lowest_score} to {task.highest_score}",
        "n_train": len(train),
        "n_test": len(splits["test"]),
        "teacher": teacher,
        "teacher_terms": teacher_terms(teacher),
        "licences": {source: LICENCES.get(source, licence or UNKNOWN) for source in sources},
        "dates": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "prompt_sha": sha,
        "teacher_prompt": (FOLDER / template).read_text()
        if known
        else "An earlier version of a prompt in prompts/summarize.",
        "example": sorted(train, key=lambda pair: len(pair["prompt"]))[len(train) // 2],
    }


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
    facts = card_facts(splits, sorted(dates), made, args.licence, task)
    licensed = UNKNOWN not in facts["licences"].values()
    if not licensed:
        warn("the licence of some texts is not known; name it with --licence, or in the card")
    configs = write_files(args.output, **splits)
    shutil.copytree(args.pairs / "plots", args.output / "plots", dirs_exist_ok=True)
    front = front_matter(configs, sum(map(len, splits.values())), licensed, task)
    card = render(task.template("dataset_card.md"), metadata=front, **facts)
    write_text(args.output / "README.md", card + "\n")
    remove_stale(args.output, configs)
    print(
        f"staged in {args.output}; load_dataset({str(args.output)!r}) reads it, "
        "`just publish-dataset NAME` pushes it"
    )


if __name__ == "__main__":
    run(main)
