"""Push a run's adapter, or with --merged its merged model, to the Hub with a card of our own.

Reads outputs/RUN/ (the adapter, config.yaml, merged/, eval/scores.json), the run's dataset and the
base's page on the Hub; writes outputs/RUN/model_card.md and outputs/RUN.hub.lock. What the repo
holds already is treated as common/hub.py says.

    python -m eval.publish_adapter qwen2-1.5b-dpo-sft-qlora me/name --dry-run
"""

import argparse
import json
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from common.cli import UserError, run, script_parser, warn
from common.files import digest, is_made, write_text
from common.hub import CARD, add_hub_options, hub_session, publish
from data_prep.publish_dataset import lock_of, row_hashes
from data_prep.teacher.client import teacher_terms
from eval.build_report import table
from eval.load_model import merge_settings
from eval.score_answers import MORE_TITLES, TITLES, load_scores
from training.run_config import RunConfig, fingerprint, load_rows, load_run_config
from training.train_adapter import inputs_of

ADAPTER_CONFIG = "adapter_config.json"
OF_ADAPTER = re.compile(
    r"adapter_(model|config)\..*|chat_template\.jinja|.*(token|vocab|merges).*\.(json|txt|model)"
)
OWNED_KEYS = ("base_model", "base_model_relation", "datasets", "library_name", "model-index")
OURS = r"adapter_(config\.json|model\.safetensors)"  # would be loaded over a merged model
OF_THIS_MACHINE = ("_name_or_path", "is_local", "local_files_only")
MACHINE_PATH = re.compile(r"(?<![\w:/.])~?(?:/[\w.+-]+)*/([\w.+-]+)")


def check_adapter(config: RunConfig) -> None:
    """Raise UserError if there is no adapter or it is not of this config."""
    merge_settings(config)
    if not (config.output_dir / "made.json").exists():
        warn(f"{config.output_dir} has no made.json: nothing tells that this config trained it")
    elif not is_made(config.output_dir, inputs_of(config)):
        raise UserError(
            f"config, base or data changed since {config.output_dir} was made; "
            f"`just train {config.name}` trains anew"
        )


def scores_of(config: RunConfig) -> dict:
    """The adapter's scores. Raises UserError if there are none, or they are another adapter's."""
    try:
        scores = load_scores(config)
    except UserError as error:
        raise UserError(f"{error}, or pass --unevaluated") from None
    scored = scores["settings"]["generation"]["tuned"]["fingerprint"]
    if is_made(config.merged, merge_settings(config)) and scored == fingerprint(str(config.merged)):
        return scores
    raise UserError(
        f"the scores in {config.eval_dir} are of another adapter; run `just merge {config.name}`, "
        f"`just answers {config.name}`, `just scores {config.name}`, or pass --unevaluated"
    )


def base_on_hub(config: RunConfig, named: str | None) -> dict:
    """Name, revision and licence of the base. Raises UserError if others cannot get it."""
    local = Path(config.base_model).exists()
    if local and not named:
        raise UserError(
            f"the base {config.base_model} is a folder of this machine; name the repo where others "
            "find it with --base NAME[@REVISION]"
        )
    base, _, revision = (named or config.base_model).partition("@")
    revision = revision or config.base_revision
    with hub_session(base) as api:
        try:
            front = api.model_info(base, revision=revision).card_data or {}
        except (RepositoryNotFoundError, RevisionNotFoundError):
            raise UserError(f"the base {base} is not on the Hub at {revision or 'main'}") from None
    licence = {key: front.get(key) for key in ("license", "license_name", "license_link")}
    licence = {key: value for key, value in licence.items() if value}
    return {"base": base, "revision": revision, "local_base": local, "licence": licence}


def data_facts(config: RunConfig) -> dict:
    """What the card says of the training data; its repo only where exactly this was pushed."""
    rows, folder = load_rows(config), Path(config.dataset)
    pushed, hashes = {"repo": config.dataset, "revision": config.dataset_revision}, []
    if folder.exists():
        hashes, lock = row_hashes(folder), lock_of(folder)
        known = json.loads(lock.read_text()) if lock.exists() else {}
        pushed = known if known.get("hashes") == hashes else {}
    teacher = load_rows(config, "test")[0].get("teacher", "unknown")
    rejected = rows.unique("rejected_by") if "rejected_by" in rows.features else ["teacher"]
    return {
        "rejected_by": sorted(filter(None, rejected)),
        "n_rows": len(rows),
        "split": config.settings["datasets"][0].get("split", "train"),
        "data_repo": pushed.get("repo"),
        "data_revision": pushed.get("revision"),
        "data_hash": digest(*hashes)[:12],
        "sources": sorted(rows.unique("source")) if "source" in rows.features else ["see there"],
        "teacher": teacher,
        "teacher_terms": teacher_terms(teacher),
    }


def front_matter(facts: dict) -> str:
    """The card's front matter, with the scores as `model-index`."""
    scores, repo, hub = facts["scores"], facts["data_repo"], facts["hub"]
    titles = TITLES | MORE_TITLES
    results = [
        EvalResult(
            task_type=hub["task_category"],
            dataset_type=repo or "private",
            dataset_name=repo or "not on the Hub",
            dataset_split="test",
            dataset_revision=facts["data_revision"],
            metric_type=metric.split("_")[0],
            metric_name=f"{titles[metric]}, n = {scores['n']}",
            metric_value=round(value, 4),
        )
        for metric, value in (scores["systems"]["tuned"] if scores else {}).items()
        if metric in titles and metric.startswith(("bertscore_f1", "rouge"))
    ]
    return ModelCardData(
        **facts["licence"],
        language="en",
        base_model=facts["base"],
        base_model_relation="merge" if facts["merged"] else "adapter",
        datasets=repo,
        library_name="transformers" if facts["merged"] else "peft",
        pipeline_tag="text-generation",
        tags=[*hub["tags"], "lora", "axolotl"],
        model_name=facts["name"],
        eval_results=results or None,
    ).to_yaml()


def files_of(config: RunConfig, facts: dict) -> dict[str, bytes | Path]:
    """Path in the repo -> content, all but the card. Raises UserError if merged/ is not there."""
    merged, folder = facts["merged"], config.merged if facts["merged"] else config.output_dir
    if merged and not is_made(folder, merge_settings(config)):
        raise UserError(f"{folder} is not there or out of date; run `just merge {config.name}`")
    files = {
        path.name: path
        for path in sorted(folder.glob("[!.]*.*"))
        if OF_ADAPTER.fullmatch(path.name) or (merged and path.name != "made.json")
    }
    for name in {"config.json", "tokenizer_config.json", ADAPTER_CONFIG} & files.keys():
        settings = json.loads(files[name].read_text())
        if name == ADAPTER_CONFIG:
            settings |= {"base_model_name_or_path": facts["base"], "revision": facts["revision"]}
        kept = {key: value for key, value in settings.items() if key not in OF_THIS_MACHINE}
        files[name] = (json.dumps(kept, indent=2) + "\n").encode()
    return {**files, facts["config"]: facts["recipe"].encode()}


def card_facts(config: RunConfig, args: argparse.Namespace) -> dict:
    """The variables of the model card; `args` are the command line's."""
    task, scores = config.task, {} if args.unevaluated else scores_of(config)
    rank = json.loads((config.output_dir / ADAPTER_CONFIG).read_text())["r"]
    resolved = config.output_dir / "config.yaml"
    recipe = resolved if resolved.is_file() else config.path
    text = f"The text to be given {task.hub['answer']}, and nothing else."
    return {
        "repo": args.repo,
        "name": args.repo.split("/")[-1],
        "merged": args.merged,
        "four_bits": config.four_bits,
        "hub": task.hub,
        "messages": task.student_messages(text, task.student_template()),
        "scores": scores,
        "table": table(scores, task) if scores else "",
        "config": f"{config.name}.yaml",
        "recipe": MACHINE_PATH.sub(r"\1", recipe.read_text()),
        "versions": [f"{p} {version(p)}" for p in ("axolotl", "trl", "peft", "transformers")],
        "max_lora_rank": max(8, 1 << (rank - 1).bit_length()),  # vLLM's steps
        **base_on_hub(config, args.base),
        **data_facts(config),
    }


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", help="the run's name, or its axolotl YAML")
    add_hub_options(parser)
    option("--merged", action="store_true", help="push the merged model instead, into its own repo")
    option("--base", help="NAME[@REVISION] of the base on the Hub, if the config names a folder")
    option("--unevaluated", action="store_true", help="publish without scores; the card says so")
    args = parser.parse_args()
    config = load_run_config(args.config)
    check_adapter(config)
    facts = card_facts(config, args)
    files = files_of(config, facts)
    card = config.task.render("model_card.md", metadata=front_matter(facts), **facts) + "\n"
    write_text(config.output_dir / "model_card.md", card)
    print(f"card: {config.output_dir / 'model_card.md'}")
    pushed = f"{config.output_dir.name}{'-merged' if args.merged else ''}.hub"
    lock = lock_of(config.output_dir.with_name(pushed))
    publish(args, "model", {CARD: card.encode(), **files}, lock, OWNED_KEYS, OURS)


if __name__ == "__main__":
    run(main)
