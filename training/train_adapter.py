"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names, writes the adapter and its loss curves into the config's
output_dir. Shows the trainer's progress; what axolotl says goes to <output_dir>/train.log. A
finished run is not repeated, a killed one goes on from its last checkpoint, and a run on other data
or settings first moves the old folder aside.

    python -m training.train_adapter axolotl_configs/smollm2-135m-dpo-sft-lora.yaml --cpu
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from common.cli import UserError, run, script_parser
from common.files import appending, file_sha, is_made, mark_made
from training.check_run import check_run
from training.plot_curves import plot_curves
from training.run_config import (
    RunConfig,
    check_dataset,
    check_first_adapter,
    check_model_folder,
    fingerprint,
    load_run_config,
)

PROGRESS = re.compile(r"(?:[\w ()=]+: +)?\d+%\|[^|]*\| *\d+/\d+ \[[^\]]*\]")
STEP = re.compile(
    r"'loss': '?(?P<loss>[-\d.e+]+)'?(?:.*'rewards/margins': '?(?P<margin>[-\d.e+]+))?"
)
ERROR = re.compile(r"^(?!subprocess\.)(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: config, base model, dataset."""
    dataset = Path(config.dataset)
    files = [dataset] if dataset.is_file() else sorted(dataset.rglob("*.*"))
    return {
        "config": config.settings,
        "base_model": fingerprint(config.base_model),
        **({"adapter": fingerprint(config.first_adapter)} if config.first_adapter else {}),
        "dataset": [config.dataset, *(file_sha(p) for p in files if p.suffix != ".md")],
    }


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of folder.1, folder.2, ..."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)


def pieces(stream: IO[bytes], log: IO[bytes]) -> Iterator[str]:
    """Yield the stream's lines and progress updates as they come, copying all of it to `log`."""
    buffer = b""
    while chunk := os.read(stream.fileno(), 65536):
        log.write(chunk)
        log.flush()
        *complete, buffer = re.split(rb"[\r\n]", buffer + chunk)
        yield from (piece.decode(errors="replace") for piece in complete if piece.strip())
    yield buffer.decode(errors="replace")


def follow(process: subprocess.Popen, log: IO[bytes]) -> str:
    """Show the run's progress bars with the latest loss. Returns the last error line seen."""
    error = detail = ""
    for piece in pieces(process.stdout, log):
        if match := STEP.search(piece):
            margin = f", margin {match['margin']}" if match["margin"] else ""
            detail = f"  loss {match['loss']}{margin}"
        elif match := PROGRESS.search(piece):
            print(f"\r{match[0].strip()}{detail}\x1b[K", end="", file=sys.stderr, flush=True)
        elif match := ERROR.match(piece.strip()):
            error = match[0]
    print(file=sys.stderr)
    return error


def train(config: RunConfig, accelerate_options: list[str], lock: IO[bytes]) -> None:
    """Run axolotl, which keeps `lock` even if this process is killed.

    Raises UserError with its last error line if it fails.
    """
    launch = [*accelerate_options, "-m", "axolotl.cli.train", str(config.path)]
    log_path = config.output_dir / "train.log"
    print(f"accelerate launch {shlex.join(launch)}")
    print(f"(loading takes about 20 s; all output goes to {log_path})", flush=True)
    environment = {"AXOLOTL_DO_NOT_TRACK": "1", **os.environ}
    with (
        log_path.open("ab") as log,
        subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", *launch],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
        ) as process,
    ):
        error = follow(process, log)
    if process.returncode:
        raise UserError(
            f"training stopped with exit code {process.returncode}: "
            f"{error or 'no error line'}; see {log_path}"
        )


def main() -> None:
    parser = script_parser(__doc__)
    parser.epilog = "All other options go to `accelerate launch`, for example --cpu."
    parser.add_argument("config", type=Path, help="the axolotl YAML")
    args, accelerate_options = parser.parse_known_args()
    config = load_run_config(args.config)
    check_model_folder(config.base_model)
    check_dataset(config.dataset)
    check_first_adapter(config)
    inputs = inputs_of(config)
    started = config.output_dir / "inputs"
    if is_made(config.output_dir, inputs):
        print(f"{config.output_dir} is trained on this data with this config")
        return
    with appending(config.output_dir.with_name(f"{config.output_dir.name}.lock")) as lock:
        check_run(config, accelerate_options)
        if config.output_dir.exists() and not is_made(started, inputs):
            print(f"other inputs than before: the old run is now {move_aside(config.output_dir)}")
        mark_made(started, inputs)
        train(config, accelerate_options, lock)
    if not (config.output_dir / "adapter_model.safetensors").is_file():
        raise UserError(f"axolotl ended without an adapter; see {config.output_dir / 'train.log'}")
    mark_made(config.output_dir, inputs)
    print(f"adapter in {config.output_dir}, loss curves in {plot_curves(config.output_dir)}")


if __name__ == "__main__":
    run(main)
