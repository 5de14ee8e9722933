"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names; writes the resolved config, the adapter and its loss curves
into outputs/RUN. Shows the trainer's progress; all that axolotl says goes to outputs/RUN/train.log.
A finished run is not repeated, a killed one goes on from its last checkpoint, and a run on other
data or settings first moves the old folder aside.

    python -m training.train_adapter qwen2-1.5b-dpo-sft-qlora --method ipo --set learning_rate=1e-5
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO

import yaml
from huggingface_hub import HfApi

from common.cli import UserError, one_line, run, script_parser, warn
from common.files import appending, file_sha, is_made, mark_made, write_text
from training.check_run import check_run
from training.plot_curves import plot_curves
from training.resolve_config import LAUNCHES, resolve_config
from training.run_config import RunConfig, check_inputs, fingerprint

PROGRESS = re.compile(r"\d+/\d+ \[[^\]]*\]")
LOSS = re.compile(r"'(loss|rewards/margins)': '?([-\d.e+]+)")
ERROR = re.compile(r"^(?!subprocess\.)(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")


def dataset_state(config: RunConfig) -> list[str]:
    """What tells two states of the dataset apart: hashes of its files, or its revision."""
    path = Path(config.dataset)
    if path.exists():
        files = [path] if path.is_file() else sorted(path.rglob("*.*"))
        return [file_sha(file) for file in files if file.suffix != ".md"]
    try:
        return [config.dataset_revision or HfApi().dataset_info(config.dataset).sha]
    except Exception as error:  # offline, or no such repo: loading the rows will say so
        warn(f"{config.dataset} is not pinned, so a change goes unnoticed: {one_line(error, 99)}")
        return []


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: config, base model, dataset."""
    return {
        "config": config.settings,
        "base_model": fingerprint(config.base_model),
        **({"adapter": fingerprint(config.first_adapter)} if config.first_adapter else {}),
        "dataset": [config.dataset, *dataset_state(config)],
    }


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of folder.1, folder.2, ..."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)


def follow(output: IO[str], log: IO[str]) -> str:
    """Copy the trainer's output to `log`, show its progress; return the last error line seen."""
    error, seen = "", {}
    for line in output:  # lines end with \r too
        log.write(line)
        log.flush()
        seen |= dict(LOSS.findall(line))
        if match := PROGRESS.search(line):
            values = ", ".join(f"{name.split('/')[-1]} {value}" for name, value in seen.items())
            print(f"\r{match[0]} {values}\x1b[K", end="", file=sys.stderr, flush=True)
        elif match := ERROR.match(line.strip()):
            error = match[0]
    print(file=sys.stderr)
    return error


def train(config: RunConfig, accelerate_options: list[str], lock: IO[bytes]) -> None:
    """Run axolotl, which keeps `lock` even if this process is killed.

    Raises UserError with its last error line if it fails.
    """
    folder = config.output_dir
    launch = [*accelerate_options, "-m", "axolotl.cli.train", str(folder / "config.yaml")]
    print(f"accelerate launch {shlex.join(launch)}")
    print(f"(loading takes about 20 s; all output goes to {folder / 'train.log'})", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *launch],
        env={"AXOLOTL_DO_NOT_TRACK": "1", **os.environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=[lock.fileno()],
    )
    with process, (folder / "train.log").open("a", encoding="utf-8") as log:
        error = follow(process.stdout, log)
    if process.returncode:
        raise UserError(
            f"training stopped with exit code {process.returncode}: "
            f"{error or 'no error line'}; see {folder / 'train.log'}"
        )


def run_once(config: RunConfig, accelerate_options: list[str]) -> None:
    """Train what is not trained yet, under the run's lock. Raises UserError."""
    folder, inputs = config.output_dir, inputs_of(config)
    if is_made(folder, inputs):
        print(f"{folder} is trained on this data with this config")
        return
    with appending(folder.with_name(f"{folder.name}.lock")) as lock:
        check_run(config, accelerate_options)
        if folder.exists() and not is_made(folder / "inputs", inputs):
            print(f"other inputs than before: the old run is now {move_aside(folder)}")
        mark_made(folder / "inputs", inputs)
        source = f"# {config.path.name} as resolved for this run; axolotl trains this file.\n"
        resolved = yaml.safe_dump(config.settings, sort_keys=False)
        write_text(folder / "config.yaml", source + resolved)
        train(config, accelerate_options, lock)
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"axolotl ended without an adapter; see {folder / 'train.log'}")
    mark_made(folder, inputs)
    print(f"adapter in {folder}, loss curves in {plot_curves(folder)}")


def main() -> None:
    parser = script_parser(__doc__)
    parser.epilog = "All other options go to `accelerate launch`, for example --cpu."
    option = parser.add_argument
    option("config", help="name in axolotl_configs, or a YAML")
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--name", help="of the run and its folder (default: the config's, -METHOD behind it)")
    option("--launch", choices=LAUNCHES, help="several GPUs: DeepSpeed ZeRO-2 or FSDP2")
    args, accelerate_options = parser.parse_known_args()
    config = resolve_config(args.config, args.method, args.set, args.launch, args.name)
    check_inputs(config)
    run_once(config, [*LAUNCHES.get(args.launch, []), *accelerate_options])


if __name__ == "__main__":
    run(main)
