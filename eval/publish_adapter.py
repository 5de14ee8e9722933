"""Push a run's adapter, or with --merged its merged model, to the Hub with a card of our own.

Reads outputs/RUN/ (the adapter, config.yaml, merged/, eval/ with scores and answers), the run's
dataset and the base's page on the Hub; writes outputs/RUN/model_card.md and outputs/RUN.hub.lock.
What the repo holds already is treated as common/hub.py says.

    python -m eval.publish_adapter qwen2-1.5b-dpo-sft-qlora me/name --dry-run
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from statistics import median_low

import yaml
from huggingface_hub.utils import filter_repo_objects

from common.cli import UserError, run, script_parser, warn
from common.files import digest, is_made, read_json, write_text
from common.hub import CARD, HubIsAway, add_hub_options, hub_options, hub_session, publish
from common.pages import project_link
from data_prep.publish_dataset import lock_of, row_hashes
from data_prep.teacher.prices import teacher_terms
from eval.measures import FIGURES
from eval.report import chief_values, find_example, table
from eval.score_answers import load_evaluation, load_scores
from eval.systems import origin_of, system_of
from inference.weights import weights_of_run
from training.config import RunConfig, load_rows, load_run_config
from training.lengths import FILE as LENGTHS
from training.lengths import read_lengths
from training.train_adapter import inputs_of, is_trained

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
OF_ADAPTER = [*ADAPTER, "*token*.json", "*token*.model", "vocab.*", "merges.txt", "*.jinja"]
OF_ADAPTER.append(LENGTHS)
OF_THIS_MACHINE = ("_name_or_path", "name_or_path", "is_local", "local_files_only")
# Settings that axolotl takes for other services, as comet_api_key or swanlab_lark_webhook_url.
SECRET = re.compile(r"(_api_key|_secret|_password|_webhook_url)$")
# In JSON, all but the last part of a path that leads out of the repo: "/home/me/x", "../x".
PLACE = re.compile(r'"(?:file://)?(?:/|~|\.\./)[^"]*/(?=[^"])')
OF_TEXTS = re.compile(r"^The texts: (.+?)\. The teacher's ", re.MULTILINE)  # in a dataset's card
LONGEST = 600  # characters of a text in the example


def for_others(settings: dict) -> dict:
    """`settings` without keys of services, paths of this machine cut to their last part."""

    def public(fields: dict) -> dict:
        private = {key for key in fields if key in OF_THIS_MACHINE or SECRET.search(key)}
        return {key: value for key, value in fields.items() if key not in private}

    return json.loads(PLACE.sub('"', json.dumps(settings)), object_hook=public)


def scores_of(config: RunConfig) -> dict:
    """The adapter's scores. Raises UserError if they are not there, or of another adapter."""
    scores = load_scores(config)
    scored = scores["settings"]["generation"].get("tuned", {}).get("fingerprint")
    if scored != system_of(config, "tuned").model.settings["fingerprint"]:
        hint = f"run `just eval {config.name}`, or pass --unevaluated"
        raise UserError(f"the scores in {config.eval_dir} are of another adapter; {hint}")
    return scores


def base_on_hub(config: RunConfig, named: str | None, dry_run: bool = False) -> dict:
    """The base's name, revision and front matter, and what the run's own copy of it is where that
    is other weights (`origin_of`). Raises UserError if others cannot get it."""
    if not named and Path(config.base_model).exists():
        likely = origin_of(config.base_model).get("base", "NAME[@REVISION]")
        hint = f"say where others find it with --base {likely}"
        raise UserError(f"the base {config.base_model} is a folder of this machine; {hint}")
    base, _, revision = (named or config.base_model).partition("@")
    revision = revision or config.base_revision
    card = None
    try:
        with hub_session(base, may_lack_token=dry_run) as api:
            card = api.model_info(base, revision=revision).card_data
    except HubIsAway as error:
        if not dry_run:
            raise
        warn(f"{error}; the card is written without what the page of {base} says")
    front = card.to_dict() if card else {}
    origin = origin_of(config.base_model)
    return {"base": base, "revision": revision, "front": front, "origin": origin}


def pushed_data(config: RunConfig) -> dict:
    """Repo and revision of the run's dataset; its hash where this state was not pushed."""
    folder = Path(config.dataset)
    if not folder.exists():
        return {"repo": config.dataset, "revision": config.dataset_revision}
    hashes, known = row_hashes(folder), read_json(lock_of(folder))
    return known if known.get("hashes") == hashes else {"hash": digest(*hashes)[:12]}


def licence_of_texts(config: RunConfig) -> str:
    """What the staged dataset's own card says of its texts, "" where there is none of ours."""
    card = Path(config.dataset) / CARD
    found = OF_TEXTS.search(card.read_text(encoding="utf-8")) if card.is_file() else None
    return found[1] if found else ""


def shortened(text: str) -> str:
    """The beginning of a text that is long, up to a blank."""
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(maxsplit=1)[0] + " ..."


def example_of(config: RunConfig, scores: dict, rows: list[dict], answers: dict) -> dict:
    """A text, the teacher's answer and the adapter's: the one that the report shows, chosen by its
    rule (`find_example`)."""
    place, title = find_example(chief_values(scores), scores["target"], config.task)
    row = rows[place]
    parts = {"text": row["text"], "reference": row["reference"]}
    parts["answer"] = answers["tuned"][row["id"]]["text"]
    return {"title": title} | {name: shortened(part) for name, part in parts.items()}


def scored_lengths(answers: dict[str, dict]) -> dict[str, int]:
    """Tokens of the prompts that were scored, and the most of an answer; {} where nothing tells."""
    prompts = [record.get("n_prompt_tokens") for record in answers.values()]
    if None in prompts:
        return {}
    most_new = next(iter(answers.values()))["settings"]["max_new_tokens"]
    lengths = {"least": min(prompts), "median": median_low(prompts), "most": max(prompts)}
    return lengths | {"most_new": most_new}


def shown_answers(config: RunConfig, scores: dict) -> dict:
    """What a card shows of the answers that were scored: an example and the lengths, where the
    answers are still there."""
    try:
        _, rows, answers = load_evaluation(config) if scores else ({}, [], {})
    except UserError as error:
        warn(f"no example on the card: {error}")
        rows = []
    if not rows:
        return {"example": {}, "scored": {}}
    example = example_of(config, scores, rows, answers)
    return {"example": example, "scored": scored_lengths(answers["tuned"])}


def model_files(config: RunConfig, merged: bool, base: dict) -> dict[str, bytes | Path]:
    """Path in the repo -> content, all but the card. Raises UserError if merged/ is not there."""
    folder = config.merged if merged else config.output_dir
    if merged and not is_made(folder, weights_of_run(config).settings):
        raise UserError(f"{folder} is not there or out of date; run `just merge {config.name}`")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    kinds = {"ignore_patterns": ["made.json"]} if merged else {"allow_patterns": OF_ADAPTER}
    files = {name: folder / name for name in filter_repo_objects(names, **kinds)}
    for name in {"config.json", "tokenizer_config.json", ADAPTER[0]} & files.keys():
        settings = for_others(read_json(files[name]))
        if name == ADAPTER[0]:
            settings |= {"base_model_name_or_path": base["base"], "revision": base["revision"]}
        files[name] = (json.dumps(settings, indent=2) + "\n").encode()
    return files


def check_trained(config: RunConfig) -> None:
    """Raise UserError unless the adapter is there, and of this config, base and data."""
    weights_of_run(config)  # raises where there is no adapter
    if not is_trained(config.output_dir, inputs_of(config)):
        what = f"{config.output_dir} was not made of this config, base and data"
        raise UserError(f"{what}; `just train` trains anew")


def share_invented(scores: dict) -> str:
    """The share of the adapter's answers that invent something, "" if it was not measured."""
    figure = FIGURES["invented"]
    share = scores["systems"]["tuned"].get(figure.name) if scores else None
    return "" if share is None else figure.format(share)


def write_card(
    config: RunConfig, base: dict, scores: dict, recipe: str, repo: str, merged: bool
) -> str:
    """The model card, which is also kept beside the run."""
    plugins = config.settings.get("plugins") or []
    card = config.task.render(
        "model_card.md",
        config=config,
        recipe=recipe,
        scores=for_others(scores),
        **shown_answers(config, scores),
        table=table,
        own_plugins=[name for name in plugins if name.startswith("training.")],
        project=project_link(),
        texts_licence=licence_of_texts(config),
        invented=share_invented(scores),
        lengths=read_lengths(config.output_dir),
        titles={name: figure.title for name, figure in FIGURES.items()},
        rows=load_rows(config),
        test=load_rows(config, "test")[0],
        data=pushed_data(config),
        repo=repo,
        merged=merged,
        teacher_terms=teacher_terms,
        version=version,
        **base,
    )
    path = config.output_dir / "model_card.md"
    write_text(path, card + "\n")
    print(f"card: {path}")
    return card + "\n"


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
    check_trained(config)
    scores = {} if args.unevaluated else scores_of(config)
    base = base_on_hub(config, args.base, args.dry_run)
    files = model_files(config, args.merged, base)
    recipe = yaml.safe_dump(for_others(config.settings), sort_keys=False)
    card = write_card(config, base, scores, recipe, args.repo, args.merged)
    files |= {CARD: card.encode(), f"{config.name}.yaml": recipe.encode()}
    name = f"{config.name}-merged" if args.merged else config.name
    lock = config.output_dir.with_name(f"{name}.hub.lock")
    publish(hub_options(args), "model", files, lock, obsolete=ADAPTER if args.merged else ())


if __name__ == "__main__":
    run(main)
