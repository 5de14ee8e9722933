"""What the glue needs to know of an axolotl config: base model, dataset, output folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from common.cli import UserError, one_line
from common.files import file_sha
from prompts import Task, load_task

CONFIGS, OUTPUTS = Path("axolotl_configs"), Path("outputs")


@dataclass(frozen=True)
class RunConfig:
    """A training config, and what it names on disk or on the Hub."""

    path: Path
    settings: dict

    @property
    def base_model(self) -> str:
        return self.settings["base_model"]

    @property
    def dataset(self) -> str:
        return self.settings["datasets"][0]["path"]

    @property
    def output_dir(self) -> Path:
        return Path(self.settings["output_dir"])

    @property
    def name(self) -> str:
        """The run's name, which is that of its folder."""
        return self.output_dir.name

    @property
    def four_bits(self) -> bool:
        """Whether the run trains on a base whose weights are rounded to 4 bits."""
        return bool(self.settings.get("load_in_4bit"))

    @property
    def base_revision(self) -> str | None:
        return self.settings.get("revision_of_model")

    @property
    def overrides(self) -> dict | None:
        """What the run changes in the model's own configuration, such as the scaling of rope."""
        return self.settings.get("overrides_of_model_config")

    @property
    def first_adapter(self) -> str | None:
        """The trained adapter that training goes on from, if any."""
        return self.settings.get("lora_model_dir")

    @property
    def dataset_revision(self) -> str | None:
        return self.settings["datasets"][0].get("revision")

    @property
    def merged(self) -> Path:
        return self.output_dir / "merged"

    @property
    def eval_dir(self) -> Path:
        return self.output_dir / "eval"

    @property
    def task(self) -> Task:
        """What the run was trained for."""
        path = self.output_dir / "inputs/made.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        folder = [Path(made["prompts_dir"])] if "prompts_dir" in made else []
        return load_task(made.get("task", "summarize"), *folder)


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
    raise UserError(
        f"{path} is not a training config: it must name base_model, datasets and output_dir"
    )


def is_local(name: str) -> bool:
    """Whether a config means a folder or a file by `name`, not a Hub id."""
    return Path(name).exists() or name.startswith((".", "/", "data/", "models/", "outputs/"))


def check_model_folder(name: str) -> None:
    """Raise UserError if `name` is a folder that holds no model; Hub ids pass."""
    if is_local(name) and not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is not a model folder (it holds no config.json)")


def check_dataset(name: str) -> None:
    """Raise UserError if `name` is a folder or file that is not there; Hub ids pass."""
    if is_local(name) and not Path(name).exists():
        raise UserError(f"the config's dataset {name} is not there; make it with `just dataset`")


def check_inputs(config: RunConfig) -> None:
    """Raise UserError if base, dataset or first adapter are to be here and are not."""
    check_model_folder(config.base_model)
    check_dataset(config.dataset)
    first = config.first_adapter
    if first and is_local(first) and not (Path(first) / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{config.path.name} goes on from the adapter in {first}, which is not there; train "
            f"it first with `just train {Path(first).name}`, or --set lora_model_dir=FOLDER"
        )


def load_rows(config: RunConfig, split: str | None = None):
    """The rows of a split of the config's dataset; without `split`, those that it trains on.

    Raises UserError if they cannot be had, or there are none.
    """
    from datasets import load_dataset

    check_dataset(config.dataset)
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
