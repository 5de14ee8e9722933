"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names; writes config.yaml as resolved, train.log, the adapter and
curves.png into outputs/RUN, and made.json once training said that it reached its end. A finished
run is not repeated, a stopped or killed one goes on from its last checkpoint, and a run on other
data, templates or settings first moves the old folder aside. Of several machines the first alone
(--machine_rank 0) writes into the folder.

    python -m training.train_adapter qwen2-1.5b-dpo-sft-qlora --method ipo --set learning_rate=1e-5
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pandas as pd
import psutil
import yaml
from huggingface_hub import HfApi

from common.cli import UserError, one_line, run, script_parser, warn
from common.files import appending, digest, file_sha, mark_made, read_json, write_text
from prompts.task import FOLDER, add_task_options, task_of
from training.check_rows import check_rows
from training.config import (
    CPU_BF16,
    LAUNCHES,
    NUMBER,
    OLD_NAMES,
    RunConfig,
    check_dataset,
    check_finished,
    check_keys,
    check_model_folder,
    check_output_dir,
    is_local,
    resolve_config,
    settings_fingerprint,
    weights_fingerprint,
)
from training.student import fit_student, load_student_tokenizer

PROGRESS = re.compile(r"\d+/\d+ \[[^\]]*\]")
LOSS = re.compile(r"'(?:rewards/)?(loss|margins)': '?([-\d.e+]+)")
ERROR = re.compile(r"(?!subprocess\.)((\w+\.)*\w*(Error|Exception|Interrupt)\b|Value error,).*")
COLOUR = re.compile(r"\x1b\[[\d;]*m")
# axolotl says this once the last step is done, and not when a signal makes it save and leave.
COMPLETED = "Training completed! Saving trained model"
# Its warnings, and what it says as information but means rows that are not trained as they are.
WARNING = re.compile(
    r"\[(?:WARNING|ERROR|CRITICAL)\] \[axolotl[\w.]*\] (?P<warning>.+)"
    r"|\[INFO\] \[axolotl[\w.]*\] (?P<loss>(?:Dropped \d|Truncated ).+)"
)
NOISE = ("bf16 requested, but AMP is not", "Processing datasets during training can lead")
# What version 0.3.7 recorded of a run; runs of its time are compared by these.
INPUTS_OF_0_3_7 = {"task", "prompts_dir", "config", "base_model", "adapter", "dataset"}


def check_machine(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError for what the config asks for and this machine does not have."""
    import torch

    get, first = config.settings.get, config.first_adapter
    check_model_folder(config.base_model)
    if first and is_local(first) and not (Path(first) / "adapter_model.safetensors").is_file():
        raise UserError(f"no adapter in {first} to go on from; train it, or --set lora_model_dir=")
    if first:
        check_finished(Path(first))
    flash = str(get("attn_implementation")).startswith("flash")
    bf16 = get("bf16") and CPU_BF16 not in (get("plugins") or [])
    if (flash or bf16) and (on_cpu or not torch.cuda.is_available()):
        asked = "flash attention" if flash else "bf16"
        raise UserError(f"{config.path.name} asks for {asked}, and no GPU is in use here")
    if flash and torch.cuda.get_device_capability() < (8, 0):
        raise UserError("flash attention needs an Ampere GPU; --set attn_implementation=sdpa")
    here = next(folder for folder in config.output_dir.absolute().parents if folder.exists())
    if shutil.disk_usage(here).free < 2**30:
        raise UserError(f"{here} has less than 1 GiB free, which training writes about")


def dataset_state(entry: dict) -> list[str]:
    """What tells two states of a dataset apart: its files' digests, or its revision on the Hub."""
    path = entry["path"]
    if not is_local(path) and not named_files(entry):
        try:
            return [entry.get("revision") or HfApi().dataset_info(path).sha]
        except Exception as error:  # offline, or no such repo: loading the rows will say so
            warn(f"{path} is not pinned, so a change goes unnoticed: {one_line(error, 99)}")
    return [file_sha(file) for file in files_in(Path(path))]


def files_in(place: Path) -> list[Path]:
    """A file itself, or the files of a folder but its cards."""
    files = [place] if place.is_file() else sorted(place.rglob("*.*"))
    return [file for file in files if file.is_file() and file.suffix != ".md"]


def named_files(entry: dict) -> list[Path]:
    """The local files that an entry of a config's datasets names by `data_files`."""
    named = entry.get("data_files") or []
    of_splits = list(named.values()) if isinstance(named, dict) else [named]
    names = []
    for of_split in of_splits:
        names += [of_split] if isinstance(of_split, str) else of_split
    return [file for name in names for file in files_in(Path(name))]


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: task, templates, config, base, adapter, datasets."""
    prompts, task = config.task.folder.parent, config.task
    first_adapter, settings = config.first_adapter, config.settings
    entries = [*settings["datasets"], *(settings.get("test_datasets") or [])]
    of_entries = [[entry["path"], *dataset_state(entry)] for entry in entries]
    return {
        "task": task.name,
        "prompts_dir": None if prompts == FOLDER else str(prompts.absolute()),
        "config": settings,
        "base_model": weights_fingerprint(config.base_model),
        "adapter": first_adapter and weights_fingerprint(first_adapter),
        "dataset": of_entries[0],
        # Version 0.3.7 did not record these.
        "student": task.student_sha(),
        "base_settings": settings_fingerprint(config.base_model),
        "adapter_settings": first_adapter and settings_fingerprint(first_adapter),
        "datasets": of_entries,
        "data_files": [file_sha(file) for entry in entries for file in named_files(entry)],
    }


def as_read_today(value: object) -> object:
    """What an earlier version recorded, as it is read today.

    Version 0.3.7 kept a number such as 2e-5 as text, 0.4.0 knew plugins by other names.
    """
    if isinstance(value, dict):
        return {key: as_read_today(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_read_today(part) for part in value]
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, str):
        return OLD_NAMES.get(value, value)
    return value


def made_of(folder: Path, inputs: dict) -> bool:
    """Whether `folder`/made.json records these inputs, as far as the version that wrote it did."""
    recorded = read_json(folder / "made.json")
    if not recorded.keys() >= INPUTS_OF_0_3_7:
        return False
    present = json.loads(json.dumps(inputs))
    return all(
        as_read_today(present.get(key)) == as_read_today(value) for key, value in recorded.items()
    )


def is_trained(folder: Path, inputs: dict) -> bool:
    """Whether the training in `folder` ended well, on these inputs."""
    return (folder / "adapter_model.safetensors").is_file() and made_of(folder, inputs)


@dataclass(frozen=True)
class Ended:
    """How a launch of axolotl ended."""

    code: int
    completed: bool  # whether it said that the last step was done
    error: str  # the last line that names one


def machine_rank(options: list[str]) -> int:
    """Which of several machines this one is, by accelerate's options; 0 leads."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--machine_rank", "--machine-rank", type=int, default=0)
    return parser.parse_known_args(options)[0].machine_rank


def launch(config: Path, prepared: Path, options: list[str], log: Path, lock: int | None) -> Ended:
    """Run axolotl on a YAML, with its own folder for prepared rows, and show how it goes.

    The process keeps `lock` even if this one is killed. Raises KeyboardInterrupt once all that was
    started has ended.
    """
    # Given here and not in the YAML: rows that another run prepared, or this one of other data,
    # are never taken, whatever the config names.
    told = [*options, "-m", "axolotl.cli.train", str(config), f"--dataset_prepared_path={prepared}"]
    print(f"accelerate launch {shlex.join(told)}\n(loads for 20 s; output: {log})", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *told]
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "AXOLOTL_LOG_LEVEL": "INFO"}
    io = {"stdout": PIPE, "stderr": STDOUT, "text": True, "errors": "replace"}
    kept_open = [] if lock is None else [lock]
    process = Popen(command, env=environment, pass_fds=kept_open, **io)
    try:
        with log.open("a", buffering=1, encoding="utf-8") as file:
            completed, error = follow(process.stdout, file)
    except KeyboardInterrupt:
        stop(process)
        raise
    return Ended(process.wait(), completed, error)


def follow(lines, log) -> tuple[bool, str]:
    """Copy axolotl's output to `log`; show progress and warnings. (completed, last error)."""
    completed, error, seen, shown = False, "no error line", {}, set()
    for line in lines:  # they end with \r too
        log.write(line)
        completed = completed or COMPLETED in line
        seen |= dict(LOSS.findall(line))
        if bar := PROGRESS.search(line):
            values = ", ".join(f"{name} {value}" for name, value in seen.items())
            print(f"\r{bar[0]} {values}\x1b[K", end="", file=sys.stderr, flush=True)
        elif found := ERROR.match(line.strip()):
            error = one_line(found[0])
        elif found := WARNING.search(COLOUR.sub("", line)):
            warning = one_line(found["warning"] or found["loss"])
            if warning not in shown and not warning.startswith(NOISE):
                print(f"\raxolotl: {warning}\x1b[K", file=sys.stderr, flush=True)
            shown.add(warning)
    print(file=sys.stderr)
    return completed, error


def stop(process: Popen) -> None:
    """End a training and all that it started; return when they have let go of the run.

    A Ctrl-C at the terminal reaches them too, and axolotl then saves what it has and leaves.
    """
    try:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.terminate()
    except psutil.NoSuchProcess:  # it has ended by itself
        pass
    process.terminate()
    for _ in process.stdout:
        pass
    process.wait()


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that were written to their end, the oldest first."""
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)
    return [state.parent for state in states]


def clear_torn(folder: Path) -> None:
    """Remove what a kill left half-written: checkpoints and prepared rows without their last file,
    on which axolotl would fail for ever."""
    for place, last_file in (
        ("checkpoint-*", "trainer_state.json"),
        ("prepared-*/*/", "dataset_info.json"),
    ):
        for written in folder.glob(place):
            try:
                whole = bool(json.loads((written / last_file).read_bytes()))
            except (OSError, ValueError):
                whole = False
            if written.is_dir() and not whole:
                shutil.rmtree(written)


def where_it_goes_on(config: RunConfig) -> str:
    """What the same command will do after a training that did not reach its end."""
    kept = checkpoints(config.output_dir)
    if kept and config.settings.get("auto_resume_from_checkpoints"):
        return f"the same command goes on from {kept[-1].name}"
    return "there is no checkpoint to go on from, so the same command starts anew"


def check_ended(ended: Ended, config: RunConfig, log: Path) -> None:
    """Raise UserError unless training reached its end and left an adapter."""
    written = (config.output_dir / "adapter_model.safetensors").is_file()
    if ended.code == 0 and ended.completed and written:
        return
    reason = f"training ended with code {ended.code}: {ended.error}"
    if ended.code == 0:
        reason = "training was stopped before its end"
    raise UserError(f"{reason}; see {log}; {where_it_goes_on(config)}")


def plot_curves(folder: Path) -> None:
    """Write curves.png: the loss and, for preference training, reward margin and accuracy."""
    for latest in checkpoints(folder)[-1:]:
        state = read_json(latest / "trainer_state.json")
        history = pd.DataFrame(state["log_history"]).set_index("step")
        shown = history.columns.intersection(["loss", "rewards/margins", "rewards/accuracies"])
        panels = history[shown].dropna().plot(subplots=True, figsize=(7, 2.2 * len(shown)))
        panels[0].figure.savefig(folder / "curves.png")


def train_beside(config: RunConfig, prepared: Path, options: list[str]) -> None:
    """The part of a machine that does not lead: the same training, and no file of the run's.

    Its config and log stand beside the folder, which the leading machine may just be moving aside.
    Raises UserError if it ends badly.
    """
    folder, rank = config.output_dir, machine_rank(options)
    beside = folder.with_name(f"{folder.name}.rank{rank}.yaml")
    log = beside.with_suffix(".log")
    write_text(beside, yaml.safe_dump(config.settings, sort_keys=False))
    ended = launch(beside, prepared, options, log, lock=None)
    if ended.code:
        raise UserError(f"training ended with code {ended.code}: {ended.error}; see {log}")
    print(f"machine {rank} is done; machine 0 keeps the adapter")


def train(config: RunConfig, prepared: Path, options: list[str], inputs: dict, lock: int) -> None:
    """Train under the run's `lock`, and mark the run as finished if it is. Raises UserError."""
    folder = config.output_dir
    log = folder / "train.log"
    if (folder / "inputs").exists() and not made_of(folder / "inputs", inputs):
        number = next(n for n in count(1) if not Path(f"{folder}.{n}").exists())
        print(f"other inputs: the old run is now {folder.rename(f'{folder}.{number}')}")
    (folder / "made.json").unlink(missing_ok=True)
    mark_made(folder / "inputs", inputs)
    write_text(folder / "config.yaml", yaml.safe_dump(config.settings, sort_keys=False))
    clear_torn(folder)
    try:
        ended = launch(folder / "config.yaml", prepared, options, log, lock)
    except KeyboardInterrupt:
        reason = "training was stopped before its end"
        raise UserError(f"{reason}; {where_it_goes_on(config)}") from None
    check_ended(ended, config, log)
    for base in folder.glob("model*.safetensors"):  # axolotl saves it beside an adapter of DPO
        base.unlink()
    mark_made(folder, inputs)


def run_once(config: RunConfig, options: list[str]) -> None:
    """Train what is not trained yet. Raises UserError."""
    check_model_folder(config.base_model)
    check_output_dir(config.output_dir, config.path)
    for entry in config.settings["datasets"]:
        check_dataset(entry["path"])
    if machine_rank(options):  # machine 0 has the lock, and may see the same disk
        return train_if_needed(config, options, lock=None)
    folder = config.output_dir
    with appending(folder.with_name(f"{folder.name}.lock")) as lock:
        train_if_needed(config, options, lock.fileno())


def train_if_needed(config: RunConfig, options: list[str], lock: int | None) -> None:
    """Train unless it is done; without a `lock` as a machine that does not lead. UserError."""
    tokenizer = load_student_tokenizer(config.settings)
    config = replace(config, settings=fit_student(config.settings, tokenizer))
    folder, inputs = config.output_dir, inputs_of(config)
    if is_trained(folder, inputs):
        return print(f"{folder} is trained on this data with this config")
    check_machine(config, on_cpu="--cpu" in options)
    check_keys(config.settings, config.path)
    check_rows(config, tokenizer)
    prepared = folder / f"prepared-{digest(json.dumps(inputs))}"
    if lock is None:
        return train_beside(config, prepared, options)
    train(config, prepared, options, inputs, lock)
    plot_curves(folder)
    print(f"adapter in {folder}, its loss in {folder / 'curves.png'}")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", help="of axolotl_configs, or a YAML; unknown options go to accelerate launch")
    add_task_options(parser)
    parser.set_defaults(data=None)  # the config's own
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--name", help="of the run and its folder (default: TASK-CONFIG-METHOD, as far as told)")
    option("--launch", choices=LAUNCHES, help="several GPUs: DeepSpeed ZeRO-2 or FSDP2")
    args, options = parser.parse_known_args()
    told = (args.method, args.set, args.launch, args.name, task_of(args), args.data)
    config = resolve_config(args.config, *told, cpu="--cpu" in options)
    run_once(config, [*LAUNCHES.get(args.launch, []), *options])


if __name__ == "__main__":
    run(main)
