"""The systems that an evaluation sets side by side, and the test documents they are given."""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.cli import UserError, positive, script_parser
from common.files import read_records, write_records
from prompts import render, template_sha
from training.run_config import RunConfig, check_model_folder, load_rows

INSTRUCTED = "summarize/instructed.jinja"
SYSTEMS = ("base", "instructed", "tuned", "lead")
ENDPOINT = "endpoint:"


@dataclass(frozen=True)
class System:
    """A model and the template around the text, None for the bare text; lead has no model."""

    model: str | None
    revision: str | None = None
    template: str | None = None


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """The options that every stage of an evaluation takes."""
    parser.add_argument("config", help="the run: its name, or the path of its YAML")
    documents = parser.add_mutually_exclusive_group()
    documents.add_argument("--n", type=positive, help="only the first N test documents")
    documents.add_argument("--all", action="store_true", help="all test documents, as without --n")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=list(SYSTEMS),
        help="of base, instructed, tuned, lead, folders of models or adapters, endpoint:MODEL",
    )


def base_of_adapter(folder: Path) -> str | None:
    """The model that the adapter in `folder` was trained on, None if it holds no adapter."""
    path = folder / "adapter_config.json"
    return json.loads(path.read_text())["base_model_name_or_path"] if path.is_file() else None


def systems_of(config: RunConfig, names: list[str]) -> dict[str, System]:
    """The systems by name, in the order of the table.

    Raises UserError for one that is not there, and for an adapter of another base.
    """
    known = {
        "base": System(config.base_model, config.base_revision),
        "instructed": System(config.base_model, config.base_revision, INSTRUCTED),
        "tuned": System(str(config.merged)),
        "lead": System(None),
    }
    systems = {}
    for name in names:
        if name.startswith(ENDPOINT):
            systems[name] = System(name.removeprefix(ENDPOINT), None, INSTRUCTED)
            continue
        if name not in known and not Path(name).is_dir():
            choices = f"{', '.join(SYSTEMS)}, a folder that is there, or {ENDPOINT}MODEL"
            raise UserError(f"no system {name}: --systems takes {choices}")
        systems[name] = system = known.get(name) or System(name.rstrip("/"))
        base = system.model and base_of_adapter(Path(system.model))
        if base and base != config.base_model:
            raise UserError(f"{name} is an adapter of {base}, not of {config.base_model}")
        if name == "tuned" and not (config.merged / "config.json").is_file():
            hint = f"make it with `just merge {config.path.stem}`"
            raise UserError(f"{config.merged} is not a model folder (nothing merged); {hint}")
        if system.model and not base:
            check_model_folder(system.model)
    return systems


def summaries_path(config: RunConfig, name: str) -> Path:
    """outputs/<config>/eval/summaries/<system>.jsonl, the system's name made a file name."""
    return config.eval_dir / "summaries" / f"{re.sub(r'[^A-Za-z0-9.-]', '_', name)}.jsonl"


def load_test_rows(config: RunConfig, n: int | None) -> list[dict]:
    """[{id, source, text, reference}] of the first `n` test documents, in the dataset's order."""
    rows = [
        {
            "id": r["id"],
            "source": r.get("source") or "unknown",
            "text": r["prompt"][-1]["content"],
            "reference": r["chosen"][-1]["content"],
        }
        for r in load_rows(config, "test")
    ][:n]
    if bare := [row["id"] for row in rows if not row["reference"].strip()]:
        raise UserError(f"{len(bare)} test documents of {config.dataset} lack a reference: {bare}")
    return rows


def precision() -> str:
    """The number format of generation: bfloat16 on a GPU, float32 without one."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def model_config(name: str, revision: str | None, overrides: dict | None):
    """The model's configuration with the run's `overrides_of_model_config`, as axolotl sets them.

    A rope_scaling such as YaRN's (Peng et al. 2023) keeps the model's own rope base and lengthens
    its context by the factor; without one the model's own rope stands.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, revision=revision)
    for key, value in (overrides or {}).items():
        if key in ("rope_scaling", "rope_parameters"):
            config.rope_parameters = {**config.rope_parameters, **value}
            own = value.get("original_max_position_embeddings", config.max_position_embeddings)
            config.max_position_embeddings = int(own * value.get("factor", 1))
        else:
            setattr(config, key, value)
    return config


def lead_sentences(text: str, words: float) -> str:
    """As many of the text's first sentences as come nearest to `words`; never none."""
    from pysbd import Segmenter

    best = summary = ""
    beginning = " ".join(text[: 2000 + int(30 * words)].split())
    for sentence in Segmenter(language="en").segment(beginning):
        summary = f"{summary} {sentence}".strip()
        if not best or abs(len(summary.split()) - words) < abs(len(best.split()) - words):
            best = summary
    return best


def write_lead(rows: list[dict], path: Path) -> None:
    """The lead sentences of every text, as long as the references are on average."""
    words = float(np.mean([len(row["reference"].split()) for row in rows]))
    made = {"finish_reason": "stop", "settings": {"model": None, "words": words}}
    write_records(
        path, ({"id": r["id"], "text": lead_sentences(r["text"], words), **made} for r in rows)
    )


def ask_endpoint(
    name: str, system: System, rows: list[dict], path: Path, args: argparse.Namespace
) -> None:
    """Complete a system behind an endpoint, asked as the teacher is: budget, rate, resume."""
    from data_prep.teacher.ask import ask_all, teacher_options

    parser = script_parser("options of the endpoint")
    teacher_options(parser)
    fixed = ["--model", system.model, "--max-tokens", str(args.max_new_tokens), "--temperature=0"]
    options = parser.parse_args([*args.endpoint_options.split(), *fixed])
    sha = f"{template_sha(system.template)}-{args.max_new_tokens}"
    prompts = {row["id"]: render(system.template, text=row["text"]) for row in rows}
    requests = [
        {"id": key, "prompt_sha": sha, "messages": [{"role": "user", "content": prompt}]}
        for key, prompt in prompts.items()
    ]
    replies = path.with_name("endpoints") / path.name
    if left := ask_all(requests, replies, options, f"{name} summaries"):
        raise UserError(f"{left} of {len(rows)} texts have no summary by {name}; run again")
    settings = {"model": system.model, "template": sha, "decoding": "temperature 0"}
    wanted, made = {row["id"] for row in rows}, {"settings": settings}
    write_records(
        path,
        (
            made | {"id": r["id"], "text": r["text"].strip(), "finish_reason": r["finish_reason"]}
            for r in read_records(replies)
            if r["prompt_sha"] == sha and r["id"] in wanted
        ),
    )
