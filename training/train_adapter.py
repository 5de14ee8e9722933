"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names; writes the resolved config, the adapter and its loss curves
into outputs/RUN. Shows the trainer's progress; all that axolotl says goes to outputs/RUN/train.log.
A finished run is not repeated, a killed one goes on from its last checkpoint, and a run on other
data or settings first moves the old folder aside.

    python -m training.train_adapter qwen2-1.5b-dpo-sft-qlora --method ipo --set learning_rate=1e-5
"""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO

import pandas as pd
import yaml
from huggingface_hub import HfApi

from common.cli import UserError, one_line, run, script_parser, warn
from common.files import appending, file_sha, is_made, mark_made, write_text
from prompts import FOLDER, add_task_options, task_of
from training.check_run import check_run
from training.resolve_config import LAUNCHES, resolve_config
from training.run_config import RunConfig, fingerprint

PROGRESS = re.compile(r"\d+/\d+ \[[^\]]*\]")
LOSS = re.compile(r"'(loss|rewards/margins)': '?([-\d.e+]+)")
ERROR = re.compile(r"^(?!subprocess\.)(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*")
CPU_BF16 = {"bf16": True, "plugins": ["training.plugins.CpuBf16"]}


def dataset_state(config: RunConfig) -> list[str]:
    """What tells two states of the dataset apart: hashes of its files, or its revision."""
    path = Path(config.dataset)
    if path.exists():
        files = (file for file in [path, *sorted(path.rglob("*.*"))] if file.is_file())
        return [file_sha(file) for file in files if file.suffix != ".md"]
    try:
        return [config.dataset_revision or HfApi().dataset_info(config.dataset).sha]
    except Exception as error:  # offline, or no such repo: loading the rows will say so
        warn(f"{config.dataset} is not pinned, so a change goes unnoticed: {one_line(error, 99)}")
        return []


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: task, config, base model, dataset."""
    folder = config.task.folder.parent
    return {
        "task": config.task.name,
        "prompts_dir": None if folder == FOLDER else str(folder.absolute()),
        "config": config.settings,
        "base_model": fingerprint(config.base_model),
        "adapter": config.first_adapter and fingerprint(config.first_adapter),
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


def plot_curves(folder: Path) -> Path:
    """Write curves.png: the loss and, for preference training, reward margin and accuracy."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    latest = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    history = pd.DataFrame(json.loads(latest.read_text())["log_history"]).set_index("step")
    shown = [c for c in ("loss", "rewards/margins", "rewards/accuracies") if c in history]
    panels = history[shown].dropna().plot(subplots=True, figsize=(7, 2.2 * len(shown)))
    panels[0].figure.savefig(folder / "curves.png")
    return folder / "curves.png"


def run_once(config: RunConfig, accelerate_options: list[str]) -> None:
    """Train what is not trained yet, under the run's lock. Raises UserError."""
    folder, inputs = config.output_dir, inputs_of(config)
    if is_made(folder, inputs):
        print(f"{folder} is trained on this data with this config")
        return
    with appending(folder.with_name(f"{folder.name}.lock")) as lock:
        check_run(config, accelerate_options)
        if (folder / "inputs").exists() and not is_made(folder / "inputs", inputs):
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


def computes_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU multiplies in bf16, which makes a LoRA step about twice as fast."""
    flags = cpuinfo.read_text() if cpuinfo.is_file() else ""
    return bool(re.search(r"\b(?:amx_bf16|avx512_bf16)\b", flags))


def main() -> None:
    parser = script_parser(__doc__)
    parser.epilog = "All other options go to `accelerate launch`, for example --cpu."
    option = parser.add_argument
    option("config", help="name in axolotl_configs, or a YAML")
    add_task_options(parser)
    parser.set_defaults(data=None)  # the config's own
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--name", help="of the run and its folder (default: TASK-CONFIG-METHOD, as far as told)")
    option("--launch", choices=LAUNCHES, help="several GPUs: DeepSpeed ZeRO-2 or FSDP2")
    args, launch = parser.parse_known_args()
    told = (args.method, args.set, args.launch, args.name, task_of(args), args.data)
    config = resolve_config(args.config, *told)
    settled = config.four_bits or any(key.startswith("bf16=") for key in args.set)
    if "--cpu" in launch and not settled and not config.settings.get("bf16") and computes_bf16():
        print("this CPU computes in bf16: so does the training (--set bf16=false for 32 bits)")
        config = replace(config, settings=config.settings | CPU_BF16)
        launch = [*launch, "--mixed_precision", "bf16"]
    run_once(config, [*LAUNCHES.get(args.launch, []), *launch])


if __name__ == "__main__":
    run(main)
