"""Train every recipe on the same texts with several seeds, score all on the same held-out texts.

A recipe is one training or several with a + between, METHOD@KINDS:KEY=VALUE: a method of
methods.yaml, the kinds of pairs that it is given (those of `just pairs --rejected`, with a comma
between several), and axolotl's keys of its own. Two kinds are of the training before it: previous
rejects its answers to the training texts, samples sets its answers to other texts against each
other. Without a kind it learns from the chosen answers alone.

    sft
    dpo-sft@corrupted
    sft+sft-then-dpo@corrupted,samples:learning_rate=1e-4

Trains into outputs/compare/, writes results/OUTPUT.md, .png and the ledger; goes on where it
stopped. The other stages do the work, each by its own command line.

    python -m eval.compare_recipes smollm2-135m-dpo-sft-lora --seeds 42 43 44
"""

import argparse
import math
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
import yaml

from common.cli import UserError, positive, run, script_parser, usable_cores
from common.files import load_records, locked, mark_made, write_records, write_text
from common.pages import render
from common.stats import markdown, paired_bootstrap
from common.text import count_words
from eval.answer_texts import add_generation_options
from eval.measures import COMPARED, FIGURES, ScoringOptions, linearize_shares
from eval.report import LEDGER, append_ledger, draw_panels
from eval.score_answers import add_scoring_options, score_all, scoring_options
from eval.systems import load_test_rows
from prompts.task import Task, add_task_options, task_of
from training.config import OUTPUTS, Overlay, RunConfig, load_run_config, resolve_config

TITLES = {
    "sft": "SFT",
    "dpo@teacher": "DPO on the teacher's pairs",
    "dpo@student": "DPO against the student",
    "dpo-sft@student": "DPO+SFT against the student",
    "dpo-sft@corrupted": "DPO+SFT on corrupted answers",
    "sft+sft-then-dpo@corrupted": "SFT, then DPO on corrupted answers",
    "sft+sft-then-dpo@samples": "SFT, then DPO on its samples",
    "sft+sft-then-dpo@corrupted,samples": "SFT, then DPO on both",
    "sft+sft-then-dpo-sft@corrupted": "SFT, then DPO+SFT on corrupted answers",
    "sft+sft-then-dpo-sft@samples": "SFT, then DPO+SFT on its samples",
    "sft+sft-then-dpo-sft@corrupted,samples": "SFT, then DPO+SFT on both",
    "sft+sft-then-dpo@previous": "SFT, then DPO against itself",
    "sft+sft-then-dpo@previous+sft-then-dpo@previous": "SFT, then two rounds of DPO",
}
DEFAULTS = ["sft", "sft+sft-then-dpo@corrupted", "sft+sft-then-dpo@samples", "dpo-sft@corrupted"]
NONE = ("none",)
# Kinds that choose the training texts: those that each of them has a pair of.
CHOOSE_THE_TEXTS = ("teacher", "student")
MADE_OF_A_RUN = ("previous", "samples")  # kinds that are made of the training before
OF_OTHER_TEXTS = ("samples", "choices")  # kinds whose texts are not the training texts
STEP = re.compile(r"(?P<method>[\w-]+)(@(?P<kinds>[a-z]+(,[a-z]+)*))?(:(?P<keys>.+))?")
PAIR_KINDS = ("teacher", "student", "corrupted", "samples", "choices", "previous")
# What the tables show, with intervals and without.
TABLE_FIGURES = tuple(dict.fromkeys([*COMPARED, "facts", "words", "density"]))
ALSO = ("invented_facts", "repetition")


@dataclass(frozen=True)
class Step:
    """A training of a recipe: its method, the kinds of its pairs, its own KEY=VALUE."""

    method: str
    kinds: tuple[str, ...] = NONE
    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its part of a run's name."""
        kinds = "" if self.kinds == NONE else "_".join(self.kinds)
        keys = re.sub(r"[^\w.=]", "_", ":".join(self.keys))
        return "-".join(part for part in (self.method, kinds, keys) if part)


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how."""

    config: str  # a name or a YAML
    task: Task
    data: Path
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    keys: tuple[str, ...]  # axolotl's, of all trainings
    examples: int | None  # the first training texts alone
    unseen: int | None  # the first texts alone that are sampled for pairs
    samples: int  # of each of these
    untrained: tuple[str, ...]  # systems that are set beside the recipes
    generation: tuple[str, ...]  # options of `just answers`
    scoring: ScoringOptions

    @property
    def name(self) -> str:
        """What the runs' names begin with, and the run that stands for the untrained base."""
        folder = "compare" if self.task.name == "summarize" else f"{self.task.name}-compare"
        name = re.sub(r"[^\w.=-]", "_", "-".join([Path(self.config).stem, *self.keys]))
        return f"{folder}/{name}"

    @property
    def of_task(self) -> list[str]:
        """The options by which every stage knows the task and its data."""
        folder = self.task.folder
        where = ["--prompts-dir", str(folder.parent), "--data", str(self.data)]
        return ["--task", folder.name, *where]

    def place(self, stage_folder: str, name: str) -> Path:
        """DATA/TASK/pairs-NAME or hub-NAME."""
        return self.data / self.task.name / f"{stage_folder}-{name}"

    def name_of_data(self, kinds: tuple[str, ...], run_name: str = "") -> str:
        """The name of the pairs of some kinds, of all runs or of one, and of so many texts."""
        amounts = {"examples": self.examples, "unseen": self.unseen}
        counts = [f"{n}-{what}" for what, n in amounts.items() if n]
        return "-".join([(run_name or self.name).replace("/", "-"), *kinds, *counts])


@dataclass(frozen=True)
class Shared:
    """What all trainings have in common: the base, the texts, and the datasets made of them."""

    base: RunConfig
    ids: frozenset[str]  # of the training texts
    hubs: dict[tuple[str, ...], Path]  # kinds -> dataset, of those that no training is needed for


@dataclass(frozen=True)
class Trained:
    """The last run of a recipe, how many pairs it had, and the seconds of all its trainings."""

    run_name: str
    n_pairs: int
    seconds: float  # NaN if not known


def steps_of(recipe: str) -> list[Step]:
    """The trainings of a recipe. Raises UserError."""
    steps = []
    for part in recipe.split("+"):
        match = STEP.fullmatch(part)
        kinds = tuple((match["kinds"] or "none").split(",")) if match else ()
        if not match or (kinds != NONE and not set(kinds) <= set(PAIR_KINDS)):
            example = f"METHOD@KINDS, kinds of {', '.join(PAIR_KINDS)}, e.g. {' '.join(DEFAULTS)}"
            raise UserError(f"no recipe {recipe}; give it as {example}")
        if not steps and set(kinds) & set(MADE_OF_A_RUN):
            raise UserError(f"recipe {recipe}: {part} needs a training before it: sft+{recipe}")
        keys = tuple(match["keys"].split(":")) if match["keys"] else ()
        steps.append(Step(match["method"], kinds, keys))
    return steps


def title_of(recipe: str) -> str:
    """What a recipe is called in the tables, with the keys of its own."""
    steps = steps_of(recipe)
    plain = "+".join(part.partition(":")[0] for part in recipe.split("+"))
    *earlier, last = steps
    keys = ", ".join(
        [f"{step.method} {key}" for step in earlier for key in step.keys] + [*last.keys]
    )
    title = TITLES.get(plain, plain)
    return f"{title} ({keys})" if keys else title


# --- the stages


def stage(module: str, *options: object) -> None:
    """Run the command line of another stage. Raises UserError if it fails."""
    command = ["-m", module, *map(str, options)]
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"python {shlex.join(command)} failed; what was finished is kept")


def answer(options: CompareOptions, run_name: str, systems: list[str], *which: object) -> None:
    """Have a run's systems answer texts, by default the held-out ones."""
    common = ["--systems", *systems, *options.generation, *options.of_task]
    stage("eval.answer_texts", run_name, *common, *which)


def build_pairs(
    options: CompareOptions, base: RunConfig, kinds: tuple[str, ...], run_name: str
) -> list[dict]:
    """The pairs of some kinds; `run_name`: of the run whose answers some are made of."""
    name = options.name_of_data(kinds, run_name if set(kinds) & set(MADE_OF_A_RUN) else "")
    rejected = [run_name if kind == "previous" else kind for kind in kinds]
    model = ["--student", run_name, "--tokenizer", base.base_model]
    named = ["--name", name, "--rejected", *rejected]
    stage("data_prep.build_pairs", *named, *model, *options.of_task)
    return load_records(options.place("pairs", name) / "train.jsonl", ("id",))


def stage_dataset(options: CompareOptions, name: str, pairs: list[dict]) -> Path:
    """Stage these of the pairs called `name`, no others; the dataset's folder. Raises UserError."""
    if not pairs:
        hint = "more texts (--examples, --unseen) or --samples give more"
        raise UserError(f"none of the pairs {name} is of the texts that are trained on; {hint}")
    write_records(options.place("pairs", name) / "train.jsonl", pairs)
    stage("data_prep.build_dataset", "--name", name, *options.of_task)
    return options.place("hub", name)


def inside(pairs: list[dict], ids: frozenset[str]) -> list[dict]:
    """Those of the texts that all recipes see, and those of kinds that have texts of their own."""
    return [pair for pair in pairs if pair["id"] in ids or pair.get("kind") in OF_OTHER_TEXTS]


def write_base(options: CompareOptions, hub: Path) -> RunConfig:
    """Write the run that stands for the untrained base, whose test texts are those of `hub`."""
    overlay = Overlay(task=options.task, data=options.data, run=options.name, keys=options.keys)
    base = resolve_config(options.config, overlay)
    # As of a run, whose base these settings are.
    made = {"task": options.task.name, "prompts_dir": str(options.task.folder.parent)}
    mark_made(base.output_dir / "inputs", made)
    settings = base.settings | {"datasets": [{"path": str(hub)}]}
    write_text(base.output_dir / "config.yaml", yaml.safe_dump(settings))
    return load_run_config(options.name)


def prepare(options: CompareOptions) -> Shared:
    """Build the datasets that no training is needed for, of the texts that all of them share."""
    kinds_asked = {step.kinds for recipe in options.recipes for step in steps_of(recipe)}
    ready = sorted(kinds for kinds in kinds_asked if not set(kinds) & set(MADE_OF_A_RUN))
    # The test texts are the same whatever the kind of the training pairs.
    hub_of_test_texts = options.place("hub", options.name_of_data(ready[0]))
    base = write_base(options, hub_of_test_texts)
    if any("student" in kinds for kinds in ready):
        texts = ["--n", options.examples] if options.examples else []
        answer(options, options.name, ["instructed"], "--split", "train", *texts)
    pairs_by_kinds = {kinds: build_pairs(options, base, kinds, options.name) for kinds in ready}
    # Corrupted answers are of such texts alone as hold a name or number, so they choose no texts.
    choosing = [kinds for kinds in ready if set(kinds) <= {*CHOOSE_THE_TEXTS, *NONE}] or ready
    common = set.intersection(*({p["id"] for p in pairs_by_kinds[kinds]} for kinds in choosing))
    shared_ids = [pair["id"] for pair in pairs_by_kinds[choosing[0]] if pair["id"] in common]
    ids = frozenset(shared_ids[: options.examples])
    hubs = {}
    for kinds, pairs in pairs_by_kinds.items():
        hubs[kinds] = stage_dataset(options, options.name_of_data(kinds), inside(pairs, ids))
    return Shared(base, ids, hubs)


def build_round(
    options: CompareOptions, shared: Shared, kinds: tuple[str, ...], run_name: str
) -> Path:
    """The dataset of kinds that are made of a run's own answers."""
    if "previous" in kinds:
        texts = ["--n", options.examples] if options.examples else []
        answer(options, run_name, ["tuned"], "--split", "train", *texts)
    if "samples" in kinds:
        texts = ["--n", options.unseen] if options.unseen else []
        samples = ["--split", "unseen", "--samples", options.samples]
        answer(options, run_name, ["tuned"], *samples, *texts)
    pairs = build_pairs(options, shared.base, kinds, run_name)
    name = options.name_of_data(kinds, run_name)
    return stage_dataset(options, name, inside(pairs, shared.ids))


def seconds_of(log: str) -> float:
    """How long a training took, by its log; NaN if it was resumed, for then that is not the
    whole."""
    seconds = re.findall(r"'train_runtime': '?([\d.]+)", log)
    return float(seconds[-1]) if seconds and "Using auto-resume" not in log else math.nan


def train(options: CompareOptions, shared: Shared, recipe: str, seed: int) -> Trained:
    """Train a recipe's steps, each from the adapter of the one before."""
    name, run_name, seconds, n_pairs = options.name, "", 0.0, 0
    threads = ["--cpu", "--num_cpu_threads_per_process", usable_cores()]
    on_cpu = [] if shared.base.settings.get("bf16") else threads
    for step in steps_of(recipe):
        hub = shared.hubs.get(step.kinds) or build_round(options, shared, step.kinds, run_name)
        keys = [*options.keys, f"seed={seed}", f"datasets.0.path={hub}"]
        if run_name:
            keys.append(f"lora_model_dir={OUTPUTS / run_name}")
        name = f"{name}-{step.name}"
        run_name = f"{name}-{seed}"
        command = [options.config, "--method", step.method, "--name", run_name]
        command += [*options.of_task, *on_cpu, "--set", *keys, *step.keys]
        stage("training.train_adapter", *command)
        seconds += seconds_of((OUTPUTS / run_name / "train.log").read_text())
        pairs = hub.with_name(hub.name.replace("hub-", "pairs-", 1)) / "train.jsonl"
        n_pairs = len(load_records(pairs, ("id",)))
    return Trained(run_name, n_pairs, seconds)


# --- the scores


def score_run(
    options: CompareOptions, run_name: str, rows: list[dict], systems: list[str]
) -> tuple[dict[str, pd.DataFrame], dict]:
    """(system -> figures by text, the settings of the scores) of what a run's systems answer."""
    answer(options, run_name, systems, "--n", len(rows))
    scores, _ = score_all(load_run_config(run_name), rows, systems, options.scoring)
    lengths = [count_words(row["reference"]) for row in rows]
    frames = {}
    for system in systems:
        values = linearize_shares(pd.DataFrame(scores["per_text"][system], index=scores["ids"]))
        frames[system] = values.assign(length_ratio=values["words"] / lengths)
    return frames, scores["settings"]


def score_recipes(
    options: CompareOptions, shared: Shared, rows: list[dict]
) -> tuple[pd.DataFrame, dict]:
    """(figures by system, seed and text, the settings that they were made with)."""
    frames = {}
    for seed, recipe in product(options.seeds, options.recipes):
        trained = train(options, shared, recipe, seed)
        of_run, _ = score_run(options, trained.run_name, rows, ["tuned"])
        values = of_run["tuned"]
        values = values.assign(training_seconds=trained.seconds, pairs=trained.n_pairs)
        frames[title_of(recipe), seed] = values
    systems = list(options.untrained)
    if all(row["second"] for row in rows):
        systems.append("second")
    of_base, settings = score_run(options, options.name, rows, systems)
    for system, values in of_base.items():
        values = values.assign(training_seconds=math.nan, pairs=math.nan)
        frames[options.task.title(system), 0] = values
    return pd.concat(frames, names=["system", "seed", "text"]).sort_index(), settings


def gain(scores: pd.DataFrame, figure: str, ours: str, other: str = "") -> tuple[float, ...]:
    """Mean and interval of a system's figure, or of how much it is over another's."""
    values = scores.loc[ours, figure].unstack("text").to_numpy()
    against = scores.loc[other, figure].unstack("text").to_numpy() if other else 0
    return paired_bootstrap(values, against)


def by_seed(values: pd.Series, form: str) -> str:
    """A figure of each seed, or once if all have the same; "" if it is not known."""
    shown = [form.format(value) for value in values.dropna()]
    return shown[0] if len(set(shown)) == 1 else ", ".join(shown)


def score_table(scores: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Systems by figures, formatted."""
    means, lines = scores.groupby(["system", "seed"]).mean(), {}
    for name in order:
        line, mean = {}, means.loc[name].mean()
        for figure in [FIGURES[figure] for figure in TABLE_FIGURES if figure in scores]:
            middle, low, high = map(figure.format, gain(scores, figure.name, name))
            line[f"{figure.title} [95%]"] = f"{middle} [{low}, {high}]"
        for figure in [FIGURES[figure] for figure in ALSO if figure in scores]:
            line[figure.title] = figure.format(mean[figure.name])
        line["length ratio"] = f"{mean['length_ratio']:.2f}"
        line["F1 by seed"] = by_seed(means.loc[name, "bertscore_f1"], "{:.3f}")
        line["pairs"] = by_seed(means.loc[name, "pairs"], "{:.0f}")
        seconds = mean["training_seconds"]
        line["training seconds"] = "" if math.isnan(seconds) else f"{seconds:.0f}"
        lines[name] = line
    return pd.DataFrame(lines).T.rename_axis("system")


def difference_table(scores: pd.DataFrame, titles: list[str], order: list[str]) -> pd.DataFrame:
    """Every recipe minus the first one, and the best minus the systems that are not trained.

    The best is the one with the highest F1 of those after the first, if there are any.
    """
    first, *others = titles
    best = next(name for name in order if name in (others or titles))
    against = [(name, first) for name in order if name in others]
    against += [(best, name) for name in order if name not in titles]
    lines = {}
    for ours, other in against:
        line = {}
        for figure in [FIGURES[figure] for figure in TABLE_FIGURES if figure in scores]:
            line[figure.title] = figure.format_gain(*gain(scores, figure.name, ours, other))
        lines[f"{ours} minus {other}"] = line
    return pd.DataFrame(lines).T.rename_axis("difference [95% interval]")


def report(
    options: CompareOptions, shared: Shared, scores: pd.DataFrame, about: dict, path: Path
) -> None:
    """Write the tables with their note at `path`, the picture beside it, and the ledger's lines."""
    titles = [title_of(recipe) for recipe in options.recipes]
    means = scores["bertscore_f1"].groupby("system").mean()
    order = means.sort_values(ascending=False).index.tolist()
    panels = {}
    for figure in [figure for figure in ("bertscore_f1", "invented") if figure in scores]:
        unit = ", %" if FIGURES[figure].percent else ""
        label = f"{FIGURES[figure].title}{unit}, over texts and seeds"
        scale = 100 if FIGURES[figure].percent else 1
        panels[label] = {
            name: tuple(scale * end for end in gain(scores, figure, name)) for name in order
        }
    draw_panels(panels, path.with_suffix(".png"))
    text = render(
        "eval/recipes.md.jinja",
        table=markdown(score_table(scores, order)),
        differences=markdown(difference_table(scores, titles, order)),
        about=about,
        n_texts=len(shared.ids),
        generation=shlex.join(options.generation),
        says=[(FIGURES[f].title, FIGURES[f].says) for f in (*TABLE_FIGURES, *ALSO) if f in scores],
        name=path.stem,
    )
    write_text(path, text + "\n")
    figures = [figure for figure in TABLE_FIGURES if figure in scores]
    lines = [(name, f, *gain(scores, f, name)) for name in order for f in figures]
    append_ledger(lines, about, LEDGER)
    print(f"\n{text}")


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", nargs="?", default="smollm2-135m-dpo-sft-lora", help="name, or a YAML")
    add_task_options(parser)
    option("--recipes", nargs="+", default=DEFAULTS, help="METHOD@KINDS, the first is compared to")
    option("--seeds", type=int, nargs="+", default=[42, 43, 44], help="a training of each for each")
    option("--n", type=positive, help="only the first N held-out texts")
    option("--examples", type=positive, help="only the first N training texts")
    untrained = ("lead", "base", "instructed")
    beside = "of those that nothing trains, which are set beside the recipes"
    option("--systems", nargs="*", choices=untrained, default=untrained, help=beside)
    option("--unseen", type=positive, help="only the first N texts to sample pairs of")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--output", help="name of the table in results/ (default: recipes, or recipes-TASK)")
    add_generation_options(parser)
    add_scoring_options(parser)
    parser.set_defaults(encoder="models/minilm", encoder_layers=6, samples=8)
    return parser


def options_of(args: argparse.Namespace, task: Task) -> CompareOptions:
    """The options of a command line. Raises UserError for a recipe that is none, or that the tables
    could not tell from another."""
    titles = [title_of(recipe) for recipe in args.recipes]
    twice = [title for title in titles if titles.count(title) > 1]
    if twice:
        raise UserError(f"two recipes would both be called {twice[0]}; leave out one")
    generation = ["--max-new-tokens", args.max_new_tokens or task.max_new_tokens]
    generation += ["--max-prompt-tokens", args.max_prompt_tokens]
    generation += ["--batch-tokens", args.batch_tokens, "--engine", args.engine]
    return CompareOptions(
        config=args.config,
        task=task,
        data=args.data,
        recipes=tuple(args.recipes),
        seeds=tuple(args.seeds),
        keys=tuple(args.set),
        examples=args.examples,
        unseen=args.unseen,
        samples=args.samples,
        untrained=tuple(args.systems),
        generation=tuple(map(str, generation)),
        scoring=scoring_options(args),
    )


def main() -> None:
    args = make_parser().parse_args()
    task = task_of(args)
    options = options_of(args, task)
    name = args.output or ("recipes" if task.name == "summarize" else f"recipes-{task.name}")
    with locked(options.place("pairs", options.name_of_data(()))):  # one comparison at a time
        shared = prepare(options)
    rows = load_test_rows(shared.base, args.n)
    scores, settings = score_recipes(options, shared, rows)
    about = {key: settings[key] for key in ("date", "commit", "config")}
    about["command"] = shlex.join(["just", "compare", *sys.argv[1:]])
    about |= {"encoder": settings["hash"], "n": len(rows)}
    report(options, shared, scores, about, Path("results") / f"{name}.md")


if __name__ == "__main__":
    run(main)
