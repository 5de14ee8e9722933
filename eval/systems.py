"""The systems that an evaluation sets side by side, and the texts that they are given."""

import argparse
from dataclasses import replace
from pathlib import Path

from common.cli import UserError, positive
from common.files import is_made, load_records, read_json
from data_prep.load_extracts import load_extracts, without_reply
from inference.answers import System
from inference.weights import Weights, check_template, weights_in, weights_of_run
from prompts.task import Task, add_task_options, cut_to_words, task_of
from training.config import (
    OUTPUTS,
    Overlay,
    RunConfig,
    check_model_folder,
    load_rows,
    load_run_config,
    resolve_config,
)

WITHOUT_MODEL = ("lead", "lead-1", "second")
CHOICES = "base, instructed, tuned, consensus, lead, lead-1, second, a folder, "
CHOICES += "endpoint[-bare]:MODEL, or one of these cut to its first words, as instructed:12-words"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every stage of an evaluation takes."""
    parser.add_argument("config", help="the run's name, or its axolotl YAML")
    parser.add_argument("--n", type=positive, help="only the first N texts")
    parser.add_argument("--systems", nargs="+", help=f"of {CHOICES} (default: the task's)")
    add_task_options(parser)


def run_of(args: argparse.Namespace) -> RunConfig:
    """The run that `args` names, or the config if it is not trained for the task. UserError."""
    own = OUTPUTS / f"{args.task}-{args.config}" / "config.yaml"
    config = load_run_config(own if own.is_file() else args.config)
    if args.task in ("summarize", config.task.name):
        return config
    return resolve_config(args.config, Overlay(task=task_of(args), data=args.data))


def systems_of(config: RunConfig, names: list[str] | None) -> dict[str, System]:
    """The systems by name, by default the task's; of one that is cut to words the one that answers.
    Raises UserError, see `system_of`."""
    answering = [cut_to_words(name)[0] for name in names or config.task.systems]
    return {name: system_of(config, name) for name in answering}


def template_of(task: Task, name: str) -> str | None:
    """The template around the text that a system of this name is given."""
    return task.student_template(instructed=name.partition(":")[0] in ("instructed", "endpoint"))


def system_of(config: RunConfig, name: str) -> System:
    """One system. Raises UserError if it is not there, or is an adapter of another base."""
    kind, _, model = name.partition(":")
    template = template_of(config.task, name)
    if name in WITHOUT_MODEL:
        return System(None)
    if model and kind in ("endpoint", "endpoint-bare"):
        return System(model, template)
    if name in ("base", "instructed"):
        check_model_folder(config.base_model)
        weights = Weights(config.base_model, config.base_revision)
    elif name in ("tuned", "consensus"):
        weights = weights_of_run(config)
        check_template(config.output_dir, config.task)
        if is_made(config.merged, weights.settings):
            weights = Weights(str(config.merged))
    elif Path(name).is_dir():
        weights = weights_in(Path(name))
        if weights.adapter and weights.model != config.base_model:
            raise UserError(f"{name} is an adapter of {weights.model}, not of {config.base_model}")
        revision = weights.revision or (weights.adapter and config.base_revision)
        weights = replace(weights, revision=revision)
    else:
        raise UserError(f"no system {name}: --systems takes {CHOICES}")
    return System(weights, template, name == "consensus")


def origin_of(model: str) -> dict[str, str]:
    """What a model folder that is not quite the model that it is called after tells of itself, as
    `demo/prepare_parts.py` writes it: `base`, a Hub id, and `weights`, which of it; else {}."""
    return read_json(Path(model) / "origin.json")


def told_base(config: RunConfig) -> str:
    """A run's base, named as what it is."""
    origin = origin_of(config.base_model)
    named = f"{config.base_model}@{config.base_revision}" if config.base_revision else ""
    named = named or config.base_model
    return f"{named}: {origin['base']}, {origin['weights']}" if origin else named


def sampled_system(config: RunConfig) -> System:
    """The tuned model, of which all sampled answers are kept. Raises UserError as `system_of`."""
    return replace(system_of(config, "tuned"), every_sample=True)


def load_test_rows(config: RunConfig, n: int | None) -> list[dict]:
    """[{id, source, text, reference, second}] of the first `n` test texts, in their order.

    Raises UserError for rows that are not of the task, or whose text cannot be told.
    """
    found = load_rows(config, "test")
    if lacking := {"id", "prompt", "chosen"} - set(found.column_names):
        raise UserError(f"the test split of {config.dataset} lacks {', '.join(sorted(lacking))}")
    try:
        rows = [
            {
                "id": str(r["id"]),
                "source": r.get("source") or "unknown",
                "text": r.get("text") or config.task.text_of(r["prompt"][-1]["content"]),
                "reference": r["chosen"][-1]["content"],
                "second": r["rejected"][-1]["content"] if r.get("rejected") else "",
            }
            for r in found
        ][:n]
    except (LookupError, TypeError):
        form = "prompt and chosen are to be lists of messages {role, content}"
        raise UserError(f"the test split of {config.dataset} is not ours: {form}") from None
    if bare := [row["id"] for row in rows if not row["reference"].strip()]:
        raise UserError(f"{len(bare)} test texts of {config.dataset} lack a reference: {bare}")
    return rows


def train_rows(config: RunConfig, data: Path, n: int | None) -> list[dict]:
    """[{id, text}] of the first `n` training extracts to which the teacher replied."""
    path = data / config.task.name / "replies/train.jsonl"
    replied = {reply["id"] for reply in load_records(path, ("id",), "just replies")}
    extracts = load_extracts(data / "extracts/train.jsonl")
    return [row for row in extracts if row["id"] in replied][:n]


def unseen_rows(config: RunConfig, data: Path, n: int | None) -> list[dict]:
    """[{id, text}] of the first `n` training extracts to which no teacher replied, so that no run
    was trained on them. Raises UserError if there are none."""
    path = data / config.task.name / "replies/train.jsonl"
    extracts = {row["id"]: row for row in load_extracts(data / "extracts/train.jsonl")}
    rows = list(without_reply(extracts, path).values())[:n]
    if not rows:
        raise UserError(f"every extract in {data}/extracts has a reply; `just extracts` for more")
    return rows
