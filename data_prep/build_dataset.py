"""Stage the dataset repo as it will stand on the Hub: Parquet files, plots and a card.

Reads data/pairs and data/replies, writes data/hub: data/*.parquet, sft/*.parquet, plots/ and
README.md. `datasets.load_dataset("data/hub")` reads it; the configs pairs-8000 and pairs-20500 are
nested, seeded subsets of the sizes of the published runs, sft holds the chosen summaries alone.

    python -m data_prep.build_dataset
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from common.cli import run, script_parser
from common.files import file_sha, load_records, read_records, replacing
from data_prep.clean_documents import share_of
from data_prep.generate_replies import TEACHER
from data_prep.teacher.client import PRICES
from prompts import FOLDER, answer_message, render, student_messages, template_sha

CARD = "summarize/dataset_card.md.jinja"
ROW_GROUP = 1_000  # rows written, and later read, at a time
SUBSETS = (8_000, 20_500)  # pairs, as in the published runs
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
LICENCES = {
    "arxiv": "each paper under the licence its authors chose on arXiv",
    "wikipedia": "CC BY-SA",
    "stackexchange": "CC BY-SA",
}


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


def to_sft_row(pair: dict) -> dict:
    """The prompt and the chosen summary as one conversation."""
    messages = student_messages(pair["prompt"]) + answer_message(pair["chosen"])
    return {"id": pair["id"], "source": pair["source"], "messages": messages}


def write_parquet(folder: Path, stem: str, rows: list[dict]) -> str:
    """Write a file whose name holds a hash of its content; return its path in the repo.

    `load_dataset` caches a folder by the file names in its card: a file that changed under the
    same name would go on being served as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary, schema = folder / f".{stem}.tmp", pa.Table.from_pylist(rows[:1]).schema
    if (column := schema.get_field_index("reference")) >= 0:  # null in train: no type to be seen
        schema = schema.set(column, pa.field("reference", pa.string()))
    with pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, len(rows), ROW_GROUP):
            group = rows[start : start + ROW_GROUP]
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    path = temporary.rename(folder / f"{stem}-{file_sha(temporary)}.parquet")
    print(f"{path}: {len(rows):,} rows")
    return f"{folder.name}/{path.name}"


def write_files(hub: Path, train: list[dict], test: list[dict]) -> list[dict]:
    """Write all Parquet files; return the card's `configs`."""
    cuts = [0, *(size for size in SUBSETS if size < len(train)), len(train)]
    shards = [
        write_parquet(hub / "data", f"train-{number}", [to_row(p, "train") for p in train[a:b]])
        for number, (a, b) in enumerate(pairwise(cuts))
    ]
    tests = write_parquet(hub / "data", "test", [to_row(p, "test") for p in test])
    sft = [
        write_parquet(hub / "sft", split, [to_sft_row(p) for p in pairs])
        for split, pairs in (("train", train), ("test", test))
    ]

    def config(name: str, train_files: list[str], test_file: str) -> dict:
        files = [{"split": "train", "path": train_files}, {"split": "test", "path": test_file}]
        return {"config_name": name, "data_files": files}

    subsets = [
        config(f"pairs-{size}", shards[: i + 1], tests)
        for i, size in enumerate(SUBSETS)
        if size <= len(train)
    ]
    return [config("default", shards, tests), *subsets, config("sft", sft[:1], sft[1])]


def remove_stale(hub: Path, configs: list[dict]) -> None:
    """Delete the Parquet files that the card no longer names."""
    named = json.dumps(configs)
    for path in hub.glob("*/*.parquet"):
        if f"{path.parent.name}/{path.name}" not in named:
            path.unlink()


def metadata(configs: list[dict], n_rows: int) -> str:
    """The card's front matter, as the Hub reads it."""
    size = next((name for limit, name in SIZES if n_rows < limit), "100K<n<1M")
    return yaml.safe_dump(
        {
            "language": ["en"],
            "license": "other",
            "license_name": "mixed-see-card",
            "task_categories": ["summarization", "text-generation"],
            "tags": ["dpo", "preference", "synthetic", "axolotl", "trl"],
            "size_categories": [size],
            "configs": configs,
        },
        sort_keys=False,
    ).strip()


def teacher_terms(teacher: str) -> str:
    """What a card says of the terms on a teacher's summaries."""
    known = yaml.safe_load(PRICES.read_text()).get(teacher, {})
    return known.get("outputs", "See the model's licence and the provider's terms.")


def card_facts(train: list[dict], test: list[dict], dates: list[str], made: dict) -> dict:
    """The variables of the dataset card; `made` is what build_pairs recorded of its run."""
    sha, teacher = train[0]["prompt_sha"], train[0]["teacher"]
    prompts = {template_sha(name): (FOLDER / name).read_text() for name in (TEACHER,)}
    earlier = "An earlier version of a prompt in prompts/summarize."
    return {
        **made,
        "n_train": len(train),
        "n_test": len(test),
        "teacher": teacher,
        "teacher_terms": teacher_terms(teacher),
        "licences": {
            s: LICENCES.get(s, "see the source") for s in {p["source"] for p in train + test}
        },
        "dates": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "prompt_sha": sha,
        "teacher_prompt": prompts.get(sha, earlier),
        "example": sorted(train, key=lambda pair: len(pair["prompt"]))[len(train) // 2],
    }


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--pairs", type=Path, default=Path("data/pairs"), help="folder")
    option("--replies", type=Path, default=Path("data/replies"), help="folder")
    option("--output", type=Path, default=Path("data/hub"), help="folder")
    option("--seed", type=int, default=0, help="of the rows' order, and so of the subsets")
    args = parser.parse_args()
    splits, dates = {}, set()
    for split in ("train", "test"):
        pairs = load_records(args.pairs / f"{split}.jsonl", ("id", "chosen"), "just pairs")
        splits[split] = sorted(pairs, key=lambda pair: share_of(pair["id"], args.seed))
        replies = read_records(args.replies / f"{split}.jsonl", ("created",), "just replies")
        dates |= {reply["created"][:10] for reply in replies}
    (made,) = load_records(args.pairs / "made.json", made_by="just pairs")
    configs = write_files(args.output, **splits)
    shutil.copytree(args.pairs / "plots", args.output / "plots", dirs_exist_ok=True)
    facts = card_facts(splits["train"], splits["test"], sorted(dates), made)
    front = metadata(configs, sum(map(len, splits.values())))
    with replacing(args.output / "README.md") as temporary:
        temporary.write_text(render(CARD, metadata=front, **facts) + "\n")
    remove_stale(args.output, configs)
    print(
        f"staged in {args.output}; load_dataset({str(args.output)!r}) reads it, "
        "`just publish-dataset NAME` pushes it"
    )


if __name__ == "__main__":
    run(main)
