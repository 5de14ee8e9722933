"""Push the staged dataset folder to the Hub in one commit, private unless --public is given.

Reads data/TASK/hub, writes hub.lock beside it (repo, revision, files and the rows' hashes, for a
training config to pin and a model card to name). What the repo holds already is treated as
common/hub.py says.

    python -m data_prep.publish_dataset me/summarize-dpo --dry-run
"""

from pathlib import Path

from common.cli import UserError, run, script_parser
from common.files import file_sha
from common.hub import CARD, add_hub_options, publish
from prompts import add_task_options, data_folder

OURS = r"(data|sft)/\w+(-\d+)?-[0-9a-f]{12}\.parquet"  # as build_dataset names what it writes
OWNED_KEYS = ("configs", "size_categories")


def files_of(folder: Path) -> dict[str, Path]:
    """Path in the repo -> file. Raises UserError if the folder is not a staged dataset."""
    found = (p for p in sorted(folder.rglob("[!.]*")) if p.is_file())
    files = {path.relative_to(folder).as_posix(): path for path in found}
    if CARD not in files or not any(name.endswith(".parquet") for name in files):
        wanted = "README.md and Parquet files"
        raise UserError(f"{folder} is not a staged dataset ({wanted}); make it with `just stage`")
    return files


def row_hashes(folder: Path) -> list[str]:
    """What tells two states of a dataset apart: the hashes of its Parquet files."""
    return [file_sha(path) for path in sorted(folder.rglob("*.parquet"))]


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def main() -> None:
    parser = script_parser(__doc__)
    add_hub_options(parser)
    add_task_options(parser)
    parser.add_argument("--name", help="of the pairs, as `just stage` was given it")
    args = parser.parse_args()
    folder = data_folder(args, f"hub-{args.name}" if args.name else "hub")
    files, hashes = files_of(folder), row_hashes(folder)
    publish(args, "dataset", files, lock_of(folder), OWNED_KEYS, OURS, hashes=hashes)


if __name__ == "__main__":
    run(main)
