"""Stage the dataset repo as it will stand on the Hub: Parquet files and a card.

Reads DATA/TASK/pairs, writes DATA/TASK/hub, which `datasets.load_dataset` reads. Rows are
in a seeded order, so `train[:8000]` is a fair sample; the config sft has the chosen answers alone.

    python -m data_prep.build_dataset
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from statistics import median_low

import pyarrow as pa
from pyarrow import parquet

from common.cli import UserError, one_line, run, script_parser, warn
from common.files import bytes_sha, file_sha, load_records, replacing, share_of, write_text
from common.pages import project_link
from common.text import control_tokens, count_words, plain_text, without_folder
from data_prep.candidates import NOT_CHECKED
from data_prep.filter_pairs import sentences_of
from data_prep.load_extracts import licence_of
from data_prep.teacher.prices import teacher_terms
from prompts.task import Task, add_task_options, data_folder, load_task, task_of

MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
COLUMNS = dict.fromkeys(("id", "source", "url"), pa.string())
COLUMNS |= dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES)
COLUMNS |= dict.fromkeys(("reference", "kind", "chosen_by", "rejected_by"), pa.string())
COLUMNS |= dict.fromkeys(("teacher", "prompt_sha"), pa.string())
COLUMNS |= {"chosen_position": pa.int64(), "ratings": pa.list_(pa.float64())}
LICENCES = dict.fromkeys(("wikipedia", "stackexchange"), "CC BY-SA")
LICENCES["arxiv"] = "each paper under the licence its authors chose on arXiv"


def to_row(
    pair: dict, split: str = "train", task: Task | None = None, tokens: Iterable[str] = ()
) -> dict:
    """A pair in the conversational preference format that axolotl and TRL read.

    Control tokens in its texts are made plain: those of common forms, and a student's own `tokens`.
    """
    task, row = task or load_task(), dict(pair)
    text = plain_text(pair["prompt"], tokens)
    row["prompt"] = task.student_messages(text, task.student_template())
    for side in ("chosen", "rejected"):
        answer = plain_text(pair[side] or "", tokens)
        row[side] = [{"role": "assistant", "content": answer}]
    row["rejected"] = row["rejected"] if pair["rejected_by"] else None  # no preference to train on
    for maker in ("teacher", "chosen_by", "rejected_by"):
        if row.get(maker):
            row[maker] = without_folder(row[maker])
    row["reference"] = pair["chosen"] if split == "test" else None
    return row | student_column(task)


def to_sft_row(pair: dict, task: Task | None = None, tokens: Iterable[str] = ()) -> dict:
    """The prompt and the chosen answer as one conversation; alike in both splits."""
    task = task or load_task()
    row = to_row(pair, "train", task, tokens)
    messages = row["prompt"] + row["chosen"]
    return {"id": pair["id"], "source": pair["source"], "messages": messages} | student_column(task)


def student_column(task: Task) -> dict[str, str]:
    """Of which student.jinja the prompt is, where there is one: training looks whether it is still
    the task's."""
    return {"student_sha": task.student_sha()} if task.student_template() else {}


def write_parquet(folder: Path, stem: str, table: pa.Table) -> str:
    """Write a file, if it is not there; return its path in the repo. A hash in its name tells
    `load_dataset` of a change."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=1_000)
    content = sink.getvalue().to_pybytes()
    sha = bytes_sha(content)
    path = folder / f"{stem}-{sha}.parquet"
    if not path.exists() or file_sha(path) != sha:
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return f"{folder.name}/{path.name}"


def remove_others(hub: Path, kept: set[str]) -> None:
    """Remove what an earlier state left; `kept` are paths in the repo.

    It is the last step, and files of the same rows are not written again: a training may read them.
    """
    for path in hub.rglob("*"):
        if path.is_file() and str(path.relative_to(hub)) not in kept:
            path.unlink()


def tokens_of(student: str | None) -> list[str]:
    """The control tokens of a student's tokenizer, a folder or a Hub id; none for None."""
    if not student:
        return []
    from transformers import AutoTokenizer

    try:
        return control_tokens(AutoTokenizer.from_pretrained(student))
    except (OSError, ValueError) as error:
        raise UserError(f"{student} has no tokenizer to load: {one_line(error, 200)}") from None


def write_files(
    hub: Path, splits: dict[str, list[dict]], task: Task, tokens: Iterable[str]
) -> dict[str, dict]:
    """Write all Parquet files; return config -> split -> file."""
    files = {"default": {}, "sft": {}}
    for split, pairs in splits.items():
        rows = [to_row(pair, split, task, tokens) for pair in pairs]
        columns = COLUMNS | dict.fromkeys(student_column(task), pa.string())
        table = pa.Table.from_pylist(rows, schema=pa.schema(columns))
        chats = pa.Table.from_pylist([to_sft_row(pair, task, tokens) for pair in pairs])
        files["default"][split] = write_parquet(hub / "data", split, table)
        files["sft"][split] = write_parquet(hub / "sft", split, chats)
    return files


def kinds_of(rejected: str | list[str]) -> list[str]:
    """The kinds of the pairs, which version 0.4.0 wrote as the only one."""
    return [rejected] if isinstance(rejected, str) else rejected


def not_checked(kinds: list[str], limits: dict[str, float]) -> dict[str, list[str]]:
    """kind -> those of the checks that its pairs need not pass, where there are any."""
    left_out = {kind: sorted(NOT_CHECKED.get(kind, set()) & limits.keys()) for kind in kinds}
    return {kind: names for kind, names in left_out.items() if names}


def lengths_of(pairs: list[dict]) -> tuple[int, int, int]:
    """The least, the most and the median number of words of the texts."""
    words = [count_words(pair["prompt"]) for pair in pairs]
    return min(words), max(words), median_low(words)


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add_task_options(parser)
    parser.add_argument("--name", default="", help="of the pairs: from pairs-NAME to hub-NAME")
    parser.add_argument(
        "--licence", default="", help="of own texts (default: as told with the extracts)"
    )
    told = "student whose own control tokens are written as plain text: a folder or a Hub id"
    parser.add_argument("--tokenizer", help=told)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task, splits = task_of(args), {}
    tokens = tokens_of(args.tokenizer)
    folder, hub = (data_folder(args, stage, args.name) for stage in ("pairs", "hub"))
    (made,) = load_records(folder / "made.json", ("audit", "funnel"), "just pairs")
    for split in ("train", "test"):
        pairs = load_records(folder / f"{split}.jsonl", ("id", "rejected_by"), "just pairs")
        splits[split] = sorted(pairs, key=lambda pair: share_of(pair["id"], 0))
    sources = {pair["source"] for pairs in splits.values() for pair in pairs}
    own_licence = args.licence or licence_of(args.data / "extracts")
    licences = {source: LICENCES.get(source, own_licence) for source in sources}
    if not all(licences.values()):
        warn("the licence of some texts is not known; name it with --licence, or in the card")
    example = min(splits["train"], key=lambda pair: len(pair["prompt"]))
    made["configs"] = write_files(hub, splits, task, tokens)
    made["rejected"] = kinds_of(made["rejected"])
    teacher = splits["test"][0]["teacher"]  # training pairs need not be a teacher's
    facts = {"licences": licences, "example": example, "teacher": teacher}
    facts |= {"terms": teacher_terms(teacher), "exchange": made.pop("exchange", "others")}
    only = made["rejected"][0]  # the kind of pairs that do not tell it, of version 0.4.0
    facts["rejected_by"] = {p.get("kind", only): p["rejected_by"] for p in splits["train"]}
    facts["lengths"] = {split: lengths_of(pairs) for split, pairs in splits.items()}
    facts["project"] = project_link()
    facts["not_checked"] = not_checked(made["rejected"], made["limits"])
    facts["sentences"] = sentences_of(made["limits"], task)
    card = task.render("dataset_card.md", splits=splits, **made, **facts)
    write_text(hub / "README.md", card + "\n")
    files = {path for by_split in made["configs"].values() for path in by_split.values()}
    remove_others(hub, {"README.md", *files})
    print(f"staged in {hub}; `just publish-dataset NAME` pushes it")


if __name__ == "__main__":
    run(main)
