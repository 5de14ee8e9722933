"""The config that a run trains: a YAML with task, method, launch and keys laid over it."""

import json
from dataclasses import replace
from pathlib import Path

import yaml

from common.cli import UserError
from prompts import Task, load_task
from training.run_config import CONFIGS, RunConfig, is_local, load_run_config

DATA_KEYS = ("path", "split", "revision")  # of a dataset entry; the others are the method's
LAUNCHES = {  # name -> options of accelerate
    "zero2": ["--use_deepspeed"],
    "fsdp2": ["--use_fsdp", "--fsdp_version", "2"],
}


def load_methods() -> dict[str, dict]:
    return yaml.safe_load((CONFIGS / "methods.yaml").read_text())


def with_method(settings: dict, name: str) -> dict:
    """`settings` with the preset `name` in the place of their own method. Raises UserError."""
    methods = load_methods()
    if name not in methods:
        raise UserError(f"no method {name}; methods.yaml has {', '.join(methods)}")
    preset = dict(methods[name])
    # What only a method has goes with it; a warm-up of the config's own stays where none is given.
    of_methods = {key for one in methods.values() for key in one} - {"warmup_ratio", "warmup_steps"}
    entry, shape = settings["datasets"][0], preset.pop("datasets")[0]
    data = {key: entry[key] for key in DATA_KEYS if key in entry}
    rate = settings["learning_rate"] * preset.pop("learning_rate_times", 1)
    kept = {key: value for key, value in settings.items() if key not in of_methods}
    changed = kept | preset | {"learning_rate": rate, "datasets": [data | shape]}
    return {key: value for key, value in changed.items() if value is not None}


def with_launch(settings: dict, name: str) -> dict:
    """`settings` for several GPUs. Raises UserError for 4 bits by FSDP2."""
    if name == "zero2":
        return settings | {"deepspeed": str(CONFIGS / "launch/zero2.json")}
    if settings.get("load_in_4bit"):
        raise UserError(
            "FSDP2 cannot split 4-bit weights; take --launch zero2, or LoRA in bf16 by "
            "--set adapter=lora load_in_4bit=false"
        )
    return settings | yaml.safe_load((CONFIGS / "launch/fsdp2.yaml").read_text())


def with_task(settings: dict, task: str, data: Path | None) -> dict:
    """`settings` on the task's own dataset, where they name a folder as `just stage` makes it."""
    path = Path(settings["datasets"][0]["path"])
    if path.name != "hub" or not is_local(str(path)):
        return settings
    place = (data or path.parent.parent) / task / "hub"
    return settings | {"datasets": [settings["datasets"][0] | {"path": str(place)}]}


def with_key(settings: dict, assignment: str) -> dict:
    """`settings` with `key=value` in them, or `datasets.0.path=value`. Raises UserError."""
    name, _, text = assignment.partition("=")
    *path, last = name.split(".")
    place = settings = json.loads(json.dumps(settings))
    try:
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        try:
            place[last] = json.loads(text)  # to which 1e-5 is a number
        except ValueError:
            place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError):
        text = ""
    if not text:
        raise UserError(f"--set {assignment}: give it as key=value, e.g. learning_rate=1e-5")
    return settings


def check_keys(keys: set[str]) -> None:
    """Raise UserError for keys that axolotl's schema does not know; axolotl would ignore them."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    if unknown := keys - AxolotlInputConfig.model_fields.keys():
        raise UserError(f"axolotl knows no key {', '.join(sorted(unknown))}; see its documentation")


def resolve_config(
    name: str,
    method: str | None = None,
    keys: list[str] = (),
    launch: str | None = None,
    run: str | None = None,
    task: Task | None = None,
    data: Path | None = None,
) -> RunConfig:
    """The config that a run trains; it is not on disk yet. Raises UserError.

    The run is called `run`, or by the config, with the method behind it and a task other than
    summarize before it.
    """
    config = load_run_config(name, trained=False)
    task = task or load_task()
    settings = with_task(config.settings, task.name, data)
    if method:
        settings = with_method(settings, method)
    if keys:
        check_keys({key.partition("=")[0].split(".")[0] for key in keys})
    for assignment in keys:
        settings = with_key(settings, assignment)
    if launch:
        settings = with_launch(settings, launch)
    of_task = None if task.name == "summarize" else task.name
    if run or method or of_task:
        own = "-".join(filter(None, [of_task, config.name, method]))
        output = config.output_dir.parent / (run or own)
        settings |= {"output_dir": str(output), "dataset_prepared_path": str(output / "prepared")}
    return replace(config, settings=settings, asked_task=task)
