"""What the glue needs to know of an axolotl config: base model, dataset, task, output folder."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from common.cli import UserError, one_line
from common.files import digest, file_sha, read_json
from prompts import FOLDER, Task, load_task

CONFIGS, OUTPUTS = Path("axolotl_configs"), Path("outputs")


@dataclass(frozen=True)
class RunConfig:
    """A training config, and what it names on disk or on the Hub."""

    path: Path
    settings: dict
    asked_task: Task | None = None  # of a config that is not trained yet

    base_model = property(lambda self: self.settings["base_model"])
    base_revision = property(lambda self: self.settings.get("revision_of_model"))
    four_bits = property(lambda self: bool(self.settings.get("load_in_4bit")))  # of its base
    first_adapter = property(lambda self: self.settings.get("lora_model_dir"))  # to go on from
    dataset = property(lambda self: self.settings["datasets"][0]["path"])
    dataset_revision = property(lambda self: self.settings["datasets"][0].get("revision"))
    output_dir = property(lambda self: Path(self.settings["output_dir"]))
    name = property(lambda self: self.output_dir.name)
    merged = property(lambda self: self.output_dir / "merged")
    eval_dir = property(lambda self: self.output_dir / "eval")

    @property
    def task(self) -> Task:
        """The task that the run is trained for, summarize if nothing tells."""
        made = read_json(self.output_dir / "inputs/made.json")
        folder = Path(made.get("prompts_dir") or FOLDER)
        return self.asked_task or load_task(made.get("task", "summarize"), folder)


def load_run_config(name: str | Path, trained: bool = True) -> RunConfig:
    """A YAML by path, or by name that of a run, if `trained`, or a config's. Raises UserError."""
    places = [Path(name), OUTPUTS / name / "config.yaml", CONFIGS / f"{name}.yaml"]
    path = next((p for p in places if p.is_file() and (trained or p != places[1])), None)
    if not path:
        there = ", ".join(sorted(path.stem for path in CONFIGS.glob("*-*.yaml")))
        what = "run or config" if trained else "config"
        raise UserError(f"no {what} named {name}; there are the configs {there}")
    try:
        config = RunConfig(path, yaml.safe_load(path.read_text()))
        if config.base_model and config.dataset and config.output_dir:
            return config
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from None
    except (KeyError, IndexError, TypeError):
        pass  # it names less than a run needs
    raise UserError(f"{path} must name base_model, datasets and output_dir")


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
    from datasets import load_dataset

    path, entry = config.dataset, config.settings["datasets"][0]
    if is_local(path) and not Path(path).exists():
        raise UserError(f"no dataset {path}; make it with `just dataset`, or name one with --data")
    name, split = (None, split) if split else (entry.get("name"), entry.get("split", "train"))
    try:
        rows = load_dataset(path, name, split=split, revision=config.dataset_revision)
    except Exception as error:  # the datasets package raises many kinds for a bad repo or folder
        raise UserError(f"no {split} split of {path} to load: {one_line(error, 200)}") from None
    if not len(rows):
        raise UserError(f"the {split} split of {path} is empty")
    return rows


def fingerprint(model: str) -> str:
    """What tells two states of a model apart: its name, and its weights if they are local."""
    weights = sorted(Path(model).glob("*.safetensors"))
    return digest(" ".join([model, *map(file_sha, weights)]))[:12]
