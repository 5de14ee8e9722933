"""Push a config's adapter, or with --merged its merged model, to the Hub with a card of our own.

Reads outputs/<config>/ (the adapter, merged/, eval/scores.json), the config's dataset and the
base's page on the Hub; writes outputs/<config>/model_card.md and outputs/<config>.hub.lock. What
the repo holds already is treated as common/hub.py says.

    python -m eval.publish_adapter axolotl_configs/qwen2-1.5b-dpo-sft-qlora.yaml me/name --dry-run
"""

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from common.cli import UserError, run, script_parser, warn
from common.files import is_made, replacing
from common.hub import CARD, add_hub_options, hub_session, publish
from data_prep.build_dataset import teacher_terms
from data_prep.publish_dataset import lock_of, row_hashes
from eval.build_report import table
from eval.merge_adapter import merge_settings
from eval.score_summaries import MORE_TITLES, TITLES
from prompts import render
from training.run_config import RunConfig, check_dataset, fingerprint, load_run_config
from training.train_adapter import inputs_of

TEMPLATE = "summarize/model_card.md.jinja"
ADAPTER_CONFIG = "adapter_config.json"
OF_ADAPTER = re.compile(
    r"adapter_(model|config)\..*|chat_template\.jinja|.*(token|vocab|merges).*\.(json|txt|model)"
)
OF_THIS_MACHINE = ("_name_or_path", "is_local", "local_files_only")
MACHINE_PATH = re.compile(r"(?<![\w:/.])~?(?:/[\w.+-]+)*/([\w.+-]+)")


def check_adapter(config: RunConfig) -> dict:
    """The adapter's own config. Raises UserError if there is none or it is not of this config."""
    merge_settings(config)
    adapter = json.loads((config.output_dir / ADAPTER_CONFIG).read_text())
    again = f"`just train {config.path.stem}` trains anew"
    if not (config.output_dir / "made.json").exists():
        warn(f"{config.output_dir} has no made.json: nothing tells that this config trained it")
    elif not is_made(config.output_dir, inputs_of(config)):
        raise UserError(f"config, base or data changed since {config.output_dir} was made; {again}")
    return adapter


def load_scores(config: RunConfig) -> dict:
    """The adapter's scores. Raises UserError if there are none, or they are another adapter's."""
    path, name = config.eval_dir / "scores.json", config.path.stem
    scores = json.loads(path.read_text()) if path.exists() else {}
    scored = scores.get("settings", {}).get("generation", {}).get("tuned", {})
    merged = is_made(config.merged, merge_settings(config)) and fingerprint(str(config.merged))
    if merged and scored.get("fingerprint") == merged:
        return scores
    raise UserError(
        f"{path} {'is of another adapter' if scores else 'is not there'}; run `just merge {name}`, "
        f"`just summaries {name}`, `just scores {name}`, or pass --unevaluated"
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
    from datasets import load_dataset

    check_dataset(config.dataset)
    entry, revision = config.settings["datasets"][0], config.dataset_revision
    split, folder = entry.get("split", "train"), Path(config.dataset)
    rows = load_dataset(config.dataset, entry.get("name"), split=split, revision=revision)
    test = load_dataset(config.dataset, split="test", revision=revision)
    pushed, hashes = {"repo": config.dataset, "revision": revision}, row_hashes(folder)
    if folder.exists():
        lock = json.loads(lock_of(folder).read_text()) if lock_of(folder).exists() else {}
        pushed = lock if lock.get("hashes") == hashes else {}
    teacher = test[0].get("teacher", "unknown")
    return {
        "n_rows": len(rows),
        "split": split,
        "data_repo": pushed.get("repo"),
        "data_revision": pushed.get("revision"),
        "data_hash": hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:12],
        "sources": sorted(test.unique("source")) if "source" in test.features else ["see there"],
        "teacher": teacher,
        "teacher_terms": teacher_terms(teacher),
    }


def metadata(facts: dict) -> str:
    """The card's front matter, with the scores as `model-index`."""
    scores, repo, merged = facts["scores"], facts["data_repo"], facts["merged"]
    titles = TITLES | MORE_TITLES
    results = [
        EvalResult(
            task_type="summarization",
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
    data = ModelCardData(
        **facts["licence"],
        language="en",
        base_model=facts["base"],
        base_model_relation="merge" if merged else "adapter",
        datasets=repo,
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["summarization", "lora", "axolotl"],
        model_name=facts["name"],
        eval_results=results or None,
    )
    return data.to_yaml().strip()


def files_of(config: RunConfig, facts: dict) -> dict[str, bytes | Path]:
    """Path in the repo -> content, all but the card. Raises UserError if merged/ is not there."""
    folder = config.merged if facts["merged"] else config.output_dir
    if facts["merged"] and not is_made(folder, merge_settings(config)):
        raise UserError(
            f"{folder} is not there or out of date; run `just merge {config.path.stem}`"
        )
    files = {
        path.name: path
        for path in sorted(folder.glob("[!.]*.*"))
        if OF_ADAPTER.fullmatch(path.name) or (facts["merged"] and path.name != "made.json")
    }
    for name in {"config.json", "tokenizer_config.json", ADAPTER_CONFIG} & files.keys():
        settings = json.loads(files[name].read_text())
        if name == ADAPTER_CONFIG:
            settings |= {"base_model_name_or_path": facts["base"], "revision": facts["revision"]}
        kept = {key: value for key, value in settings.items() if key not in OF_THIS_MACHINE}
        files[name] = (json.dumps(kept, indent=2) + "\n").encode()
    return {**files, config.path.name: facts["recipe"].encode()}


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", type=Path, help="the axolotl YAML of the run")
    add_hub_options(parser)
    option("--merged", action="store_true", help="push the merged model instead, into its own repo")
    option("--base", help="NAME[@REVISION] of the base on the Hub, if the config names a folder")
    option("--unevaluated", action="store_true", help="publish without scores; the card says so")
    args = parser.parse_args()
    config = load_run_config(args.config)
    rank = check_adapter(config)["r"]
    scores = {} if args.unevaluated else load_scores(config)
    facts = {
        "repo": args.repo,
        "name": args.repo.split("/")[-1],
        "merged": args.merged,
        "four_bits": bool(config.settings.get("load_in_4bit")),
        "scores": scores,
        "table": table(scores) if scores else "",
        "config": config.path.name,
        "recipe": MACHINE_PATH.sub(r"\1", config.path.read_text()),
        "versions": [f"{p} {version(p)}" for p in ("axolotl", "trl", "peft", "transformers")],
        "max_lora_rank": max(8, 1 << (rank - 1).bit_length()),  # vLLM's steps
        **base_on_hub(config, args.base),
        **data_facts(config),
    }
    files = files_of(config, facts)
    card = render(TEMPLATE, metadata=metadata(facts), **facts) + "\n"
    with replacing(config.output_dir / "model_card.md") as temporary:
        temporary.write_text(card)
    print(f"card: {config.output_dir / 'model_card.md'}")
    pushed = f"{config.output_dir.name}{'-merged' if args.merged else ''}.hub"
    lock = lock_of(config.output_dir.with_name(pushed))
    publish(args, "model", {CARD: card.encode(), **files}, lock)


if __name__ == "__main__":
    run(main)
