"""Score the systems' summaries against the teacher's references, side by side on the same texts.

Reads outputs/<config>/eval/summaries/*.jsonl and the references of the config's dataset, writes
scores.json, scores.md, plots and report.html into outputs/<config>/eval and prints the table.
Measures: see eval/measures.py and eval/faithfulness.py; differences with a paired bootstrap 95%
interval (Efron & Tibshirani 1993, percentile).

    python -m eval.score_summaries axolotl_configs/smollm2-135m-dpo-sft-lora.yaml
"""

import argparse
import json
import logging
from importlib.metadata import version

import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from common.cli import UserError, positive, run, script_parser
from common.files import replacing
from common.report import paired_bootstrap
from eval.build_report import example, load_scores, table, write_report  # noqa: F401
from eval.faithfulness import Entailment, is_entailment_model
from eval.generate_summaries import load_summaries
from eval.measures import BertScore, rouge, shape
from eval.systems import add_run_options, load_test_rows, systems_of
from training.run_config import RunConfig, check_model_folder, load_run_config


def score_system(
    records: list[dict], rows: list[dict], scorer: BertScore, entailment: Entailment | None
) -> tuple[dict[str, list[float]], dict[str, float], list]:
    """(measure -> one value a text, measure -> value over all texts, supported sentences)."""
    texts = [record["text"] for record in records]
    golds = [row["reference"] for row in rows]
    raw = scorer(texts, golds)
    kinds = {"": raw, "_segments": scorer.by_segments(texts, golds, raw)}
    if scorer.baseline:
        kinds["_rescaled"] = scorer.rescale(raw)
    per_text = {
        f"bertscore_{name}{kind}": values.tolist()
        for kind, scores in kinds.items()
        for name, values in zip(("p", "r", "f1"), scores, strict=True)
    } | rouge(texts, golds)
    shapes = [shape(text, row["text"]) for text, row in zip(texts, rows, strict=True)]
    per_text |= {measure: [s[measure] for s in shapes] for measure in shapes[0]}
    support = []
    if entailment:
        documents = [row["text"] for row in rows]
        support = [entailment.support(*pair) for pair in zip(documents, texts, strict=True)]
        per_text["faithfulness"] = [
            float(np.mean([score for _, score in s])) if s else 0.0 for s in support
        ]
    if broken := [m for m, values in per_text.items() if not np.isfinite(values).all()]:
        place = rows[int(np.argmin(np.isfinite(per_text[broken[0]])))]["id"]
        raise UserError(f"{broken[0]} of text {place} is not a number; is the encoder sound?")
    counts = {
        "empty": sum(not text.strip() for text in texts),
        "stopped_at_limit": sum(record["finish_reason"] == "length" for record in records),
        "documents_cut": sum(record.get("n_cut_tokens", 0) > 0 for record in records),
        "over_512_tokens": scorer.n_cut(texts),
    }
    return per_text, {m: float(np.mean(v)) for m, v in per_text.items()} | counts, support


def differences(per_text: dict, target: str, places: list[int]) -> dict:
    """system -> measure -> mean and interval of the target's gain over it, on texts at `places`."""
    return {
        other: {
            measure: paired_bootstrap(
                *(np.asarray(per_text[s][measure])[places] for s in (target, other))
            )
            for measure in values
        }
        for other, values in per_text.items()
        if other != target
    }


def length_bins(lengths: list[int]) -> list[str]:
    """The quartile of each length, named by its shortest and longest; fewer where they coincide."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]))
    bins = pd.Series(lengths).groupby(np.searchsorted(edges, lengths))
    return [
        f"{a:,} to {b:,}" for a, b in zip(bins.transform("min"), bins.transform("max"), strict=True)
    ]


def groups(per_text: dict, target: str, rows: list[dict]) -> dict:
    """By source and by length in characters: n, means and gains of the BERTScore F1."""
    f1 = {system: {"bertscore_f1": v["bertscore_f1"]} for system, v in per_text.items()}
    lengths = [len(row["text"]) for row in rows]
    kinds = {"source": [row["source"] for row in rows], "characters": length_bins(lengths)}
    result = {}
    for kind, labels in kinds.items():
        result[kind] = {}
        for label in dict.fromkeys(labels[i] for i in np.argsort(lengths)):
            places = [i for i, one in enumerate(labels) if one == label]
            gains = differences(f1, target, places)
            result[kind][label] = {
                "n": len(places),
                "mean": float(np.mean([f1[target]["bertscore_f1"][i] for i in places])),
                "differences": {other: gain["bertscore_f1"] for other, gain in gains.items()},
            }
    return result


def score_systems(
    summaries: dict[str, dict[str, dict]],
    rows: list[dict],
    scorer: BertScore,
    entailment: Entailment | None = None,
) -> dict:
    """What scores.json holds, without its settings. The target of all differences is the tuned
    system, or the first where there is none."""
    target = "tuned" if "tuned" in summaries else next(iter(summaries))
    scored = {
        system: score_system([records[r["id"]] for r in rows], rows, scorer, entailment)
        for system, records in tqdm(summaries.items(), desc="scoring", unit="system")
    }
    per_text = {system: parts[0] for system, parts in scored.items()}
    return {
        "n": len(rows),
        "target": target,
        "systems": {system: parts[1] for system, parts in scored.items()},
        "references_over_512_tokens": scorer.n_cut([row["reference"] for row in rows]),
        "differences": differences(per_text, target, list(range(len(rows)))),
        "groups": groups(per_text, target, rows),
        "ids": [row["id"] for row in rows],
        "per_text": per_text,
        "support": {system: parts[2] for system, parts in scored.items()},
    }


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=int, help="layer to compare, if not a known encoder")
    option("--encoder-batch", type=positive, default=64, help="texts the encoder reads at once")
    option("--nli", help="model for faithfulness, or none (default: the encoder, if it is one)")


def score_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Score the systems that `args` names, write all files, print the table and an example."""
    summaries = load_summaries(config, rows, args.systems)
    scorer = BertScore(args.encoder, args.encoder_layers, args.encoder_batch)
    nli = args.nli or (args.encoder if is_entailment_model(args.encoder) else "none")
    if nli == "none":
        print(f"no faithfulness: {args.encoder} is no entailment model; --nli names one")
    entailment = None if nli == "none" else Entailment(nli, args.encoder_batch)
    result = score_systems(summaries, rows, scorer, entailment)
    result["settings"] = {
        "config": config.path.name,
        "encoder": args.encoder,
        "hash": scorer.scorer.hash,
        "rescale_baseline": scorer.baseline,
        "faithfulness": entailment and entailment.settings,
        "resamples": 10_000,
        "seed": 0,
        **{package: version(package) for package in ("rouge-score", "torch", "transformers")},
        "generation": {s: records[rows[0]["id"]]["settings"] for s, records in summaries.items()},
    }
    with replacing(config.eval_dir / "scores.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    write_report(config.eval_dir, result, rows, summaries)
    note = f"BERTScore by {scorer.scorer.hash}; ROUGE stemmed; more in {config.eval_dir}"
    print(f"\n{table(result)}\n\n{example(result, rows, summaries)}\n\n{note}/report.html")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_scoring_options(parser)
    args = parser.parse_args()
    disable_progress_bar()
    config = load_run_config(args.config)
    check_model_folder(args.encoder)
    systems_of(config, args.systems)
    score_all(config, load_test_rows(config, args.n), args)


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run(main)
