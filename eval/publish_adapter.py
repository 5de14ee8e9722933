"""Push a run's adapter, or with --merged its merged model, to the Hub with a card of our own.

Reads outputs/RUN/ (the adapter, config.yaml, merged/, eval/scores.json), the run's dataset and the
base's page on the Hub; writes outputs/RUN/model_card.md and outputs/RUN.hub.lock. What the repo
holds already is treated as common/hub.py says.

    python -m eval.publish_adapter qwen2-1.5b-dpo-sft-qlora me/name --dry-run
"""

import json
import re
from importlib.metadata import version
from pathlib import Path

import yaml
from huggingface_hub.utils import filter_repo_objects

from common.cli import UserError, run, script_parser
from common.files import digest, is_made, read_json, write_text
from common.hub import CARD, add_hub_options, hub_options, hub_session, publish
from data_prep.publish_dataset import lock_of, row_hashes
from data_prep.teacher.prices import teacher_terms
from eval.report import ALL_TITLES, table
from eval.score_answers import load_scores
from eval.systems import system_of
from inference.weights import weights_of_run
from training.config import RunConfig, load_rows, load_run_config
from training.train_adapter import inputs_of, is_trained

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OF_ADAPTER = [*ADAPTER, "*token*.json", "*token*.model", "vocab.*", "merges.txt", "*.jinja"]
OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
PLACE = re.compile(r'"[/~][^"]*/(?=[^"])')  # in JSON, all of a path but its last part


def without_places(settings: dict) -> dict:
    """`settings` with paths of this machine cut to their last part."""
    kept = {key: value for key, value in settings.items() if key not in OF_THIS_MACHINE}
    return json.loads(PLACE.sub('"', json.dumps(kept)))


def scores_of(config: RunConfig) -> dict:
    """The adapter's scores. Raises UserError if they are not there, or of another adapter."""
    scores = load_scores(config)
    scored = scores["settings"]["generation"].get("tuned", {}).get("fingerprint")
    if scored != system_of(config, "tuned").model.settings["fingerprint"]:
        hint = f"run `just eval {config.name}`, or pass --unevaluated"
        raise UserError(f"the scores in {config.eval_dir} are of another adapter; {hint}")
    return scores


def base_on_hub(config: RunConfig, named: str | None, dry_run: bool = False) -> dict:
    """The base's name, revision and front matter. Raises UserError if others cannot get it."""
    if not named and Path(config.base_model).exists():
        hint = "say where others find it with --base NAME[@REVISION]"
        raise UserError(f"the base {config.base_model} is a folder of this machine; {hint}")
    base, _, revision = (named or config.base_model).partition("@")
    revision = revision or config.base_revision
    with hub_session(base, may_lack_token=dry_run) as api:
        card = api.model_info(base, revision=revision).card_data
    return {"base": base, "revision": revision, "front": card.to_dict() if card else {}}


def pushed_data(config: RunConfig) -> dict:
    """Repo and revision of the run's dataset; its hash where this state was not pushed."""
    folder = Path(config.dataset)
    if not folder.exists():
        return {"repo": config.dataset, "revision": config.dataset_revision}
    hashes, known = row_hashes(folder), read_json(lock_of(folder))
    return known if known.get("hashes") == hashes else {"hash": digest(*hashes)[:12]}


def model_files(config: RunConfig, merged: bool, base: dict) -> dict[str, bytes | Path]:
    """Path in the repo -> content, all but the card. Raises UserError if merged/ is not there."""
    folder = config.merged if merged else config.output_dir
    if merged and not is_made(folder, weights_of_run(config).settings):
        raise UserError(f"{folder} is not there or out of date; run `just merge {config.name}`")
    found = sorted(path.name for path in folder.iterdir() if path.is_file())
    kinds = {"ignore_patterns": ["made.json"]} if merged else {"allow_patterns": OF_ADAPTER}
    files = {name: folder / name for name in filter_repo_objects(found, **kinds)}
    for name in {"config.json", "tokenizer_config.json", ADAPTER[0]} & files.keys():
        settings = without_places(read_json(files[name]))
        if name == ADAPTER[0]:
            settings |= {"base_model_name_or_path": base["base"], "revision": base["revision"]}
        files[name] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


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
    weights_of_run(config)  # raises where there is no adapter
    if not is_trained(config.output_dir, inputs_of(config)):
        what = f"{config.output_dir} was not made of this config, base and data"
        raise UserError(f"{what}; `just train` trains anew")
    scores = {} if args.unevaluated else scores_of(config)
    base = base_on_hub(config, args.base, args.dry_run)
    files = model_files(config, args.merged, base)
    recipe = yaml.safe_dump(without_places(config.settings), sort_keys=False)
    shown = {"config": config, "recipe": recipe, "scores": scores, "rows": load_rows(config)}
    shown |= {"titles": ALL_TITLES, "teacher_terms": teacher_terms, "version": version}
    shown |= {"repo": args.repo, "merged": args.merged, "data": pushed_data(config), **base}
    shown |= {"test": load_rows(config, "test")[0], "table": table}
    card = config.task.render("model_card.md", **shown) + "\n"
    write_text(config.output_dir / "model_card.md", card)
    print(f"card: {config.output_dir / 'model_card.md'}")
    files |= {CARD: card.encode(), f"{config.name}.yaml": recipe.encode()}
    lock = config.output_dir.with_name(f"{config.name}{'-merged' * args.merged}.hub.lock")
    obsolete = ADAPTER if args.merged else ()
    publish(hub_options(args), "model", files, lock, obsolete)


if __name__ == "__main__":
    run(main)
