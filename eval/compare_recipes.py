"""Train every recipe on the same texts with several seeds, score all on the same held-out texts.

A recipe is one training or several with a + between, METHOD@REJECTED:KEY=VALUE: a method of
methods.yaml, and whose answers it rejects: the teacher's, the student's (instructed) or those of
the previous training. Trains into outputs/compare/, writes results/OUTPUT.md and .png and lines of
the ledger; goes on where it stopped.

    python -m eval.compare_recipes smollm2-135m-dpo-sft-lora --seeds 42 43 44
"""

import argparse
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import UserError, positive, run, script_parser
from common.files import load_records, share_of, write_records, write_text
from common.report import drawing, format_interval, markdown, paired_bootstrap
from eval.build_report import LEDGER, append_ledger
from eval.generate_answers import add_generation_options, answer_rows
from eval.load_model import Weights, load_tokenizer
from eval.score_answers import add_scoring_options, commit, load_measures, score_texts
from eval.systems import load_test_rows, system_of
from prompts import Task, add_task_options, data_folder, task_of
from training.resolve_config import load_methods
from training.run_config import OUTPUTS, RunConfig, load_run_config

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
NOTE = (
    "`{command}`, {date}, commit {commit}, n = {n} held-out texts, {texts} training texts, the "
    "same for all{lacking}, answers of at most {longest} tokens, {encoder}. Intervals: paired "
    "bootstrap over texts and seeds, 10,000 resamples. They take texts of one article, and so few "
    "seeds, for independent; the best recipe was picked on these same texts: both make them look "
    "narrower than they are."
)


def steps_of(recipe: str) -> list[tuple[str, str, str]]:
    """[(method, source of the rejected answers, KEY=VALUE)] of a recipe. Raises UserError."""
    steps = [STEP.fullmatch(part) for part in recipe.split("+")]
    if not all(steps) or {step[1] for step in steps} - load_methods().keys():
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
        self.name = f"{folder}/{name}"
        self.options = ["--task", args.task, "--prompts-dir", args.prompts_dir, "--data", args.data]
        base = load_run_config(args.config, trained=False)
        self.tokenizer = ["--tokenizer", base.base_model]
        sources = self.build_sources()
        self.base = replace(base, settings=base.settings | {"datasets": [{"path": str(sources)}]})

    def answer_training_texts(self, run_name: str, system: str) -> None:
        longest = self.args.max_new_tokens or self.task.max_new_tokens
        options = ["--split", "train", "--systems", system, "--max-new-tokens", longest]
        stage("eval.generate_answers", run_name, *options, *self.options)

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
        sources = [source for source in ("teacher", "student") if source in asked] or ["student"]
        if "student" in sources:
            self.answer_training_texts(self.args.config, "instructed")
        names = {source: f"{self.name}-{source}".replace("/", "-") for source in sources}
        student = ("--student", self.args.config)
        pairs = {source: self.build_pairs(names[source], source, *student) for source in sources}
        common = set.intersection(*({pair["id"] for pair in found} for found in pairs.values()))
        self.ids = set(sorted(common, key=lambda i: share_of(i, 0))[: self.args.examples])
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
        options = [*self.options, *([] if self.base.settings.get("bf16") else cpu), "--set"]
        for method, source, own in steps_of(recipe):
            if source == "previous":
                hub = self.build_round(run_name)
            else:
                hub = self.hubs.get(source, self.base.dataset)
            keys = [*self.args.set, f"seed={seed}", f"datasets.0.path={hub}"]
            keys += [*filter(None, own.split(":")), f"lora_model_dir={OUTPUTS / run_name}"]
            name = "-".join(filter(None, [name, method, source, re.sub(r"[^\w.=]", "_", own)]))
            first, run_name = not run_name, f"{name}-{seed}"
            command = [self.args.config, "--method", method, "--name", run_name, *options]
            stage("training.train_adapter", *command, *(keys[:-1] if first else keys))
            log = (OUTPUTS / run_name / "train.log").read_text()
            took = re.findall(r"'train_runtime': '?([\d.]+)", log)
            resumed = "Using auto-resume" in log  # then the last part is not the whole
            seconds += float(took[-1]) if took and not resumed else math.nan
        return run_name, seconds

    def answers(self, rows: list[dict]) -> Iterator[tuple[str, int, list[str], float]]:
        """(title, seed, answers, seconds of training) of every system, one after the other."""

        def answer(name: str, system: str) -> list[str]:
            path = OUTPUTS / f"{self.name}-answers" / f"{Path(name).name}.jsonl"
            found = system_of(self.base, system, self.task)
            records = answer_rows(name, found, rows, path, self.task, self.args)
            return [record["text"] for record in records]

        for system in ("lead", "base", "instructed"):
            yield self.task.title(system), 0, answer(system, system), math.nan
        if all(row["second"] for row in rows):
            yield self.task.title("second"), 0, [row["second"] for row in rows], math.nan
        for seed, recipe in product(self.args.seeds, self.args.recipes):
            run_name, seconds = self.train(recipe, seed)
            answers = answer(run_name, str(OUTPUTS / run_name))
            yield RECIPES.get(recipe, recipe), seed, answers, seconds


def gain(scores: pd.DataFrame, measure: str, ours: str, other: str = "") -> tuple:
    """Mean and interval of a system's measure, or of how much it is over another's."""
    values = [scores.loc[s, measure].unstack("text").to_numpy() for s in (ours, other) if s]
    return paired_bootstrap(*values, *([] if other else [0]))


def score_table(scores: pd.DataFrame, order: list[str]) -> pd.DataFrame:
    """Systems by measures, formatted."""
    means, lines = scores.groupby(["system", "seed"]).mean(), {}
    for name in order:
        lines[name] = line = {}
        for measure, title in SHOWN.items():
            mean, low, high = gain(scores, measure, name)
            line[f"{title} [95%]"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        f1 = [f"{mean:.3f}" for mean in means.loc[name, "bertscore_f1"]]
        line["F1 by seed"] = ", ".join(f1 if len(f1) > 1 else [])
        for measure, decimals in OTHERS.items():
            shown = f"{means.loc[name, measure].mean():.{decimals}f}"
            line[measure.replace("_", " ")] = shown.replace("nan", "")
    return pd.DataFrame(lines).T.rename_axis("system")


def plot(scores: pd.DataFrame, order: list[str], path: Path) -> None:
    """Mean F1 of every system with its interval, and a dot for every seed; the best on top."""
    with drawing(path, (7, 0.45 * len(order) + 1.2)) as axes:
        for name in reversed(order):
            mean, low, high = gain(scores, "bertscore_f1", name)
            reach = [[mean - low], [high - mean]]
            axes[0, 0].errorbar(mean, name, xerr=reach, fmt="s", color="C0", capsize=3)
            seeds = scores.loc[name, "bertscore_f1"].groupby("seed").mean()
            axes[0, 0].plot(seeds, [name] * len(seeds), ".", color="C1")
        axes[0, 0].set_xlabel("BERTScore F1; bars: 95% interval over texts and seeds; dots: seeds")


def report(compared: Comparison, scores: pd.DataFrame, about: dict) -> None:
    """Write the tables with their note, the plot, and the lines of the ledger.

    The differences are those of the best preference recipe, and of the default one, over all.
    """
    args, titles = compared.args, {RECIPES.get(r, r): r for r in compared.args.recipes}
    means = scores["bertscore_f1"].groupby("system").mean()
    order = means.sort_values(ascending=False).index.tolist()
    best = [name for name in order if "@" in titles.get(name, "")][:1]
    default = [name for name in titles if titles[name] == DEFAULT and name not in best]
    gains = {}
    for ours in best + default:
        for other in [name for name in order if name not in (ours, *best)]:
            found = {title: gain(scores, m, ours, other) for m, title in SHOWN.items()}
            gains[f"{ours} minus {other}"] = {t: format_interval(*g) for t, g in found.items()}
    lacking = f" (rounds lacked {compared.lacking} of them)" if any(compared.lacking) else ""
    texts, longest = len(compared.ids), args.max_new_tokens
    path = Path("results") / f"{args.output}.md"
    plot(scores, order, path.with_suffix(".png"))
    frames = score_table(scores, order), pd.DataFrame(gains).T.rename_axis("difference [95%]")
    note = NOTE.format(**about, lacking=lacking, texts=texts, longest=longest)
    text = "\n\n".join([*map(markdown, frames), note, f"![]({path.stem}.png)"]) + "\n"
    write_text(path, text)
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
    parser.set_defaults(max_new_tokens=None, encoder="models/minilm", encoder_layers=6)
    args = parser.parse_args()
    task = task_of(args)
    possible = [recipe for recipe in RECIPES if task.answers == 2 or "@teacher" not in recipe]
    args.recipes = args.recipes or possible
    args.output = args.output or f"recipes-{task.name}".removesuffix("-summarize")
    compared = Comparison(args, task)
    base, frames = compared.base, {}
    rows = load_test_rows(base, args.n, task)
    if not args.max_new_tokens:  # the longest reference and the end of the turn
        tokenizer = load_tokenizer(Weights(base.base_model, base.base_revision))
        args.max_new_tokens = 1 + max(len(tokenizer(row["reference"]).input_ids) for row in rows)
    wanted = replace(task, measures=["bertscore", "rouge", "extractiveness"])
    measures, lengths = load_measures(wanted, args), [len(row["reference"].split()) for row in rows]
    for title, seed, answers, seconds in compared.answers(rows):
        values = score_texts(answers, rows, measures)
        values["length_ratio"] = np.divide(values["words"], lengths)
        frames[title, seed] = values.assign(training_seconds=seconds)
        print(f"{title}, {seed}: {values[[*SHOWN]].mean().round(3).to_dict()}", flush=True)
    about = {"date": datetime.now(UTC).date(), "commit": commit(), "config": compared.name}
    about["command"] = shlex.join(["just", "compare", *sys.argv[1:]])
    about |= {"encoder": measures["bertscore"].scorer.hash, "n": len(rows)}
    report(compared, pd.concat(frames, names=["system", "seed", "text"]), about)


if __name__ == "__main__":
    run(main)
