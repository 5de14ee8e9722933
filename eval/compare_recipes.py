"""Train every recipe on the same examples with several seeds, score all on the same held-out texts.

Reads the configs of RECIPES and the dataset they name, trains into outputs/compare/RECIPE-SEED,
writes results/recipes.md and results/recipes.png. Every recipe sees every example once (SFT then
DPO: half of them by SFT, the other half by DPO). What is trained or summarized already is not done
again, so a stopped comparison goes on where it was.

    python -m eval.compare_recipes --seeds 42 43 44
    python -m eval.compare_recipes --configs qwen2-1.5b-{}-qlora   # on a GPU, at full size
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import append_record, appending, read_records, replacing
from common.report import format_interval, paired_bootstrap
from data_prep.filter_pairs import repetition
from eval.generate_summaries import build_prompt, generate_batch, load_model
from eval.measures import BertScore, rouge
from eval.score_summaries import commit
from eval.systems import INSTRUCTED, lead_sentences, load_test_rows
from training.run_config import RunConfig, load_run_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIGS = Path("axolotl_configs")
OUTPUT = Path("outputs/compare")
STUDENT = "smollm2-135m-{}-lora"
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
INSTRUCTED_BASE = "base, instructed"
UNTRAINED = {"base, bare text": None, INSTRUCTED_BASE: INSTRUCTED}
LEAD = "first sentences, no model"
MEASURES = {"f1": "BERTScore F1", "rouge_l": "ROUGE-L"}


def derive_config(stem: str, part: str, seed: int, after: RunConfig | None) -> RunConfig:
    """The recipe's config with this seed and part of the examples, going on from run `after`."""
    settings = load_run_config(CONFIGS / f"{stem}.yaml").settings
    name = f"{stem}-{seed}" if part == "train" else f"{stem}-half-{seed}"
    settings["datasets"][0]["split"] = part
    settings |= {
        "seed": seed,
        "output_dir": str(OUTPUT / name),
        "dataset_prepared_path": str(OUTPUT / name / "prepared"),
    }
    if after:
        settings["lora_model_dir"] = str(after.output_dir)
    path = OUTPUT / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return load_run_config(path)


def run_stage(*command: str) -> None:
    if subprocess.run([sys.executable, "-m", *command]).returncode:
        raise UserError(f"python -m {' '.join(command)} failed")


def train(config: RunConfig, threads: int) -> dict:
    """Train through the usual stage. Returns {seconds, cpu_seconds} of the run, kept beside it."""
    cost = config.path.with_suffix(".cost.json")
    fresh = not config.output_dir.exists()
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = ["--cpu", "--num_cpu_threads_per_process", str(threads)]
    options = [] if torch.cuda.is_available() else cpu
    run_stage("training.train_adapter", str(config.path), *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if fresh:  # a resumed run's time would be that of its rest
        spent = {
            "seconds": time.monotonic() - started,
            "cpu_seconds": sum(
                getattr(after, k) - getattr(before, k) for k in ("ru_utime", "ru_stime")
            ),
        }
        cost.write_text(json.dumps(spent))
    return json.loads(cost.read_text()) if cost.exists() else {}


def summarize(
    path: Path, config: RunConfig, model: str, template: str | None, rows: list[dict], args
) -> list[str]:
    """The summaries of every row by a model or adapter folder, made where they are missing."""
    with appending(path) as log:
        done = {record["id"] for record in read_records(path, ("id", "text"))}
        if missing := [row for row in rows if row["id"] not in done]:
            model, tokenizer = load_model(model, config.base_revision)
            limit = args.max_prompt_tokens
            prompts = {
                r["id"]: build_prompt(tokenizer, r["text"], template, limit)[0] for r in missing
            }
            ids = sorted(prompts, key=lambda i: len(prompts[i]))
            batches = [ids[i : i + args.batch_size] for i in range(0, len(ids), args.batch_size)]
            for batch in tqdm(batches, desc=f"{path.stem} summaries", unit="batch"):
                texts = [prompts[i] for i in batch]
                outputs = generate_batch(model, tokenizer, texts, args.max_new_tokens)
                for i, output in zip(batch, outputs, strict=True):
                    append_record(log, {"id": i, **output})
    texts = {r["id"]: r["text"] for r in read_records(path, ("id", "text"))}
    return [texts[row["id"]] for row in rows]


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


def run_all(
    args: argparse.Namespace, base: RunConfig, rows: list[dict], scorer: BertScore
) -> tuple[dict, dict]:
    """(system -> the scores of each seed, recipe -> the cost of each seed)."""
    words = float(np.mean([len(row["reference"].split()) for row in rows]))
    lead = [lead_sentences(row["text"], words) for row in rows]
    scores = {LEAD: [measure(lead, rows, scorer)]}
    for name, template in UNTRAINED.items():
        path = OUTPUT / f"{args.configs.format('base')}{'-told' * bool(template)}.jsonl"
        made = summarize(path, base, base.base_model, template, rows, args)
        scores[name] = [measure(made, rows, scorer)]
    costs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for recipe in args.recipes:
            parts = RECIPES[recipe]
            config, cost = None, {}
            for method, part in parts.items():
                config = derive_config(args.configs.format(method), part, seed, after=config)
                spent = train(config, args.threads)
                cost = {k: cost.get(k, 0) + v for k, v in spent.items()}
            path = config.path.with_suffix(".jsonl")
            model = config.output_dir
            if config.settings.get("load_in_4bit"):  # merged into the weights it was trained on
                run_stage("eval.merge_adapter", str(config.path))
                model = config.merged
            made = summarize(path, config, str(model), None, rows, args)
            scores.setdefault(recipe, []).append(measure(made, rows, scorer))
            costs.setdefault(recipe, []).append(cost)
            print(
                f"{recipe}, seed {seed}: {scores[recipe][-1].mean().round(3).to_dict()}", flush=True
            )
    return scores, costs


def tables(scores: dict[str, list[pd.DataFrame]], costs: dict[str, list[dict]]) -> str:
    """The comparison as two Markdown tables, best recipe first."""
    runs = {
        name: {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
        for name, frames in scores.items()
    }
    order = sorted(runs, key=lambda name: -runs[name]["f1"].mean())
    lines = []
    for name in order:
        line = {"system": name}
        for key, title in MEASURES.items():
            mean, low, high = paired_bootstrap(runs[name][key], np.zeros(1))
            line[f"{title} [95%]"] = f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        seeds = runs[name]["f1"].mean(axis=1)
        line["F1 by seed"] = ", ".join(f"{s:.3f}" for s in seeds) if len(seeds) > 1 else ""
        line["length ratio"] = f"{runs[name]['length_ratio'].mean():.2f}"
        line["repetition"] = f"{runs[name]['repetition'].mean():.3f}"
        for key, title in (("seconds", "wall s"), ("cpu_seconds", "CPU s")):
            spent = [cost[key] for cost in costs.get(name, []) if cost]
            line[title] = f"{np.mean(spent):.0f}" if spent else ""
        lines.append(line)
    best = next(name for name in order if name in RECIPES)
    differences = {
        f"{ours} minus {name}": {
            title: format_interval(*paired_bootstrap(runs[ours][key], runs[name][key]))
            for key, title in MEASURES.items()
        }
        for ours in dict.fromkeys([best, *({DEFAULT} & runs.keys())])
        for name in order
        if name not in (ours, best)
    }
    return "\n\n".join(
        [
            pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True),
            pd.DataFrame(differences).T.rename_axis("difference [95% interval]").to_markdown(),
        ]
    )


def plot(scores: dict[str, list[pd.DataFrame]], path: Path) -> None:
    """Mean F1 of every system with its interval over texts, and a dot for every seed."""
    order = sorted(scores, key=lambda name: np.mean([f["f1"].mean() for f in scores[name]]))
    figure, axes = plt.subplots(figsize=(7, 0.45 * len(order) + 1.2), layout="constrained")
    for y, name in enumerate(order):
        runs = [frame["f1"] for frame in scores[name]]
        mean, low, high = paired_bootstrap(runs, np.zeros(1))
        axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="s", color="C0", capsize=3)
        if len(runs) > 1:
            axes.plot(np.mean(runs, axis=1), [y + 0.2] * len(runs), ".", color="C1")
    axes.plot([], [], ".", color="C1", label="one seed")
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("BERTScore F1 (raw); bars: 95% bootstrap interval over texts and seeds")
    axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--configs", default=STUDENT, help="in axolotl_configs, {} for the method's name")
    option("--seeds", type=int, nargs="+", default=[42, 43, 44])
    option("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    option("--n", type=positive, help="only the first N held-out texts")
    option("--max-new-tokens", type=positive, default=96, help="longest summary")
    option("--max-prompt-tokens", type=positive, default=4096, help="longer texts are cut")
    option("--batch-size", type=positive, default=26, help="texts at once")
    option("--threads", type=positive, default=os.cpu_count(), help="of training and generation")
    option("--encoder", default="models/minilm", help="BERTScore's encoder")
    option("--encoder-layers", type=positive, default=6, help="its layer")
    option("--output", type=Path, default=Path("results"), help="folder of the table and the plot")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_run_config(CONFIGS / f"{args.configs.format('dpo-sft')}.yaml")
    rows = load_test_rows(config, args.n)
    scorer = BertScore(args.encoder, args.encoder_layers, 32)
    scores, costs = run_all(args, config, rows, scorer)
    local = sorted(path.name for path in Path(config.dataset).rglob("train-*.parquet"))
    dataset = local[0] if local else config.dataset
    note = (
        f"`just {shlex.join(['compare', *sys.argv[1:]])}`, {datetime.now(UTC).date()}, "
        f"commit {commit()}, n = {len(rows)} held-out texts, dataset {dataset}, "
        f"{args.threads} thread(s), {scorer.scorer.hash}. Intervals: paired bootstrap over texts "
        "and seeds, 10,000 resamples."
    )
    args.output.mkdir(exist_ok=True)
    plot(scores, args.output / "recipes.png")
    text = f"{tables(scores, costs)}\n\n{note}\n\n![](recipes.png)\n"
    with replacing(args.output / "recipes.md") as temporary:
        temporary.write_text(text)
    print(f"\n{text}")


if __name__ == "__main__":
    run(main)
