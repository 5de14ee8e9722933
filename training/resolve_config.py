"""The config that a run trains: a complete YAML, with a method, a launch and keys laid over it."""

import json
from dataclasses import replace

import yaml

from common.cli import UserError
from training.run_config import CONFIGS, RunConfig, load_run_config

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
    if name == "fsdp2" and settings.get("load_in_4bit"):
        raise UserError(
            "FSDP2 cannot split 4-bit weights; take --launch zero2, or LoRA in bf16 by "
            "--set adapter=lora load_in_4bit=false"
        )
    if name == "zero2":
        return settings | {"deepspeed": str(CONFIGS / "launch/zero2.json")}
    return settings | yaml.safe_load((CONFIGS / "launch/fsdp2.yaml").read_text())


def check_keys(keys: set[str]) -> None:
    """Raise UserError for keys that axolotl's schema does not know; axolotl would ignore them."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    if unknown := keys - AxolotlInputConfig.model_fields.keys():
        raise UserError(f"axolotl knows no key {', '.join(sorted(unknown))}; see its documentation")


def parse_value(text: str) -> object:
    """JSON, whose 1e-5 is a number, else YAML, whose words need no quotes."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def with_key(settings: dict, assignment: str) -> dict:
    """`settings` with `key=value` in them, or `datasets.0.path=value`. Raises UserError."""
    name, _, text = assignment.partition("=")
    *path, last = name.split(".")
    place = settings = json.loads(json.dumps(settings))
    try:
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        place[last] = parse_value(text)
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError):
        text = ""
    if not text:
        raise UserError(f"--set {assignment}: give it as key=value, e.g. learning_rate=1e-5")
    return settings


def resolve_config(
    name: str,
    method: str | None,
    keys: list[str],
    launch: str | None,
    run: str | None,
    task=None,
    data=None,
) -> RunConfig:
    """The config that a run trains; it is not on disk yet. Raises UserError."""
    config = load_run_config(name, trained=False)
    settings = with_method(config.settings, method) if method else config.settings
    if keys:
        check_keys({key.partition("=")[0].split(".")[0] for key in keys})
    for assignment in keys:
        settings = with_key(settings, assignment)
    if launch:
        settings = with_launch(settings, launch)
    if task and task.name != "summarize":
        run = run or f"{task.name}-{config.path.stem}{f'-{method}' if method else ''}"
    if run := run or (f"{config.path.stem}-{method}" if method else None):
        output = config.output_dir.parent / run
        settings |= {"output_dir": str(output), "dataset_prepared_path": str(output / "prepared")}
    return replace(config, settings=settings)
