"""Train every recipe on the same texts with several seeds, score all on the same held-out texts.

A recipe is one training or several with a + between, METHOD@REJECTED:KEY=VALUE: a method of
methods.yaml, and whose answers it rejects: the teacher's, the student's (instructed) or those of
the previous training. Trains into outputs/compare/, writes results/OUTPUT.md, .png and the ledger;
goes on where it stopped.

    python -m eval.compare_recipes smollm2-135m-dpo-sft-lora --seeds 42 43 44
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd
import yaml

from common.cli import UserError, positive, run, script_parser
from common.files import load_records, mark_made, write_records, write_text
from common.pages import render
from common.stats import format_interval, markdown, paired_bootstrap
from eval.answer_texts import add_generation_options, answer_all, answer_options
from eval.report import LEDGER, append_ledger, draw_intervals
from eval.score_answers import add_scoring_options, load_scores, score_all
from eval.systems import load_test_rows
from prompts.task import Task, add_task_options, data_folder, task_of
from training.config import OUTPUTS, RunConfig, load_run_config, resolve_config

RECIPES = {
    "sft": "SFT",
    "dpo@teacher": "DPO on the teacher's pairs",
    "dpo@student": "DPO against the student",
    "dpo-sft@student": "DPO+SFT against the student",
    "orpo@student": "ORPO against the student",
    "sft+sft-then-dpo@previous": "SFT, then DPO against itself",
    "sft+sft-then-dpo@previous+sft-then-dpo@previous": "SFT, then two rounds of DPO",
}
DEFAULT = "dpo-sft@student"
STEP = re.compile(r"([\w-]+)(?:@(teacher|student|previous))?(?::(.*))?")
SHOWN = {"bertscore_f1": "BERTScore F1", "rouge_l": "ROUGE-L"}
OTHERS = {"length_ratio": 2, "density": 1, "repetition": 3, "training_seconds": 0}  # decimals


def steps_of(recipe: str) -> list[tuple[str, str, str]]:
    """[(method, source of the rejected answers, KEY=VALUE)] of a recipe. Raises UserError."""
    steps = [STEP.fullmatch(part) for part in recipe.split("+")]
    if not all(steps):
        raise UserError(f"no recipe {recipe}; give it as METHOD@REJECTED, e.g. {' '.join(RECIPES)}")
    return [step.groups("") for step in steps]


def stage(module: str, *options: object) -> None:
    """Run the command line of another stage. Raises UserError if it fails."""
    command = ["-m", module, *map(str, options)]
    if subprocess.run([sys.executable, *command]).returncode:
        raise UserError(f"python {shlex.join(command)} failed; what was finished is kept")


class Comparison:
    """What the trainings share: config, task, data, and the texts that all of them see."""

    def __init__(self, args: argparse.Namespace, task: Task):
        self.args, self.task, self.lacking = args, task, []
        folder = "compare" if args.task == "summarize" else f"{args.task}-compare"
        name = re.sub(r"[^\w.=-]", "_", "-".join([Path(args.config).stem, *args.set]))
        self.name, self.student = f"{folder}/{name}", f"compare/{name}"  # for a task, and without
        self.options = ["--task", args.task, "--prompts-dir", args.prompts_dir, "--data", args.data]
        base = resolve_config(args.config, "", args.set, run=self.name, task=task, data=args.data)
        self.tokenizer = ["--tokenizer", base.base_model]
        args.max_new_tokens = args.max_new_tokens or task.max_new_tokens
        # As of a run, whose base these settings are.
        made = {"task": args.task, "prompts_dir": str(args.prompts_dir)}
        mark_made(base.output_dir / "inputs", made)
        write_text(base.output_dir / "config.yaml", yaml.safe_dump(base.settings))
        own = {"datasets": [{"path": str(self.build_sources())}]}
        self.base = replace(base, settings=base.settings | own)

    def answer_training_texts(self, run_name: str, system: str) -> None:
        options = ["--split", "train", "--systems", system]
        options += ["--max-new-tokens", self.args.max_new_tokens]
        options += ["--n", self.args.examples] if self.args.examples else []
        stage("eval.answer_texts", run_name, *options, *self.options)

    def build_pairs(self, name: str, *rejected: str) -> list[dict]:
        options = ["--name", name, "--rejected", *rejected, *self.tokenizer, *self.options]
        stage("data_prep.build_pairs", *options)
        return load_records(data_folder(self.args, f"pairs-{name}") / "train.jsonl", ("id",))

    def build_dataset(self, name: str, pairs: list[dict]) -> Path:
        """Stage the pairs of the texts that all recipes see, no others; the dataset's folder."""
        kept = [pair for pair in pairs if pair["id"] in self.ids]
        write_records(data_folder(self.args, f"pairs-{name}") / "train.jsonl", kept)
        stage("data_prep.build_dataset", "--name", name, *self.options)
        return data_folder(self.args, f"hub-{name}")

    def build_sources(self) -> Path:
        """Make the datasets that are the same for all seeds, of the texts that all of them have;
        the folder of the first: the teacher's, if any."""
        asked = {source for recipe in self.args.recipes for _, source, _ in steps_of(recipe)}
        sources = [source for source in ("teacher", "student") if source in asked] or ["none"]
        if "student" in sources:
            self.answer_training_texts(self.student, "instructed")
        names = {source: f"{self.name}-{source}".replace("/", "-") for source in sources}
        student = ("--student", self.student)
        pairs = {source: self.build_pairs(names[source], source, *student) for source in sources}
        common = set.intersection(*({pair["id"] for pair in found} for found in pairs.values()))
        inside = [pair["id"] for pair in pairs[sources[0]] if pair["id"] in common]
        self.ids = set(inside[: self.args.examples])
        self.hubs = {source: self.build_dataset(names[source], pairs[source]) for source in pairs}
        return self.hubs[sources[0]]

    def build_round(self, run_name: str) -> Path:
        """The dataset whose rejected answers are a run's own."""
        name = run_name.replace("/", "-")
        self.answer_training_texts(run_name, "tuned")
        pairs = self.build_pairs(name, run_name)
        self.lacking.append(len(self.ids - {pair["id"] for pair in pairs}))
        return self.build_dataset(name, pairs)

    def train(self, recipe: str, seed: int) -> tuple[str, float]:
        """(the recipe's last run, the seconds that its trainings took; NaN if not known)."""
        name, run_name, seconds = self.name, "", 0.0
        cpu = ["--cpu", "--num_cpu_threads_per_process", os.cpu_count()]
        options = self.options + ([] if self.base.settings.get("bf16") else cpu)
        for method, source, own in steps_of(recipe):
            hub = self.hubs.get(source, self.base.dataset)
            if source == "previous":
                hub = self.build_round(run_name)
            keys = [*self.args.set, f"seed={seed}", f"datasets.0.path={hub}"]
            keys += [f"lora_model_dir={OUTPUTS / run_name}"] if run_name else []
            name = "-".join(filter(None, [name, method, source, re.sub(r"[^\w.=]", "_", own)]))
            run_name = f"{name}-{seed}"
            command = [self.args.config, "--method", method, "--name", run_name, *options]
            command += ["--set", *keys, *filter(None, own.split(":"))]
            stage("training.train_adapter", *command)
            log = (OUTPUTS / run_name / "train.log").read_text()
            took = re.findall(r"'train_runtime': '?([\d.]+)", log)
            resumed = "Using auto-resume" in log  # then the last part is not the whole
            seconds += float(took[-1]) if took and not resumed else math.nan
        return run_name, seconds


def score(compared: Comparison, rows: list[dict]) -> tuple[pd.DataFrame, dict]:
    """(scores by system, seed and text, the settings that they were made with)."""
    args, frames = compared.args, {}
    lengths = [len(row["reference"].split()) for row in rows]

    def add(config: RunConfig, systems: list[str], seed: int, seconds: float, title: str) -> dict:
        args.systems = systems
        answer_all(config, rows, args.systems, answer_options(args))
        score_all(config, rows, args)
        scores = load_scores(config)
        for system in systems:
            values = pd.DataFrame(scores["per_text"][system], index=scores["ids"])
            values["length_ratio"] = values["words"] / lengths
            name = title or compared.task.title(system)
            frames[name, seed] = values.assign(training_seconds=seconds)
        return scores["settings"]

    second = ["second"] if all(row["second"] for row in rows) else []
    base = ["lead", "base", "instructed", *second]
    settings = add(compared.base, base, 0, math.nan, "")
    for seed, recipe in product(args.seeds, args.recipes):
        run_name, seconds = compared.train(recipe, seed)
        title = RECIPES.get(recipe, recipe)
        add(load_run_config(run_name), ["tuned"], seed, seconds, title)
    return pd.concat(frames, names=["system", "seed", "text"]).sort_index(), settings


def gain(scores: pd.DataFrame, measure: str, ours: str, other: str = "") -> tuple:
    """Mean and interval of a system's measure, or of how much it is over another's."""
    values = [scores.loc[s, measure].unstack("text").to_numpy() for s in (ours, other) if s]
    return paired_bootstrap(*values, *([] if other else [0]))


def score_table(scores: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    means, frame = scores.groupby(["system", "seed"]).mean(), pd.DataFrame(index=order)
    for measure, title in SHOWN.items():
        found = [gain(scores, measure, name) for name in order]
        frame[f"{title} [95%]"] = ["{:.3f} [{:.3f}, {:.3f}]".format(*one) for one in found]
    seeds = [means.loc[name, "bertscore_f1"].map("{:.3f}".format) for name in order]
    frame["F1 by seed"] = [", ".join(f1) if len(f1) > 1 else "" for f1 in seeds]
    for measure, decimals in OTHERS.items():
        column = means[measure].groupby("system").mean().map(f"{{:.{decimals}f}}".format)
        frame[measure.replace("_", " ")] = column.replace("nan", "")
    return frame.rename_axis("system")


def report(compared: Comparison, scores: pd.DataFrame, about: dict) -> None:
    """Write the tables with their note, the plot, and the lines of the ledger.

    The differences are those of the best recipe, a preference one if any, and of the default one.
    """
    titles = {RECIPES.get(recipe, recipe): recipe for recipe in compared.args.recipes}
    means = scores["bertscore_f1"].groupby("system").mean()
    order = means.sort_values(ascending=False).index.tolist()
    best = sorted(filter(titles.get, order), key=lambda name: "@" not in titles[name])[:1]
    default = [name for name in titles if titles[name] == DEFAULT and name not in best]
    gains = {
        f"{ours} minus {other}": {
            title: format_interval(*gain(scores, measure, ours, other))
            for measure, title in SHOWN.items()
        }
        for ours in best + default
        for other in order
        if other not in (ours, *best)
    }
    differences = pd.DataFrame(gains).T.rename_axis("difference [95% interval]")
    tables = {"table": score_table(scores, order), "differences": differences}
    path = Path("results") / f"{compared.args.output}.md"
    f1 = {name: gain(scores, "bertscore_f1", name) for name in order}
    draw_intervals(f1, "BERTScore F1, over texts and seeds", path.with_suffix(".png"))
    shown = {name: markdown(frame) for name, frame in tables.items()}
    text = render("eval/recipes.md.jinja", compared=compared, about=about, name=path.stem, **shown)
    write_text(path, text + "\n")
    lines = [(name, m, *gain(scores, m, name)) for name in order for m in SHOWN]
    append_ledger(lines, about, LEDGER)
    print(f"\n{text}")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", nargs="?", default="smollm2-135m-dpo-sft-lora", help="name, or a YAML")
    add_task_options(parser)
    option("--recipes", nargs="+", help=f"METHOD@REJECTED (default: {' '.join(RECIPES)})")
    option("--seeds", type=int, nargs="+", default=[42, 43, 44], help="a training of each for each")
    option("--n", type=positive, help="only the first N held-out texts")
    option("--examples", type=positive, help="only the first N training texts")
    option("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="axolotl's")
    option("--output", help="name of the table in results/ (default: recipes, or recipes-TASK)")
    add_generation_options(parser)
    add_scoring_options(parser)
    parser.set_defaults(encoder="models/minilm", encoder_layers=6)
    args = parser.parse_args()
    task = task_of(args)
    possible = [recipe for recipe in RECIPES if task.answers == 2 or "@teacher" not in recipe]
    args.recipes = args.recipes or possible
    args.output = args.output or f"recipes-{task.name}".removesuffix("-summarize")
    compared = Comparison(args, task)
    rows = load_test_rows(compared.base, args.n)
    scores, settings = score(compared, rows)
    about = {key: settings[key] for key in ("date", "commit", "config")}
    about["command"] = shlex.join(["just", "compare", *sys.argv[1:]])
    report(compared, scores, about | {"encoder": settings["hash"], "n": len(rows)})


if __name__ == "__main__":
    run(main)
