"""Make the folder of a new task from a commented example; it works at once.

python -m prompts.new_task plain-english
"""

import re
import shutil
from pathlib import Path

from common.cli import UserError, run, script_parser
from prompts.task import FOLDER, SHARED


def main() -> None:
    parser = script_parser(__doc__)
    parser.add_argument("name", help="of the task and its folder: small letters, digits, - and _")
    parser.add_argument("--prompts-dir", type=Path, default=FOLDER, help="where the tasks are")
    args = parser.parse_args()
    folder = args.prompts_dir / args.name
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", args.name) or args.name == SHARED.name:
        raise UserError(f"{args.name} is no name for a task: small letters, digits, - and _")
    if folder.exists():
        raise UserError(f"{folder} is there already")
    shutil.copytree(SHARED / "new_task", folder)
    print(f"{folder}: fill in task.yaml, teacher.jinja and instructed.jinja, then")
    print(f"  just plan, replies, pairs --rejected none, stage, train, all with --task {args.name}")


if __name__ == "__main__":
    run(main)
