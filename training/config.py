"""A training config: read, checked, resolved into what axolotl trains, and what it names on disk.

`load_run_config` reads the YAML of a run or a config; `resolve_config` lays task, method, launch
and keys over it. What tells two states of a model or a dataset apart is here, too.
"""

import os
import re
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import yaml

from common.cli import UserError, one_line
from common.files import digest, file_sha, read_json
from prompts.task import FOLDER, Task, load_task

CONFIGS, OUTPUTS = Path("axolotl_configs"), Path("outputs")
CPUINFO = Path("/proc/cpuinfo")
CPU_BF16, FIRST_ADAPTER = "training.plugins.CpuBf16", "training.plugins.FirstAdapter"
# What a plugin was called in the configs of earlier versions: 0.4.0 and before. Read as the same.
OLD_NAMES = {"demo.answer_logits.AnswerLogits": "training.plugins.AnswerLogits"}

# What a launch of axolotl_configs/launch needs of accelerate; Ray starts its workers itself.
LAUNCHES = {"zero2": ["--use_deepspeed"], "fsdp2": ["--use_fsdp", "--fsdp_version", "2"], "ray": []}
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")  # 2e-5, 1.5E6
NEEDED = "base_model, datasets and output_dir"
WHERE_DATA_ARE = ("path", "split", "revision", "data_files", "ds_type")
# What our own code reads of a config; all else is axolotl's to check.
KINDS = {
    "base_model": (str, "a folder or a Hub id"),
    "output_dir": (str, "a folder"),
    "datasets": (list, "a list"),
    "test_datasets": (list, "a list"),
    "plugins": (list, "a list"),
    "eot_tokens": (list, "a list"),
    "special_tokens": (dict, "keys and tokens"),
    "sequence_len": (int, "a whole number"),
    "learning_rate": ((int, float), "a number"),
    "rl": (str, "a method's name"),
    "lora_model_dir": (str, "a folder or a Hub id"),
    "dataset_prepared_path": (str, "a folder"),
    "revision_of_model": (str, "a revision"),
    "chat_template": (str, "a template's name"),
    "chat_template_jinja": (str, "a template"),
}
# A folder that holds one of these is a run's; others are not written to.
OF_A_RUN = ("inputs", "config.yaml", "train.log", "adapter_config.json", "checkpoint-*")
OF_A_RUN += ("prepared*", "merged", "eval")
# Beside its weights, what a model's answers depend on.
SETTING_FILES = ("config.json", "generation_config.json", "adapter_config.json", "*token*.json")
SETTING_FILES += ("*.model", "vocab.*", "merges.txt", "chat_template*", "*.jinja")


class SettingsLoader(yaml.SafeLoader):
    """YAML 1.2 where PyYAML's 1.1 surprises: 2e-5 is a number, and what looks like a date is text.

    axolotl reads the config.yaml that is written of it with PyYAML, to the same values.
    """


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))


# --- a config as it is read


@dataclass(frozen=True)
class RunConfig:
    """A training config, and what it names on disk or on the Hub."""

    path: Path
    settings: dict
    asked_task: Task | None = None  # of a config that is not trained yet

    # Read from the settings.
    base_model: str = field(init=False)
    base_revision: str | None = field(init=False)
    four_bits: bool = field(init=False)  # of the base, where it is trained on
    first_adapter: str | None = field(init=False)  # to go on from
    dataset: str = field(init=False)
    dataset_revision: str | None = field(init=False)
    output_dir: Path = field(init=False)
    name: str = field(init=False)
    merged: Path = field(init=False)
    eval_dir: Path = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        first_entry, output_dir = settings["datasets"][0], Path(settings["output_dir"])
        fields = {
            "base_model": settings["base_model"],
            "base_revision": settings.get("revision_of_model"),
            "four_bits": bool(settings.get("load_in_4bit")),
            "first_adapter": settings.get("lora_model_dir"),
            "dataset": first_entry["path"],
            "dataset_revision": first_entry.get("revision"),
            "output_dir": output_dir,
            "name": output_dir.name,
            "merged": output_dir / "merged",
            "eval_dir": output_dir / "eval",
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)  # the way of a frozen dataclass itself

    @property
    def task(self) -> Task:
        """The task that the run is trained for, summarize if nothing tells."""
        if self.asked_task:
            return self.asked_task
        made = read_json(self.output_dir / "inputs/made.json")
        return load_task(made.get("task", "summarize"), Path(made.get("prompts_dir") or FOLDER))


def read_settings(path: Path) -> dict:
    """The keys of a config's YAML. Raises UserError that names the file."""
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), SettingsLoader)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} must name {NEEDED}, as `key: value`")
    return with_present_names(settings)


def with_present_names(settings: dict) -> dict:
    """`settings` with its plugins under the names that they have today."""
    plugins = settings.get("plugins")
    if not isinstance(plugins, list):
        return settings
    names = [OLD_NAMES.get(name, name) if isinstance(name, str) else name for name in plugins]
    return settings | {"plugins": names}


def check_settings(settings: dict, path: Path) -> None:
    """Raise UserError that names file and key if `settings` cannot be a run's."""
    for key in ("base_model", "datasets", "output_dir"):
        if not settings.get(key):
            raise UserError(f"{path} must name {NEEDED}; {key} is missing or empty")
    for key, (kind, words) in KINDS.items():
        value = settings.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise UserError(f"{path}: {key} must be {words}, and is {one_line(repr(value), 80)}")
    for key in ("datasets", "test_datasets"):
        for number, entry in enumerate(settings.get(key) or []):
            if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
                raise UserError(f"{path}: {key}.{number} must have a path, a folder or a Hub id")


def load_run_config(name: str | Path, trained: bool = True) -> RunConfig:
    """A YAML by path, or by name that of a run, if `trained`, or a config's. Raises UserError."""
    path = find_config(name, trained)
    settings = read_settings(path)
    check_settings(settings, path)
    return RunConfig(path, settings)


def find_config(name: str | Path, trained: bool) -> Path:
    """The YAML that `load_run_config` reads. Raises UserError that tells what there is."""
    of_run, of_configs = OUTPUTS / name / "config.yaml", CONFIGS / f"{name}.yaml"
    places = [Path(name), of_run, of_configs] if trained else [Path(name), of_configs]
    for path in places:
        if path.is_file():
            return path
    configs = ", ".join(sorted(path.stem for path in CONFIGS.glob("*-*.yaml")))
    if trained:
        raise UserError(f"no run or config named {name}; there are the configs {configs}")
    there = f"there are the configs {configs}, and for --method {', '.join(load_methods())}"
    raise UserError(f"no config named {name}; {there}")


# --- what a config names on disk


def check_output_dir(folder: Path, path: Path) -> None:
    """Raise UserError if the `output_dir` that `path` names holds what is no run's."""
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents) or folder.is_file():
        raise UserError(f"{path}: output_dir {folder} is no folder of a run's own")
    holds_more = folder.is_dir() and any(folder.iterdir())
    if holds_more and not any(any(folder.glob(pattern)) for pattern in OF_A_RUN):
        raise UserError(f"{path}: output_dir {folder} holds other files; name a new folder")


def is_local(name: str) -> bool:
    """Whether a config means a folder or a file by `name`, not a Hub id."""
    return Path(name).exists() or name.startswith((".", "/", "data/", "models/", "outputs/"))


def check_model_folder(name: str) -> None:
    """Raise UserError if `name` is a folder that holds no model; Hub ids pass."""
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is not a model folder (it holds no config.json)")


def is_unfinished(folder: Path) -> bool:
    """Whether a training was begun in `folder` and never said that it ended well."""
    return (folder / "inputs/made.json").is_file() and not (folder / "made.json").is_file()


def check_finished(folder: Path) -> None:
    """Raise UserError if what lies in `folder` is half a training; folders of others pass."""
    if is_unfinished(folder):
        raise UserError(f"the training of {folder} has not ended; the same `just train` goes on")


def load_rows(config: RunConfig, split: str | None = None):
    """The rows of a split of the dataset, without `split` those that are trained on. UserError."""
    entry = config.settings["datasets"][0]
    if split:  # of the default subset, which holds the pairs
        entry = {"path": entry["path"], "revision": entry.get("revision"), "split": split}
    return load_entry(entry)


def check_dataset(path: str) -> None:
    """Raise UserError if `path` is a folder or file that is not there; Hub ids pass."""
    if is_local(path) and not Path(path).exists():
        raise UserError(f"no dataset {path}; make it with `just dataset`, or name one with --data")


def load_entry(entry: dict):
    """The rows of an entry of a config's datasets. Raises UserError."""
    from datasets import load_dataset

    path, split = entry["path"], entry.get("split") or "train"
    check_dataset(path)
    options = {"revision": entry.get("revision"), "data_files": entry.get("data_files")}
    file = Path(path)
    if file.is_file():  # as axolotl reads a file: by its kind
        kind_by_suffix = {".parquet": "parquet", ".csv": "csv"}
        path = entry.get("ds_type") or kind_by_suffix.get(file.suffix, "json")
        options["data_files"] = str(file)
    try:
        rows = load_dataset(path, entry.get("name"), split=split, **options)
    except Exception as error:  # the datasets package raises many kinds for a bad repo or folder
        reason = one_line(error, 200)
        raise UserError(f"no {split} split of {entry['path']} to load: {reason}") from None
    if not len(rows):
        raise UserError(f"the {split} split of {entry['path']} is empty")
    return rows


# --- what tells two models apart


def weights_fingerprint(model: str) -> str:
    """What tells the weights of two models apart: its name, and the files if they are local."""
    weights = sorted(Path(model).glob("*.safetensors"))
    return digest(" ".join([model, *map(file_sha, weights)]))[:12]


def settings_fingerprint(model: str) -> str:
    """What tells two local models of the same weights apart: tokenizer, chat template, configs."""
    files = set()
    for pattern in SETTING_FILES:
        files |= {path for path in Path(model).glob(pattern) if path.is_file()}
    return digest(*(f"{path.name} {file_sha(path)}" for path in sorted(files)))[:12]


def fingerprint(model: str) -> str:
    """What tells two models apart by all that their answers depend on."""
    return digest(weights_fingerprint(model), settings_fingerprint(model))[:12]


# --- what a command line lays over a config


@dataclass(frozen=True)
class Overlay:
    """What a command line lays over a config; later fields win."""

    task: Task | None = None  # None: summarize
    data: Path | None = None  # the folder of the tasks' data; None: the config's own
    method: str = ""  # a preset of methods.yaml
    launch: str = ""  # of LAUNCHES
    run: str = ""  # the run's name; "": after task, config and method
    cpu: bool = False  # trained on a CPU, in bf16 where it has that
    keys: tuple[str, ...] = ()  # key=value, axolotl's


def resolve_config(name: str | Path, overlay: Overlay = Overlay()) -> RunConfig:
    """The config that a run trains, not yet on disk. Raises UserError."""
    config = load_run_config(name, trained=False)
    task = overlay.task or load_task()
    settings = with_data_of(task, overlay.data, config.settings)
    if overlay.method:
        settings = with_method(settings, overlay.method)
    if overlay.launch:
        settings |= yaml.safe_load((CONFIGS / f"launch/{overlay.launch}.yaml").read_text())
    run = overlay.run or name_of_run(task, config.name, overlay.method)
    if run != config.name:
        output = config.output_dir.parent / run
        settings |= {"output_dir": str(output), "dataset_prepared_path": str(output / "prepared")}
    if overlay.cpu:
        settings = on_cpu(settings, overlay.keys)
    for assignment in overlay.keys:
        set_key(settings, assignment)
    check_settings(settings, config.path)
    if settings.get("lora_model_dir"):
        settings = with_plugin(settings, FIRST_ADAPTER)
    return replace(config, settings=settings, asked_task=task)


def with_data_of(task: Task, data: Path | None, settings: dict) -> dict:
    """`settings` on the data of a task; datasets that `just stage` did not make stay."""
    entries = []
    for entry in settings["datasets"]:
        folder = Path(entry["path"])
        if folder.parts[-2:] == ("summarize", "hub"):
            folder = Path(data or folder.parents[1]) / task.name / "hub"
            entry = entry | {"path": str(folder)}
        entries.append(entry)
    return settings | {"datasets": entries}


def name_of_run(task: Task, config_name: str, method: str) -> str:
    """TASK-CONFIG-METHOD, without the task where it is summarize, and a method that is none."""
    name = config_name if task.name == "summarize" else f"{task.name}-{config_name}"
    return f"{name}-{method}" if method else name


def with_plugin(settings: dict, plugin: str) -> dict:
    """`settings` with a plugin more, unless it is there."""
    plugins = settings.get("plugins") or []
    if plugin in plugins:
        return settings
    return settings | {"plugins": [*plugins, plugin]}


def on_cpu(settings: dict, keys: tuple[str, ...]) -> dict:
    """`settings` for a CPU; in bf16 where it has that, unless `keys` turn it off."""
    if settings.get("tf32"):  # transformers refuses it
        settings = settings | {"tf32": False}
    bf16 = [yaml.safe_load(key.partition("=")[2]) for key in keys if key.startswith("bf16=")]
    is_there = CPU_BF16 in (settings.get("plugins") or [])
    if is_there or False in bf16 or not cpu_has_bf16():
        return settings
    print("this CPU computes in bf16, and so does the training (--set bf16=false: in 32 bits)")
    return with_plugin(settings, CPU_BF16) | {"bf16": True}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bf16, which is slower than 32 bits where it does not; oneDNN's
    own ONEDNN_MAX_CPU_ISA=AVX2 keeps one that does to 32 bits."""
    if os.getenv("ONEDNN_MAX_CPU_ISA") == "AVX2" or not CPUINFO.is_file():
        return False
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(CPUINFO.read_text().split())


def load_methods() -> dict[str, dict]:
    return yaml.safe_load((CONFIGS / "methods.yaml").read_text())


def with_method(settings: dict, name: str) -> dict:
    """`settings` with the preset `name` in the place of their own method. Raises UserError."""
    methods = load_methods()
    if name not in methods:
        raise UserError(f"no method {name}; methods.yaml has {', '.join(methods)}")
    # What only a method has goes with it; a warm-up of the config's own stays where none is given.
    of_methods = set().union(*methods.values()) - {"warmup_ratio", "warmup_steps"}
    kept = {key: value for key, value in settings.items() if key not in of_methods}
    changed = kept | methods[name]
    (shape,) = changed["datasets"]
    changed["datasets"] = [where_data_are(entry) | shape for entry in settings["datasets"]]
    times = changed.pop("learning_rate_times", None)
    if times and "learning_rate" not in settings:
        raise UserError(f"--method {name} is told by the config's learning_rate, which is missing")
    if times:
        changed["learning_rate"] *= times
    return {key: value for key, value in changed.items() if value is not None}


def where_data_are(entry: dict) -> dict:
    """An entry of a config's datasets without the shape that its method gives it."""
    return {key: entry[key] for key in WHERE_DATA_ARE if key in entry}


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


# --- which keys axolotl reads


def load_by_name(name: str):
    """What stands under a dotted name, such as training.plugins.CpuBf16."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def keys_of(schema) -> set[str]:
    """The names under which a pydantic model reads its fields."""
    keys = set()
    for name, of_field in schema.model_fields.items():
        alias = of_field.validation_alias
        choices = getattr(alias, "choices", None) or [alias]
        keys |= {name, of_field.alias}
        keys |= {choice for choice in choices if isinstance(choice, str)}
    return keys


def keys_of_plugin(name: str) -> set[str]:
    """The keys that a plugin of axolotl's reads. Raises UserError if it cannot be loaded."""
    try:
        schema = load_by_name(name)().get_input_args()
        return keys_of(load_by_name(schema)) if schema else set()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"plugins: {name} cannot be loaded: {error}") from None


def unknown_keys(told: set[str], plugins: list[str]) -> set[str]:
    """Those that neither axolotl nor a plugin reads, which axolotl leaves out. UserError."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    unknown = told - keys_of(AxolotlInputConfig)
    if unknown:
        for name in plugins:
            unknown -= keys_of_plugin(name)
    return unknown


def check_keys(settings: dict, path: Path) -> None:
    """Raise UserError for top-level keys that axolotl would leave out in silence."""
    told = {str(key) for key, value in settings.items() if value is not None}
    unknown = unknown_keys(told, settings.get("plugins") or [])
    if unknown:
        keys = ", ".join(sorted(unknown))
        raise UserError(f"{path}: axolotl knows no key {keys}, and would leave it out in silence")
