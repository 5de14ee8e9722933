"""What the glue needs to know of an axolotl config: base model, dataset, task, output folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.cli import UserError, one_line
from common.files import file_sha
from prompts import FOLDER, Task, load_task

CONFIGS, OUTPUTS = Path("axolotl_configs"), Path("outputs")


@dataclass(frozen=True)
class RunConfig:
    """A training config, and what it names on disk or on the Hub.

    `four_bits`: whether it trains on a base rounded to 4 bits; `overrides`: what it changes in the
    model's own configuration, such as the scaling of rope; `first_adapter`: where it goes on from.
    """

    path: Path
    settings: dict
    asked_task: Task | None = None  # of a config that is not trained yet

    base_model = property(lambda self: self.settings["base_model"])
    base_revision = property(lambda self: self.settings.get("revision_of_model"))
    overrides = property(lambda self: self.settings.get("overrides_of_model_config"))
    four_bits = property(lambda self: bool(self.settings.get("load_in_4bit")))
    first_adapter = property(lambda self: self.settings.get("lora_model_dir"))
    dataset = property(lambda self: self.settings["datasets"][0]["path"])
    dataset_revision = property(lambda self: self.settings["datasets"][0].get("revision"))
    output_dir = property(lambda self: Path(self.settings["output_dir"]))
    name = property(lambda self: self.output_dir.name)
    merged = property(lambda self: self.output_dir / "merged")
    eval_dir = property(lambda self: self.output_dir / "eval")

    @property
    def task(self) -> Task:
        """The task that the run is trained for, summarize if nothing tells."""
        if self.asked_task:
            return self.asked_task
        path = self.output_dir / "inputs/made.json"
        inputs = json.loads(path.read_text()) if path.is_file() else {}
        folder = Path(inputs.get("prompts_dir") or FOLDER)
        return load_task(inputs.get("task", "summarize"), folder)


def find_config(name: str | Path, trained: bool = True) -> Path:
    """The YAML of a trained run or of a config, by name, or a YAML by path.

    Without `trained` runs are passed over. Raises UserError if there is none.
    """
    run, config = OUTPUTS / name / "config.yaml", CONFIGS / f"{name}.yaml"
    for path in (Path(name), *([run] if trained else []), config):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.stem for path in CONFIGS.glob("*-*.yaml")))
    raise UserError(f"no {'run or ' * trained}config named {name}; there are the configs {there}")


def load_run_config(name: str | Path, trained: bool = True) -> RunConfig:
    """Read an axolotl YAML, see `find_config`. Raises UserError with one clear line."""
    path = find_config(name, trained)
    try:
        config = RunConfig(path, yaml.safe_load(path.read_text()))
        if all((config.base_model, config.dataset, config.output_dir)):
            return config
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    except (KeyError, IndexError, TypeError):
        pass
    wanted = "it must name base_model, datasets and output_dir"
    raise UserError(f"{path} is not a training config: {wanted}")


def is_local(name: str) -> bool:
    """Whether a config means a folder or a file by `name`, not a Hub id."""
    return Path(name).exists() or name.startswith((".", "/", "data/", "models/", "outputs/"))


def check_model_folder(name: str) -> None:
    """Raise UserError if `name` is a folder that holds no model; Hub ids pass."""
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is not a model folder (it holds no config.json)")


def load_rows(config: RunConfig, split: str | None = None):
    """The rows of a split of the config's dataset; without `split`, those that it trains on.

    Raises UserError if they cannot be had, or there are none.
    """
    from datasets import load_dataset

    if is_local(config.dataset) and not Path(config.dataset).exists():
        hint = "make it with `just dataset`, or name another with --data"
        raise UserError(f"the config's dataset {config.dataset} is not there; {hint}")
    entry = config.settings["datasets"][0]
    name, split = (None, split) if split else (entry.get("name"), entry.get("split", "train"))
    try:
        rows = load_dataset(config.dataset, name, split=split, revision=config.dataset_revision)
    except Exception as error:  # the datasets package raises many kinds for a bad repo or folder
        reason = one_line(error, 200)
        raise UserError(f"cannot load the {split} split of {config.dataset}: {reason}") from None
    if not len(rows):
        raise UserError(f"the {split} split of {config.dataset} is empty")
    return rows


def fingerprint(model: str) -> str:
    """What tells two states of a model apart: its name, and its weights if they are local."""
    weights = sorted(Path(model).glob("*.safetensors"))
    return hashlib.sha256(" ".join([model, *map(file_sha, weights)]).encode()).hexdigest()[:12]
