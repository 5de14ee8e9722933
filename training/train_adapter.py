"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names; writes config.yaml as resolved, lengths.json (of the
prompts it is taught on), train.log, the adapter and curves.png into outputs/RUN, and made.json once
training said that it reached its end. A finished run is not repeated, a stopped or killed one goes
on from its last checkpoint, and a run on other data, templates or settings first moves the old
folder aside. Of several machines the first alone (--machine_rank 0) writes into the folder.

    python -m training.train_adapter qwen2-1.5b-dpo-sft-qlora --method ipo --set learning_rate=1e-5
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import TextIO

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
    Overlay,
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
from training.lengths import FILE as LENGTHS
from training.lengths import Lengths, lengths_of, write_lengths
from training.student import fit_student, load_student_tokenizer

#  50%|#####     | 1/2 [00:05<00:05, 5.0s/it]
PROGRESS = re.compile(r"\d+/\d+ \[[^\]]*\]")
# {'loss': '1.7', 'rewards/margins': '0.5', 'epoch': '0.5'}
LOSS = re.compile(r"'(?:rewards/)?(loss|margins)': '?([-\d.e+]+)")
# torch.OutOfMemoryError: ..., and not the subprocess.CalledProcessError of accelerate
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
AXOLOTLS_ENVIRONMENT = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "AXOLOTL_LOG_LEVEL": "INFO",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # Ray's workers stay in this folder, where a config's paths lead
}
# In a run's folder, and the systems there that no training changes.
ANSWERS, OF_THE_BASE = Path("eval/answers"), ("base", "instructed")
# What version 0.3.7 recorded of a run; runs of its time are compared by these.
INPUTS_OF_0_3_7 = {"task", "prompts_dir", "config", "base_model", "adapter", "dataset"}


def check_machine(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError for what the config asks for and this machine does not have."""
    check_model_folder(config.base_model)
    if config.first_adapter:
        check_first_adapter(config.first_adapter)
    if not config.settings.get("use_ray"):  # the workers' machines are others
        check_gpu(config, on_cpu)
    here = next(folder for folder in config.output_dir.absolute().parents if folder.exists())
    if shutil.disk_usage(here).free < 2**30:
        raise UserError(f"{here} has less than 1 GiB free, which training writes about")


def check_gpu(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError for a GPU, or a kind of it, that the config asks for and is not here."""
    import torch

    settings = config.settings
    flash = str(settings.get("attn_implementation")).startswith("flash")
    bf16 = settings.get("bf16") and CPU_BF16 not in (settings.get("plugins") or [])
    if (flash or bf16) and (on_cpu or not torch.cuda.is_available()):
        asked = "flash attention" if flash else "bf16"
        raise UserError(f"{config.path.name} asks for {asked}, and no GPU is in use here")
    if flash and torch.cuda.get_device_capability() < (8, 0):
        raise UserError("flash attention needs an Ampere GPU; --set attn_implementation=sdpa")


def check_first_adapter(name: str) -> None:
    """Raise UserError for a folder without an adapter, or with half a trained one."""
    if is_local(name) and not (Path(name) / "adapter_model.safetensors").is_file():
        raise UserError(f"no adapter in {name} to go on from; train it, or --set lora_model_dir=")
    check_finished(Path(name))


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
    paths = [place] if place.is_file() else sorted(place.rglob("*.*"))
    return [path for path in paths if path.is_file() and path.suffix != ".md"]


def named_files(entry: dict) -> list[Path]:
    """The local files that an entry of a config's datasets names by `data_files`."""
    named = entry.get("data_files") or []
    of_splits = list(named.values()) if isinstance(named, dict) else [named]
    files = []
    for names in of_splits:
        for name in [names] if isinstance(names, str) else names:
            files += files_in(Path(name))
    return files


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: task, templates, config, base, adapter, datasets."""
    task, settings, first_adapter = config.task, config.settings, config.first_adapter
    prompts = task.folder.parent
    entries = [*settings["datasets"], *(settings.get("test_datasets") or [])]
    states = [[entry["path"], *dataset_state(entry)] for entry in entries]
    named_shas = []
    for entry in entries:
        named_shas += [file_sha(path) for path in named_files(entry)]
    inputs = {
        "task": task.name,
        "prompts_dir": None if prompts == FOLDER else str(prompts.absolute()),
        "config": settings,
        "base_model": weights_fingerprint(config.base_model),
        "adapter": None,
        "dataset": states[0],
        # Version 0.3.7 did not record these.
        "student": task.student_sha(),
        "base_settings": settings_fingerprint(config.base_model),
        "adapter_settings": None,
        "datasets": states,
        "data_files": named_shas,
    }
    if first_adapter:
        inputs["adapter"] = weights_fingerprint(first_adapter)
        inputs["adapter_settings"] = settings_fingerprint(first_adapter)
    return inputs


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
    present = as_read_today(json.loads(json.dumps(inputs)))
    return all(present.get(key) == as_read_today(value) for key, value in recorded.items())


def is_trained(folder: Path, inputs: dict) -> bool:
    """Whether the training in `folder` ended well, on these inputs."""
    return (folder / "adapter_model.safetensors").is_file() and made_of(folder, inputs)


@dataclass(frozen=True)
class Ended:
    """How a launch of axolotl ended."""

    code: int
    completed: bool  # whether it said that the last step was done
    error: str  # the last line that names one


@dataclass(frozen=True)
class Launch:
    """How axolotl is started on a run's YAML."""

    config: Path
    prepared: Path  # the folder of its prepared rows
    options: tuple[str, ...]  # of accelerate
    log: Path
    lock: int | None = None  # a file descriptor that the process keeps open, even if this one ends
    by_ray: bool = False

    def line(self) -> list[str]:
        """The command as one types it."""
        # Rows that another run prepared, or this one of other data, are never taken, whatever the
        # config names: so the folder is given here and not in the YAML.
        prepared = f"--dataset_prepared_path={self.prepared}"
        training = ["-m", "axolotl.cli.train", str(self.config), prepared]
        if self.by_ray:
            return ["python", *training]
        return ["accelerate", "launch", *self.options, *training]

    def command(self) -> list[str]:
        """The same with this Python."""
        line = self.line()
        if self.by_ray:
            return [sys.executable, *line[1:]]
        return [sys.executable, "-m", "accelerate.commands.launch", *line[2:]]


def machine_rank(options: tuple[str, ...]) -> int:
    """Which of several machines this one is, by accelerate's options; 0 leads."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--machine_rank", "--machine-rank", type=int, default=0)
    return parser.parse_known_args(options)[0].machine_rank


def run_axolotl(launch: Launch) -> Ended:
    """Train, and show how it goes.

    Raises KeyboardInterrupt once all that was started has ended.
    """
    print(f"{shlex.join(launch.line())}\n(loads for 20 s; output: {launch.log})", flush=True)
    process = Popen(
        launch.command(),
        env=os.environ | AXOLOTLS_ENVIRONMENT,
        pass_fds=[] if launch.lock is None else [launch.lock],
        stdout=PIPE,
        stderr=STDOUT,
        text=True,
        errors="replace",
    )
    try:
        with launch.log.open("a", buffering=1, encoding="utf-8") as log:
            completed, error = follow(process.stdout, log)
    except KeyboardInterrupt:
        stop(process)
        raise
    return Ended(process.wait(), completed, error)


def follow(lines: Iterable[str], log: TextIO) -> tuple[bool, str]:
    """Copy axolotl's output to `log`; show progress and warnings. (completed, last error)."""
    completed, error = False, "no error line"
    figures: dict[str, str] = {}
    warnings: set[str] = set()
    for line in lines:  # they end with \r too
        log.write(line)
        completed = completed or COMPLETED in line
        figures |= dict(LOSS.findall(line))
        if bar := PROGRESS.search(line):
            show_progress(bar[0], figures)
        elif said := ERROR.match(line.strip()):
            error = one_line(said[0])
        elif warning := warning_in(line):
            if warning not in warnings:
                print(f"\raxolotl: {warning}\x1b[K", file=sys.stderr, flush=True)
            warnings.add(warning)
    print(file=sys.stderr)
    return completed, error


def show_progress(bar: str, figures: dict[str, str]) -> None:
    """Write steps, time and the last figures over the line that stands there."""
    values = ", ".join(f"{name} {value}" for name, value in figures.items())
    print(f"\r{bar} {values}\x1b[K", end="", file=sys.stderr, flush=True)


def warning_in(line: str) -> str:
    """What a line of axolotl's warns of; "" for nothing that a user should see."""
    said = WARNING.search(COLOUR.sub("", line))
    if not said:
        return ""
    warning = one_line(said["warning"] or said["loss"])
    return "" if warning.startswith(NOISE) else warning


def stop(process: Popen) -> None:
    """End a training and all that it started; return when they have let go of the run.

    A Ctrl-C at the terminal reaches them too, and axolotl then saves what it has and leaves, which
    takes a while. A second one kills them; what it tears the next run clears (`clear_torn`).
    """
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:  # it has ended by itself
        started = []
    started.append(process)
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.terminate()
    try:
        for _ in process.stdout:
            pass
    except KeyboardInterrupt:
        for child in started:
            with suppress(psutil.NoSuchProcess):
                child.kill()
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
        history = pd.DataFrame(read_json(latest / "trainer_state.json")["log_history"])
        shown = history.columns.intersection(["loss", "rewards/margins", "rewards/accuracies"])
        history = history.dropna(subset=shown)
        if shown.empty or history.empty:
            print("no step was logged (logging_steps), so there is no curves.png")
            return
        panels = history.set_index("step")[shown].plot(subplots=True, figsize=(7, 2.2 * len(shown)))
        panels[0].figure.savefig(folder / "curves.png")
        print(f"its loss is in {folder / 'curves.png'}")


@dataclass(frozen=True)
class Training:
    """A training that is due."""

    config: RunConfig
    inputs: dict  # what it depends on (`inputs_of`)
    options: tuple[str, ...] = ()  # of accelerate
    lengths: Lengths | None = None  # of the prompts it is taught on, where they can be told

    @property
    def prepared(self) -> Path:
        """Where its prepared rows lie: of these inputs alone."""
        return self.config.output_dir / f"prepared-{digest(json.dumps(self.inputs))}"


def train_beside(training: Training) -> None:
    """The part of a machine that does not lead: the same training, and no file of the run's.

    Its config and log stand beside the folder, which the leading machine may just be moving aside.
    Raises UserError if it ends badly.
    """
    folder, rank = training.config.output_dir, machine_rank(training.options)
    beside = folder.with_name(f"{folder.name}.rank{rank}.yaml")
    log = beside.with_suffix(".log")
    write_settings(beside, training.config)
    ended = run_axolotl(Launch(beside, training.prepared, training.options, log))
    if ended.code:
        raise UserError(f"training ended with code {ended.code}: {ended.error}; see {log}")
    print(f"machine {rank} is done; machine 0 keeps the adapter")


def train(training: Training, lock: int) -> None:
    """Train under the run's `lock`, and mark the run as finished if it is. Raises UserError."""
    config, folder = training.config, training.config.output_dir
    set_aside(folder, training.inputs)
    begin(training)
    log = folder / "train.log"
    launch = Launch(folder / "config.yaml", training.prepared, training.options, log, lock)
    launch = replace(launch, by_ray=bool(config.settings.get("use_ray")))
    try:
        ended = run_axolotl(launch)
    except KeyboardInterrupt:
        reason = "training was stopped before its end"
        raise UserError(f"{reason}; {where_it_goes_on(config)}") from None
    check_ended(ended, config, log)
    for base in folder.glob("model*.safetensors"):  # axolotl saves it beside an adapter of DPO
        base.unlink()
    (folder / "README.md").unlink(missing_ok=True)  # axolotl's card of a run; ours tells more
    mark_made(folder, training.inputs)


def set_aside(folder: Path, inputs: dict) -> None:
    """Move a run's folder of other inputs to the next free number behind its name.

    The answers of its untrained base stay too: they are found again by all that made them.
    """
    if not (folder / "inputs").exists() or made_of(folder / "inputs", inputs):
        return
    numbered = (folder.with_name(f"{folder.name}.{number}") for number in count(1))
    free = next(path for path in numbered if not path.exists())
    print(f"other inputs: the old run is now {folder.rename(free)}")
    for answers in (free / ANSWERS).glob("*.jsonl"):
        if answers.stem in OF_THE_BASE:
            (folder / ANSWERS).mkdir(parents=True, exist_ok=True)
            shutil.copy(answers, folder / ANSWERS)


def begin(training: Training) -> None:
    """Write what the run is trained on and with, and clear what a kill left half-written.

    From here on the run is unfinished: it is no more than its inputs until `train` marks it.
    """
    folder = training.config.output_dir
    (folder / "made.json").unlink(missing_ok=True)
    mark_made(folder / "inputs", training.inputs)
    write_settings(folder / "config.yaml", training.config)
    write_lengths(folder, training.lengths)
    clear_torn(folder)


def write_settings(path: Path, config: RunConfig) -> None:
    write_text(path, yaml.safe_dump(config.settings, sort_keys=False))


def run_once(config: RunConfig, options: tuple[str, ...]) -> None:
    """Train what is not trained yet. Raises UserError."""
    check_model_folder(config.base_model)
    check_output_dir(config.output_dir, config.path)
    for entry in config.settings["datasets"]:
        check_dataset(entry["path"])
    if config.settings.get("use_ray") and options:
        reason = "Ray starts the workers itself, and reads no options of accelerate"
        raise UserError(f"{reason} ({shlex.join(options)}); --set ray_num_workers=8")
    if machine_rank(options):  # machine 0 has the lock, and may see the same disk
        train_if_needed(config, options, lock=None)
        return
    folder = config.output_dir
    with appending(folder.with_name(f"{folder.name}.lock")) as lock:
        train_if_needed(config, options, lock.fileno())


def train_if_needed(config: RunConfig, options: tuple[str, ...], lock: int | None) -> None:
    """Train unless it is done; without a `lock` as a machine that does not lead. UserError."""
    tokenizer = load_student_tokenizer(config.settings)
    config = replace(config, settings=fit_student(config.settings, tokenizer))
    folder, inputs = config.output_dir, inputs_of(config)
    if is_trained(folder, inputs):
        print(f"{folder} is trained on this data with this config")
        if lock is not None and not (folder / LENGTHS).exists():
            note_lengths(config, tokenizer)
        return
    check_machine(config, on_cpu="--cpu" in options)
    check_keys(config.settings, config.path)
    lengths = lengths_of(check_rows(config, tokenizer))
    training = Training(config, inputs, options, lengths)
    if lock is None:
        train_beside(training)
        return
    train(training, lock)
    print(f"adapter in {folder}")
    plot_curves(folder)


def note_lengths(config: RunConfig, tokenizer) -> None:
    """Write the lengths of the prompts into a finished run of 0.5.0 or before, which did not."""
    try:
        write_lengths(config.output_dir, lengths_of(check_rows(config, tokenizer)))
    except UserError as error:  # rows that were not looked at as closely then
        warn(f"nothing tells how long the prompts are that it was taught on: {error}")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", help="of axolotl_configs, or a YAML; unknown options go to accelerate launch")
    add_task_options(parser)
    parser.set_defaults(data=None)  # the config's own
    option("--method", help="preset of axolotl_configs/methods.yaml in the place of its own method")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--name", help="of the run and its folder (default: TASK-CONFIG-METHOD, as far as told)")
    option("--launch", choices=LAUNCHES, help="several GPUs: DeepSpeed ZeRO-2, FSDP2 or Ray")
    args, options = parser.parse_known_args()
    overlay = Overlay(
        task=task_of(args),
        data=args.data,
        method=args.method or "",
        launch=args.launch or "",
        run=args.name or "",
        cpu="--cpu" in options,
        keys=tuple(args.set),
    )
    config = resolve_config(args.config, overlay)
    run_once(config, (*LAUNCHES.get(args.launch, ()), *options))


if __name__ == "__main__":
    run(main)
