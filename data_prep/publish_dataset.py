"""Push the staged dataset folder to the Hub in one commit, private unless --public is given.

Reads data/hub, writes data/hub.lock (repo, revision, files and the rows' hashes, for a training
config to pin and a model card to name). What the repo holds already is treated as common/hub.py
says.

    python -m data_prep.publish_dataset me/summarize-dpo --dry-run
"""

from pathlib import Path

from common.cli import UserError, run, script_parser
from common.files import file_sha
from common.hub import CARD, add_hub_options, publish

OURS = r"(data|sft)/\w+(-\d+)?-[0-9a-f]{12}\.parquet"  # as build_dataset names what it writes


def files_of(folder: Path) -> dict[str, Path]:
    """Path in the repo -> file. Raises UserError if the folder is not a staged dataset."""
    files = {
        p.relative_to(folder).as_posix(): p
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith(".")
    }
    if CARD not in files or not any(name.endswith(".parquet") for name in files):
        raise UserError(
            f"{folder} is not a staged dataset (README.md and Parquet files); "
            "make it with `just stage`"
        )
    return files


def row_hashes(folder: Path) -> list[str]:
    """What tells two states of a dataset apart: the hashes of its Parquet files."""
    return [file_sha(path) for path in sorted(folder.rglob("*.parquet"))]


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def main() -> None:
    parser = script_parser(__doc__)
    add_hub_options(parser)
    parser.add_argument("--folder", type=Path, default=Path("data/hub"), help="the staged dataset")
    args = parser.parse_args()
    files, hashes, owned = (
        files_of(args.folder),
        row_hashes(args.folder),
        ("configs", "size_categories"),
    )
    publish(args, "dataset", files, lock_of(args.folder), owned, OURS, hashes=hashes)


if __name__ == "__main__":
    run(main)
