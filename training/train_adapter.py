"""Check what a training config needs, then run `accelerate launch -m axolotl.cli.train` on it.

Reads the YAML and the dataset it names; writes config.yaml as resolved, train.log, the adapter and
curves.png into outputs/RUN. A finished run is not repeated, a killed one goes on from its last
checkpoint, and a run on other data or settings first moves the old folder aside.

    python -m training.train_adapter qwen2-1.5b-dpo-sft-qlora --method ipo --set learning_rate=1e-5
"""

import os
import re
import shlex
import shutil
import sys
from itertools import count
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import pandas as pd
import yaml
from huggingface_hub import HfApi

from common.cli import UserError, one_line, run, script_parser, warn
from common.files import appending, file_sha, is_made, mark_made, read_json, write_text
from prompts import FOLDER, add_task_options, task_of
from training.resolve_config import CPU_BF16, LAUNCHES, resolve_config
from training.run_config import RunConfig, check_model_folder, fingerprint, is_local, load_rows

PROGRESS = re.compile(r"\d+/\d+ \[[^\]]*\]")
LOSS = re.compile(r"'(?:rewards/)?(loss|margins)': '?([-\d.e+]+)")
ERROR = re.compile(r"(?!subprocess\.)((\w+\.)*\w*(Error|Exception|Interrupt)\b|Value error,).*")


def check_machine(config: RunConfig, on_cpu: bool) -> None:
    """Raise UserError for what the config asks for and this machine does not have."""
    import torch

    get, first = config.settings.get, config.first_adapter
    check_model_folder(config.base_model)
    if first and is_local(first) and not (Path(first) / "adapter_model.safetensors").is_file():
        raise UserError(f"no adapter in {first} to go on from; train it, or --set lora_model_dir=")
    flash = str(get("attn_implementation")).startswith("flash")
    bf16 = get("bf16") and CPU_BF16 not in get("plugins", [])
    if (flash or bf16) and (on_cpu or not torch.cuda.is_available()):
        asked = "flash attention" if flash else "bf16"
        raise UserError(f"{config.path.name} asks for {asked}, and no GPU is in use here")
    if flash and torch.cuda.get_device_capability() < (8, 0):
        raise UserError("flash attention needs an Ampere GPU; --set attn_implementation=sdpa")
    here = next(folder for folder in config.output_dir.absolute().parents if folder.exists())
    if shutil.disk_usage(here).free < 2**30:
        raise UserError(f"{here} has less than 1 GiB free, which training writes about")


def check_rows_fit(config: RunConfig) -> None:
    """Raise UserError with the ids of rows that do not fit; a config that drops them is warned."""
    from transformers import AutoTokenizer

    rows, limit = load_rows(config), config.settings["sequence_len"]
    tokenizer = AutoTokenizer.from_pretrained(config.base_model, revision=config.base_revision)
    sides = [side for side in ("chosen", "rejected") if side in rows.column_names]
    if "rejected" in sides and any(talk is None for talk in rows["rejected"]):
        raise UserError(f"{config.dataset} lacks rejected answers: --method sft, or `just pairs`")

    def longest(row: dict) -> dict:
        """Tokens of a row as trained on, of the longer of its conversations."""
        talks = [row["prompt"] + row[side] for side in sides] or [row["messages"]]
        texts = [talk.rstrip() for talk in tokenizer.apply_chat_template(talks, tokenize=False)]
        return {"length": max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))}

    lengths = rows.map(longest, desc="checking lengths")["length"]
    ids = rows["id"] if "id" in rows.column_names else range(len(rows))
    long = [str(i) for i, length in zip(ids, lengths, strict=True) if length > limit]
    found = f"{len(long)} of {len(rows)} rows are longer than sequence_len {limit} (the longest "
    found += f"{max(lengths)} tokens): {', '.join(long[:5])}"
    if long and config.settings.get("excess_length_strategy") == "raise":
        raise UserError(f"{found}; raise it, or `just pairs --check length={limit}` drops them")
    if long:
        warn(f"{found}; the config leaves them out")


def inputs_of(config: RunConfig) -> dict:
    """What the run depends on, by content: task, config, base model, dataset."""
    tasks, data = config.task.folder.parent, Path(config.dataset)
    files = [data] if data.is_file() else sorted(data.rglob("*.*"))
    state = [file_sha(file) for file in files if file.is_file() and file.suffix != ".md"]
    if not is_local(config.dataset):
        try:
            state = [config.dataset_revision or HfApi().dataset_info(config.dataset).sha]
        except Exception as error:  # offline, or no such repo: loading the rows will say so
            warn(f"{data} is not pinned, so a change goes unnoticed: {one_line(error, 99)}")
    return {
        "task": config.task.name,
        "prompts_dir": None if tasks == FOLDER else str(tasks.absolute()),
        "config": config.settings,
        "base_model": fingerprint(config.base_model),
        "adapter": config.first_adapter and fingerprint(config.first_adapter),
        "dataset": [config.dataset, *state],
    }


def train(folder: Path, options: list[str], lock: int) -> None:
    """Run axolotl, which keeps `lock` even if this process is killed. Raises UserError."""
    log, error, seen = folder / "train.log", "no error line", {}
    launch = [*options, "-m", "axolotl.cli.train", str(folder / "config.yaml")]
    print(f"accelerate launch {shlex.join(launch)}\n(loads for 20 s; output: {log})", flush=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    io = {"stdout": PIPE, "stderr": STDOUT, "text": True, "errors": "replace"}
    process = Popen(command, env=os.environ | {"AXOLOTL_DO_NOT_TRACK": "1"}, pass_fds=[lock], **io)
    with process, log.open("a", buffering=1, encoding="utf-8") as file:
        for line in process.stdout:  # lines end with \r too
            file.write(line)
            seen |= dict(LOSS.findall(line))
            if bar := PROGRESS.search(line):
                values = ", ".join(f"{name} {value}" for name, value in seen.items())
                print(f"\r{bar[0]} {values}\x1b[K", end="", file=sys.stderr, flush=True)
            elif found := ERROR.match(line.strip()):
                error = one_line(found[0])
    print(file=sys.stderr)
    if process.returncode or not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"training ended with code {process.returncode}: {error}; see {log}")
    for base in folder.glob("model*.safetensors"):  # axolotl saves it beside an adapter of DPO
        base.unlink()


def plot_curves(folder: Path) -> None:
    """Write curves.png: the loss and, for preference training, reward margin and accuracy."""
    for latest in sorted(folder.glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime)[-1:]:
        history = pd.DataFrame(read_json(latest)["log_history"]).set_index("step")
        shown = history.columns.intersection(["loss", "rewards/margins", "rewards/accuracies"])
        panels = history[shown].dropna().plot(subplots=True, figsize=(7, 2.2 * len(shown)))
        panels[0].figure.savefig(folder / "curves.png")


def run_once(config: RunConfig, options: list[str]) -> None:
    """Train what is not trained yet, under the run's lock. Raises UserError."""
    folder, inputs = config.output_dir, inputs_of(config)
    if is_made(folder, inputs):
        return print(f"{folder} is trained on this data with this config")
    with appending(folder.with_name(f"{folder.name}.lock")) as lock:
        check_machine(config, on_cpu="--cpu" in options)
        check_rows_fit(config)
        if (folder / "inputs").exists() and not is_made(folder / "inputs", inputs):
            number = next(n for n in count(1) if not Path(f"{folder}.{n}").exists())
            print(f"other inputs: the old run is now {folder.rename(f'{folder}.{number}')}")
        mark_made(folder / "inputs", inputs)
        write_text(folder / "config.yaml", yaml.safe_dump(config.settings, sort_keys=False))
        train(folder, options, lock.fileno())
    mark_made(folder, inputs)
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
