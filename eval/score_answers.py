"""Score the systems' summaries against the teacher's references, side by side on the same texts.

Reads outputs/RUN/eval/summaries/*.jsonl and the references of the run's dataset, writes
outputs/RUN/eval/scores.json, which `build_report` shows and records. Measures: see eval/measures.py
and eval/faithfulness.py; differences with a paired bootstrap 95% interval.

    python -m eval.score_summaries smollm2-135m-dpo-sft-lora
"""

import argparse
import json
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version

import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from common.cli import UserError, positive, run, script_parser
from common.files import digest, write_text
from common.report import RESAMPLES, paired_bootstrap
from eval.faithfulness import Entailment, is_entailment_model
from eval.generate_summaries import load_summaries
from eval.measures import BertScore, extractiveness, rouge
from eval.systems import add_run_options, load_test_rows, systems_of
from training.run_config import RunConfig, check_model_folder, load_run_config

# What scores.json holds of every system, with the titles in tables.
TITLES = {
    "bertscore_p": "BERTScore P",
    "bertscore_r": "R",
    "bertscore_f1": "BERTScore F1",
    "bertscore_f1_rescaled": "F1 rescaled",
    "rouge_l": "ROUGE-L",
    "faithfulness": "faithfulness",
    "words": "mean words",
}
MORE = "bertscore_p_rescaled bertscore_r_rescaled rouge_1 rouge_2 rouge_lsum compression coverage"
MORE += " density novel_bigrams repetition"
MORE_TITLES = {measure: measure.replace("_", " ") for measure in MORE.split()}
COUNTED = ("empty", "stopped_at_limit", "documents_cut", "over_512_tokens")
COUNTS = {count: count.replace("_", " ") for count in COUNTED}
COMPARED = ("bertscore_f1", "rouge_l", "faithfulness")


def load_scores(config: RunConfig) -> dict:
    """scores.json of a run. Raises UserError if it was not made."""
    path = config.eval_dir / "scores.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        hint = f"make it with `just scores {config.name}`"
        raise UserError(f"cannot read {path}: {error.strerror}; {hint}") from None


def load_evaluation(config: RunConfig) -> tuple[dict, list[dict], dict[str, dict[str, dict]]]:
    """(scores, test rows, system -> id -> summary) of a run, exactly those that were scored."""
    scores = load_scores(config)
    rows, settings = load_test_rows(config, scores["n"]), scores["settings"]
    if settings.get("documents", hash_of(rows)) != hash_of(rows):
        raise UserError(
            f"the test documents of {config.dataset} are not those that were scored; run "
            f"`just summaries {config.name}` and `just scores {config.name}`"
        )
    systems = list(scores["systems"])
    return scores, rows, load_summaries(config, rows, systems, asked=settings["generation"])


def hash_of(rows: list[dict]) -> str:
    """What tells these documents and references from others."""
    return digest(*(part for row in rows for part in (row["id"], row["text"], row["reference"])))


def commit() -> str:
    """The short hash of HEAD, with a + if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def score_texts(
    texts: list[str], rows: list[dict], scorer: BertScore, entailment: Entailment | None
) -> tuple[pd.DataFrame, list]:
    """(a line a text, a column a measure; each text's sentences with their support, if measured).

    Raises UserError for a value that is not a number.
    """
    references = [row["reference"] for row in rows]
    pairs = [(row["text"], text) for row, text in zip(rows, texts, strict=True)]
    raw = scorer(texts, references)
    columns = dict(zip(("bertscore_p", "bertscore_r", "bertscore_f1"), raw, strict=True))
    if scorer.baseline:
        rescaled = zip(list(columns), scorer.rescale(raw), strict=True)
        columns |= {f"{measure}_rescaled": values for measure, values in rescaled}
    found = [extractiveness(text, document) for document, text in pairs]
    values = pd.DataFrame(columns | rouge(texts, references)).join(pd.DataFrame(found))
    support = [entailment.support(*pair) for pair in pairs] if entailment else []
    if entailment:
        values["faithfulness"] = [np.mean([p for _, p in s]) if s else 0.0 for s in support]
    for measure in values:
        if not np.isfinite(values[measure]).all():
            place = rows[int(np.argmin(np.isfinite(values[measure])))]["id"]
            raise UserError(f"{measure} of text {place} is not a number; is the encoder sound?")
    return values, support


def count(records: list[dict], scorer: BertScore) -> dict[str, int]:
    """What was cut, and what is empty, among a system's summaries."""
    return {
        "empty": sum(not record["text"].strip() for record in records),
        "stopped_at_limit": sum(record["finish_reason"] == "length" for record in records),
        "documents_cut": sum(record.get("n_cut_tokens", 0) > 0 for record in records),
        "over_512_tokens": scorer.n_cut([record["text"] for record in records]),
    }


def differences(per_text: dict[str, pd.DataFrame], target: str) -> dict:
    """system -> measure -> mean and interval of the target's gain over it."""
    return {
        other: {m: paired_bootstrap(per_text[target][m], values[m]) for m in values}
        for other, values in per_text.items()
        if other != target
    }


def length_bins(lengths: list[int]) -> list[str]:
    """The quartile of each length, named by its shortest and longest; fewer where they coincide."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]))
    bins = pd.Series(lengths).groupby(np.searchsorted(edges, lengths))
    ranges = zip(bins.transform("min"), bins.transform("max"), strict=True)
    return [f"{shortest:,} to {longest:,}" for shortest, longest in ranges]


def groups(per_text: dict[str, pd.DataFrame], target: str, rows: list[dict]) -> dict:
    """By source and by length in characters, the shortest first: n, means and gains of the F1."""
    lengths = pd.Series([len(row["text"]) for row in rows])
    labels = pd.DataFrame(
        {"source": [row["source"] for row in rows], "characters": length_bins(lengths)}
    ).loc[lengths.sort_values(kind="stable").index]
    result = {kind: {} for kind in labels}
    for kind in labels:
        for label, part in labels.groupby(kind, sort=False):
            places = sorted(part.index)
            f1 = {s: values.loc[places, ["bertscore_f1"]] for s, values in per_text.items()}
            gains = differences(f1, target)
            result[kind][label] = {
                "n": len(part),
                "mean": float(f1[target]["bertscore_f1"].mean()),
                "differences": {other: gain["bertscore_f1"] for other, gain in gains.items()},
            }
    return result


def score_systems(
    summaries: dict[str, dict[str, dict]],
    rows: list[dict],
    scorer: BertScore,
    entailment: Entailment | None,
) -> dict:
    """What scores.json holds, without its settings. The target of all differences is the tuned
    system, or the first where there is none."""
    target = "tuned" if "tuned" in summaries else next(iter(summaries))
    systems, per_text, support = {}, {}, {}
    for system, by_id in tqdm(summaries.items(), desc="scoring", unit="system"):
        records = [by_id[row["id"]] for row in rows]
        texts = [record["text"] for record in records]
        per_text[system], support[system] = score_texts(texts, rows, scorer, entailment)
        systems[system] = per_text[system].mean().to_dict() | count(records, scorer)
    return {
        "n": len(rows),
        "target": target,
        "systems": systems,
        "references_over_512_tokens": scorer.n_cut([row["reference"] for row in rows]),
        "differences": differences(per_text, target),
        "groups": groups(per_text, target, rows),
        "ids": [row["id"] for row in rows],
        "per_text": {system: values.to_dict("list") for system, values in per_text.items()},
        "support": support,
    }


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=int, help="layer to compare, if not a known encoder")
    option("--encoder-batch", type=positive, default=64, help="texts the encoder reads at once")
    option("--nli", help="model for faithfulness, or none (default: the encoder, if it is one)")


def score_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Score the systems that `args` names and write scores.json."""
    summaries = load_summaries(config, rows, args.systems)
    scorer = BertScore(args.encoder, args.encoder_layers, args.encoder_batch)
    nli = args.nli or (args.encoder if is_entailment_model(args.encoder) else "none")
    if nli == "none":
        print(f"no faithfulness: {args.encoder} is no entailment model; --nli names one")
    entailment = None if nli == "none" else Entailment(nli, args.encoder_batch)
    result = score_systems(summaries, rows, scorer, entailment)
    result["settings"] = {
        "config": config.name,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "documents": hash_of(rows),
        "encoder": args.encoder,
        "hash": scorer.scorer.hash,
        "rescale_baseline": scorer.baseline,
        "faithfulness": entailment and entailment.settings,
        "resamples": RESAMPLES,
        "seed": 0,
        **{package: version(package) for package in ("rouge-score", "torch", "transformers")},
        "generation": {s: records[rows[0]["id"]]["settings"] for s, records in summaries.items()},
    }
    write_text(config.eval_dir / "scores.json", json.dumps(result, indent=1))
    print(f"scores of {len(summaries)} systems on {len(rows)} texts in {config.eval_dir}")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_scoring_options(parser)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    config = load_run_config(args.config)
    check_model_folder(args.encoder)
    systems_of(config, args.systems)
    score_all(config, load_test_rows(config, args.n), args)


if __name__ == "__main__":
    run(main)
