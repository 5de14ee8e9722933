"""Train every recipe on the same examples with several seeds, score all on the same held-out texts.

All recipes are methods laid over one config, so data, passes over them, lengths, precision of the
adapter and everything else but the method are the same; a pair that does not fit stops the run. SFT
then DPO takes half of the examples by SFT and the other half by DPO, so that it sees as many as the
others. Trains into outputs/compare/, writes results/recipes.md and results/recipes.png. What is
trained or answered is not done again, and answers are kept by the weights that gave them.

    python -m eval.compare_recipes smollm2-135m-dpo-sft-lora --seeds 42 43 44
"""

import argparse
import math
import os
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import UserError, positive, run, script_parser
from common.files import write_text
from common.report import drawing, format_interval, markdown, paired_bootstrap
from data_prep.filter_pairs import repetition
from eval.generate_summaries import add_generation_options, summarize
from eval.measures import BertScore, rouge
from eval.score_summaries import commit
from eval.systems import load_test_rows, system_of
from prompts import load_task
from training.run_config import RunConfig, load_run_config

OUTPUT = Path("outputs/compare")
# In the table -> the methods trained one after the other, each with its part of the examples.
RECIPES = {
    "SFT": {"sft": "train"},
    "DPO": {"dpo": "train"},
    "DPO+SFT": {"dpo-sft": "train"},
    "SFT then DPO": {"sft": "train[:50%]", "sft-then-dpo": "train[50%:]"},
    "ORPO": {"orpo": "train"},
    "SimPO": {"simpo": "train"},
}
DEFAULT = "DPO+SFT"
MEASURES = {"f1": "BERTScore F1", "rouge_l": "ROUGE-L"}
CAVEATS = (
    "Intervals: paired bootstrap over texts and seeds, 10,000 resamples. They take texts of one "
    "article, and so few seeds, for independent; the best recipe was picked on these same texts: "
    "both make them look narrower than they are."
)


def train(base: RunConfig, method: str, part: str, seed: int, after: RunConfig | None) -> RunConfig:
    """Train `base` with a method on a part of its examples, going on from the run `after`.

    The seconds that a run took are kept in its folder, unless it was resumed.
    """
    name = f"compare/{base.path.stem}-{method}{'-half' * (part != 'train')}-{seed}"
    folder = base.output_dir.parent / name
    keys = [f"seed={seed}", f"datasets.0.split={part}"]
    keys += [f"lora_model_dir={after.output_dir}"] if after else []
    cpu = ["--cpu", "--num_cpu_threads_per_process", str(os.cpu_count())]
    command = ["training.train_adapter", str(base.path), "--method", method, "--name", name]
    command += ["--set", *keys, *([] if base.settings.get("bf16") else cpu)]
    fresh, started = not folder.exists(), time.monotonic()
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError(f"python -m {shlex.join(command)} failed")
    if fresh:
        write_text(folder / "seconds.txt", f"{time.monotonic() - started:.0f}\n")
    return load_run_config(folder / "config.yaml")


def train_recipe(base: RunConfig, recipe: str, seed: int) -> tuple[RunConfig, float]:
    """(the recipe's last run, the seconds that all of its runs took; NaN if one is not known)."""
    config, seconds = None, 0.0
    for method, part in RECIPES[recipe].items():
        config = train(base, method, part, seed, config)
        path = config.output_dir / "seconds.txt"
        seconds += float(path.read_text()) if path.exists() else math.nan
    return config, seconds


def measure(texts: list[str], rows: list[dict], scorer: BertScore) -> pd.DataFrame:
    """One line a text: f1, rouge_l, length_ratio (words to the reference's), repetition."""
    references = [row["reference"] for row in rows]
    lengths = zip(texts, references, strict=True)
    return pd.DataFrame(
        {
            "f1": scorer(texts, references)[2],
            "rouge_l": rouge(texts, references)["rouge_l"],
            "length_ratio": [len(t.split()) / len(r.split()) for t, r in lengths],
            "repetition": list(map(repetition, texts)),
        }
    )


def answer(name: str, system: str, base: RunConfig, rows: list[dict], args) -> list[str]:
    """A system's answers to all rows, made where these weights and settings lack them."""
    path = OUTPUT / "answers" / f"{name}.jsonl"
    found = system_of(base, system)
    records = summarize(name, found, rows, path, base.overrides, args)
    return [record["text"] for record in records]


def run_all(
    args: argparse.Namespace, base: RunConfig, rows: list[dict], scorer: BertScore
) -> tuple:
    """(system -> the scores of each seed, recipe -> the seconds of each seed)."""
    titles, scores = load_task().titles, {}
    for system in ("lead", "base", "instructed"):
        texts = answer(f"{base.path.stem}-{system}", system, base, rows, args)
        scores[titles[system]] = [measure(texts, rows, scorer)]
    costs: dict[str, list[float]] = {recipe: [] for recipe in args.recipes}
    for seed in args.seeds:
        for recipe in args.recipes:
            config, cost = train_recipe(base, recipe, seed)
            texts = answer(config.name, str(config.output_dir), base, rows, args)
            scores.setdefault(recipe, []).append(measure(texts, rows, scorer))
            costs[recipe].append(cost)
            means = scores[recipe][-1].mean().round(3).to_dict()
            print(f"{recipe}, seed {seed}: {means}", flush=True)
    return scores, costs


def stack(frames: list[pd.DataFrame], measure: str) -> np.ndarray:
    """A measure of shape (seeds, texts)."""
    return np.stack([frame[measure] for frame in frames])


def score_table(
    scores: dict[str, list[pd.DataFrame]], costs: dict[str, list[float]]
) -> pd.DataFrame:
    """Systems by measures, formatted, in the order of `scores`."""
    lines = {}
    for name, frames in scores.items():
        line = {}
        for key, title in MEASURES.items():
            mean, low, high = paired_bootstrap(stack(frames, key), 0)
            line[f"{title} [95%]"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        seeds = [f"{frame['f1'].mean():.3f}" for frame in frames]
        line["F1 by seed"] = ", ".join(seeds) if len(seeds) > 1 else ""
        line["length ratio"] = f"{stack(frames, 'length_ratio').mean():.2f}"
        line["repetition"] = f"{stack(frames, 'repetition').mean():.3f}"
        seconds = np.mean(costs.get(name, [math.nan]))
        line["training, s"] = "" if math.isnan(seconds) else f"{seconds:.0f}"
        lines[name] = line
    return pd.DataFrame(lines).T.rename_axis("system")


def difference_table(scores: dict[str, list[pd.DataFrame]]) -> pd.DataFrame:
    """Gains of the best recipe, and of the default one, over all others."""
    best = next(name for name in scores if name in RECIPES)
    lines = {
        f"{ours} minus {name}": {
            title: format_interval(*paired_bootstrap(stack(scores[ours], key), stack(frames, key)))
            for key, title in MEASURES.items()
        }
        for ours in dict.fromkeys([best, *({DEFAULT} & scores.keys())])
        for name, frames in scores.items()
        if name not in (ours, best)
    }
    return pd.DataFrame(lines).T.rename_axis("difference [95% interval]")


def plot(scores: dict[str, list[pd.DataFrame]], path: Path) -> None:
    """Mean F1 of every system with its interval, and a dot for every seed; the best on top."""
    with drawing(path, (7, 0.45 * len(scores) + 1.2)) as axes:
        axes = axes[0, 0]
        for y, frames in enumerate(reversed(scores.values())):
            f1 = stack(frames, "f1")
            mean, low, high = paired_bootstrap(f1, 0)
            axes.errorbar(
                mean, y, xerr=[[mean - low], [high - mean]], fmt="s", color="C0", capsize=3
            )
            if len(f1) > 1:
                axes.plot(f1.mean(axis=1), [y + 0.2] * len(f1), ".", color="C1")
        axes.plot([], [], ".", color="C1", label="one seed")
        axes.set_yticks(range(len(scores)), list(reversed(scores)))
        axes.set_xlabel("BERTScore F1 (raw); bars: 95% bootstrap interval over texts and seeds")
        axes.legend(loc="lower right")


def fill_lengths(args: argparse.Namespace, base: RunConfig, rows: list[dict]) -> None:
    """Answers as long as the longest reference, texts as long as the context leaves room for."""
    from transformers import AutoConfig, AutoTokenizer

    source = base.base_model, base.base_revision
    tokenizer = AutoTokenizer.from_pretrained(source[0], revision=source[1])
    longest = max(len(tokenizer(row["reference"]).input_ids) for row in rows)
    context = AutoConfig.from_pretrained(source[0], revision=source[1]).max_position_embeddings
    args.max_new_tokens = args.max_new_tokens or longest + 1  # and the end of the turn
    args.max_prompt_tokens = args.max_prompt_tokens or context - args.max_new_tokens


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", nargs="?", default="smollm2-135m-dpo-sft-lora", help="name, or a YAML")
    option("--seeds", type=int, nargs="+", default=[42, 43, 44], help="a training of each for each")
    option("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="to compare")
    option("--n", type=positive, help="only the first N held-out texts")
    add_generation_options(parser)
    parser.set_defaults(max_new_tokens=None, max_prompt_tokens=None)  # see fill_lengths
    option("--encoder", default="models/minilm", help="BERTScore's encoder")
    option("--encoder-layers", type=positive, default=6, help="its layer")
    option("--output", type=Path, default=Path("results"), help="folder of the table and the plot")
    args = parser.parse_args()
    base = load_run_config(args.config, trained=False)
    rows = load_test_rows(base, args.n)
    fill_lengths(args, base, rows)
    scorer = BertScore(args.encoder, args.encoder_layers, 32)
    scores, costs = run_all(args, base, rows, scorer)
    scores = dict(sorted(scores.items(), key=lambda item: -stack(item[1], "f1").mean()))
    local = sorted(path.name for path in Path(base.dataset).rglob("train-*.parquet"))
    note = (
        f"`just {shlex.join(['compare', *sys.argv[1:]])}`, {datetime.now(UTC).date()}, commit "
        f"{commit()}, n = {len(rows)} held-out texts, answers of at most {args.max_new_tokens} "
        f"tokens, dataset {local[0] if local else base.dataset}, {scorer.scorer.hash}. {CAVEATS}"
    )
    plot(scores, args.output / "recipes.png")
    tables = markdown(score_table(scores, costs)), markdown(difference_table(scores))
    text = "\n\n".join([*tables, note, "![](recipes.png)"]) + "\n"
    write_text(args.output / "recipes.md", text)
    print(f"\n{text}")


if __name__ == "__main__":
    run(main)
