"""The config that a run trains: a YAML, with task, method, launch and keys laid over it."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import yaml

from common.cli import UserError
from prompts.task import Task, load_task
from training.run_config import CONFIGS, RunConfig, SettingsLoader, check_settings, load_run_config

CPUINFO, CPU_BF16 = Path("/proc/cpuinfo"), "training.plugins.CpuBf16"
WHERE_DATA_ARE = ("path", "split", "revision", "data_files", "ds_type")
LAUNCHES = {"zero2": ["--use_deepspeed"], "fsdp2": ["--use_fsdp", "--fsdp_version", "2"]}


def load_methods() -> dict[str, dict]:
    return yaml.safe_load((CONFIGS / "methods.yaml").read_text())


def with_method(settings: dict, name: str) -> dict:
    """`settings` with the preset `name` in the place of their own method. Raises UserError."""
    methods = load_methods()
    if name not in methods:
        raise UserError(f"no method {name}; methods.yaml has {', '.join(methods)}")
    # What only a method has goes with it; a warm-up of the config's own stays where none is given.
    of_methods = {key for one in methods.values() for key in one} - {"warmup_ratio", "warmup_steps"}
    kept = {key: value for key, value in settings.items() if key not in of_methods}
    changed = kept | methods[name]
    (shape,) = changed["datasets"]
    changed["datasets"] = [
        {key: entry[key] for key in WHERE_DATA_ARE if key in entry} | shape
        for entry in settings["datasets"]
    ]
    times = changed.pop("learning_rate_times", None)
    if times and "learning_rate" not in settings:
        raise UserError(f"--method {name} is told by the config's learning_rate, which is missing")
    if times:
        changed["learning_rate"] *= times
    return {key: value for key, value in changed.items() if value is not None}


def load_by_name(name: str):
    """What stands under a dotted name, such as training.plugins.CpuBf16."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def keys_of(schema) -> set[str]:
    """The names under which a pydantic model reads its fields."""
    keys = set()
    for name, field in schema.model_fields.items():
        choices = getattr(field.validation_alias, "choices", None) or [field.validation_alias]
        keys |= {name, field.alias, *(one for one in choices if isinstance(one, str))}
    return keys


def unknown_keys(told: set[str], plugins: list[str]) -> set[str]:
    """Those that neither axolotl nor a plugin reads, which axolotl leaves out. UserError."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    unknown = told - keys_of(AxolotlInputConfig)
    for name in plugins if unknown else []:
        try:
            if schema := load_by_name(name)().get_input_args():
                unknown -= keys_of(load_by_name(schema))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise UserError(f"plugins: {name} cannot be loaded: {error}") from None
    return unknown


def check_keys(settings: dict, path: Path) -> None:
    """Raise UserError for top-level keys that axolotl would leave out in silence."""
    told = {str(key) for key, value in settings.items() if value is not None}
    if unknown := unknown_keys(told, settings.get("plugins") or []):
        keys = ", ".join(sorted(unknown))
        raise UserError(f"{path}: axolotl knows no key {keys}, and would leave it out in silence")


def set_key(settings: dict, assignment: str) -> None:
    """Put `key=value` into `settings`, or `datasets.0.path=value`. Raises UserError."""
    name, _, text = assignment.partition("=")
    *path, last = name.split(".")
    if unknown_keys({name.split(".")[0]}, settings.get("plugins") or []):
        raise UserError(f"axolotl knows no key {name}; see its documentation")
    try:
        value = yaml.load(text, SettingsLoader)
        for key in path:
            settings = settings[int(key) if isinstance(settings, list) else key]
        settings[last] = value
        if not text:
            raise ValueError
    except (yaml.YAMLError, KeyError, IndexError, TypeError, ValueError):
        raise UserError(f"--set {assignment}: give it as key=value, e.g. seed=1") from None


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16, which is slower than 32 bits where it does not; oneDNN's
    own ONEDNN_MAX_CPU_ISA=AVX2 keeps one that does to 32 bits."""
    if os.getenv("ONEDNN_MAX_CPU_ISA") == "AVX2" or not CPUINFO.is_file():
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(CPUINFO.read_text().split())


def resolve_config(
    name: str, method="", keys=(), launch="", run="", task: Task | None = None, data=None, cpu=False
) -> RunConfig:
    """The config that a run trains, not yet on disk; bf16 where a `cpu` has it. UserError."""
    config, task = load_run_config(name, trained=False), task or load_task()
    settings = config.settings
    for entry in settings["datasets"]:
        folder = Path(entry["path"])
        if folder.parts[-2:] == ("summarize", "hub"):  # as `just stage` makes it
            entry["path"] = str(Path(data or folder.parents[1]) / task.name / "hub")
    if method:
        settings = with_method(settings, method)
    if launch:
        settings |= yaml.safe_load((CONFIGS / f"launch/{launch}.yaml").read_text())
    of_task = "" if task.name == "summarize" else task.name
    run = run or "-".join(filter(None, [of_task, config.name, method]))
    if run != config.name:
        output = config.output_dir.parent / run
        settings |= {"output_dir": str(output), "dataset_prepared_path": str(output / "prepared")}
    settings |= {"tf32": False} if cpu and settings.get("tf32") else {}  # transformers refuses it
    plugged = CPU_BF16 in (settings.get("plugins") or [])
    if cpu and "bf16=false" not in keys and cpu_has_bf16() and not plugged:
        print("this CPU computes in bf16, and so does the training (--set bf16=false: in 32 bits)")
        settings |= {"bf16": True, "plugins": [*(settings.get("plugins") or []), CPU_BF16]}
    for assignment in keys:
        set_key(settings, assignment)
    check_settings(settings, config.path)
    if settings.get("lora_model_dir"):
        plugins = [*(settings.get("plugins") or []), "training.plugins.FirstAdapter"]
        settings["plugins"] = [*dict.fromkeys(plugins)]
    return replace(config, settings=settings, asked_task=task)
