"""Push a staged dataset to the Hub in one commit, private unless --public is given.

Reads DATA/TASK/hub, or hub-NAME; writes hub.lock beside it (repo, revision, files and the rows'
hashes, for a training config to pin and a model card to name). What the repo holds already is
treated as common/hub.py says.

    python -m data_prep.publish_dataset me/summarize-dpo --dry-run
"""

from pathlib import Path

from common.cli import UserError, run, script_parser
from common.files import file_sha
from common.hub import CARD, add_hub_options, hub_options, publish
from prompts.task import add_task_options, data_folder


def row_hashes(folder: Path) -> list[str]:
    """What tells two states of a dataset apart: the hashes of its Parquet files."""
    return [file_sha(path) for path in sorted(folder.rglob("*.parquet"))]


def lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def main() -> None:
    parser = script_parser(__doc__)
    add_hub_options(parser)
    add_task_options(parser)
    parser.add_argument("--name", default="", help="of the pairs: push hub-NAME")
    args = parser.parse_args()
    folder = data_folder(args, "hub", args.name)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    shown = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    files = {name.as_posix(): folder / name for name in shown}
    hashes = row_hashes(folder)
    if CARD not in files or not hashes:
        raise UserError(f"{folder} is not a staged dataset; make it with `just stage`")
    files[CARD] = files[CARD].read_bytes()
    publish(hub_options(args), "dataset", files, lock_of(folder), hashes=hashes)


if __name__ == "__main__":
    run(main)
