"""Score the systems' summaries against the teacher's references, side by side on the same texts.

Reads outputs/<config>/eval/summaries/*.jsonl and the references of the config's dataset, writes
outputs/<config>/eval/scores.json and scores.md and prints the table. BERTScore (Zhang et al. 2020)
by the bert-score package, ROUGE-L (Lin 2004) by rouge-score; differences with a paired bootstrap
95% interval (Efron & Tibshirani 1993, percentile).

    python -m eval.score_summaries axolotl_configs/smollm2-135m-dpo-sft-lora.yaml
"""

import json
import logging
from importlib.metadata import version
from pathlib import Path

import bert_score
import numpy as np
import pandas as pd
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from axolotl_configs.run_config import RunConfig, check_model_folder, load_run_config
from data_prep.records import UserError, positive, read_records, replacing, run, script_parser
from eval.generate_summaries import load_test_rows, systems_of

METRICS = ("bertscore_p", "bertscore_r", "bertscore_f1", "rouge_l")
COMPARED = ("bertscore_f1", "rouge_l")
TITLES = {
    "bertscore_p": "BERTScore P",
    "bertscore_r": "R",
    "bertscore_f1": "BERTScore F1",
    "bertscore_f1_rescaled": "F1 rescaled",
    "rouge_l": "ROUGE-L",
    "words": "mean words",
}
INTERVAL = "{:+.3f} [{:+.3f}, {:+.3f}]"
LEAD = "lead"
NAMES = {
    "base": "base, bare text",
    "base_told": "base, told to summarize",
    "tuned": "tuned adapter",
    LEAD: "the text's first sentences (no model)",
}


def paired_bootstrap(
    a: list[float], b: list[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b and its 95% percentile interval, resampling texts with replacement."""
    differences = np.asarray(a) - np.asarray(b)
    picks = np.random.default_rng(seed).integers(
        len(differences), size=(resamples, len(differences))
    )
    low, high = np.percentile(differences[picks].mean(axis=1), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def rouge_l(candidates: list[str], references: list[str]) -> list[float]:
    """ROUGE-L F1 of each pair, stemmed; 0 for an empty candidate."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [
        scorer.score(reference, candidate)["rougeL"].fmeasure
        for candidate, reference in zip(candidates, references, strict=True)
    ]


def lead_sentences(text: str, words: float) -> str:
    """As many of the text's first sentences as come nearest to `words`; never none."""
    from pysbd import Segmenter

    best = summary = ""
    for sentence in Segmenter(language="en").segment(" ".join(text.split())):
        summary = f"{summary} {sentence}".strip()
        if not best or abs(len(summary.split()) - words) < abs(len(best.split()) - words):
            best = summary
    return best


def rescale_baseline(encoder: str, layer: int) -> float | None:
    """The F1 of unrelated texts that bert-score ships for an encoder's layer, or None.

    A raw F1 x is rescaled to (x - b) / (1 - b), bert-score's `rescale_with_baseline`.
    """
    path = Path(bert_score.__file__).parent / f"rescale_baseline/en/{encoder}.tsv"
    return float(pd.read_csv(path)["F"][layer]) if path.is_file() else None


class BertScore:
    """The official BERTScorer, made to work with transformers 5 and encoders without a limit."""

    def __init__(self, encoder: str, layers: int | None, batch_size: int):
        try:
            self.scorer = bert_score.BERTScorer(
                model_type=encoder, num_layers=layers, batch_size=batch_size, lang="en"
            )
        except KeyError:
            raise UserError(
                f"bert-score knows no layer for {encoder}; pass --encoder-layers"
            ) from None
        except OSError as error:
            raise UserError(
                f"cannot load the encoder {encoder}: {' '.join(str(error).split())[:200]}"
            ) from None
        self.scorer._tokenizer.model_max_length = 512
        self.scorer._model.float()
        self.baseline = rescale_baseline(encoder, self.scorer.num_layers)

    def __call__(self, candidates: list[str], references: list[str]) -> np.ndarray:
        """Precision, recall and F1 of each pair, raw: shape (3, n); 0 for an empty candidate."""
        scores = np.zeros((3, len(candidates)))
        if full := [i for i, candidate in enumerate(candidates) if candidate.strip()]:
            result = self.scorer.score(
                [candidates[i] for i in full],
                [references[i] for i in full],
                batch_size=self.scorer.batch_size,
            )
            scores[:, full] = [part.numpy() for part in result]
        return scores

    def n_cut(self, texts: list[str]) -> int:
        """How many texts are longer than the encoder reads (512 tokens)."""
        return sum(len(self.scorer._tokenizer(t, verbose=False).input_ids) > 512 for t in texts)


def load_summaries(config: RunConfig, rows: list[dict]) -> dict[str, dict[str, dict]]:
    """system -> id -> record, in the table's order.

    Raises UserError if a system lacks a text or its texts were made with different settings.
    """
    ids = [row["id"] for row in rows]
    summaries = {}
    for system in systems_of(config):
        path = config.eval_dir / "summaries" / f"{system}.jsonl"
        records = {r["id"]: r for r in read_records(path, ("id", "text"), "just summaries")}
        if missing := set(ids) - records.keys():
            raise UserError(
                f"{path} lacks {len(missing)} of {len(ids)} test texts; "
                "complete it with `just summaries`, or pass the same --n"
            )
        summaries[system] = {i: records[i] for i in ids}
        if len({json.dumps(record["settings"]) for record in summaries[system].values()}) > 1:
            raise UserError(
                f"{path} holds texts made with different settings; run `just summaries` again "
                "with one setting for all of them"
            )
    words = float(np.mean([len(row["reference"].split()) for row in rows]))
    summaries[LEAD] = {
        row["id"]: {"text": lead_sentences(row["text"], words), "finish_reason": "stop"}
        for row in rows
    }
    return summaries


def score_systems(
    summaries: dict[str, dict[str, dict]], references: dict[str, str], scorer: BertScore
) -> dict:
    """Scores per system and text, means, and the tuned system's differences with intervals."""
    ids = list(references)
    golds = [references[i] for i in ids]
    per_text, systems = {}, {}
    for system in tqdm(summaries, desc="scoring", unit="system"):
        records = [summaries[system][i] for i in ids]
        texts = [record["text"] for record in records]
        p, r, f1 = scorer(texts, golds)
        scores = dict(zip(METRICS, (p, r, f1, rouge_l(texts, golds)), strict=True))
        per_text[system] = {metric: list(map(float, values)) for metric, values in scores.items()}
        systems[system] = {
            **{metric: float(np.mean(values)) for metric, values in scores.items()},
            "words": float(np.mean([len(text.split()) for text in texts])),
            "empty": sum(not text for text in texts),
            "stopped_at_limit": sum(record["finish_reason"] == "length" for record in records),
            "over_512_tokens": scorer.n_cut(texts),
        }
        if scorer.baseline is not None:
            rescaled = (systems[system]["bertscore_f1"] - scorer.baseline) / (1 - scorer.baseline)
            systems[system]["bertscore_f1_rescaled"] = rescaled
    differences = {
        base: {
            metric: paired_bootstrap(per_text["tuned"][metric], per_text[base][metric])
            for metric in COMPARED
        }
        for base in summaries
        if base != "tuned"
    }
    return {
        "n": len(ids),
        "systems": systems,
        "differences": differences,
        "ids": ids,
        "per_text": per_text,
    }


def table(result: dict) -> str:
    """The scores and the differences as Markdown."""
    columns = [column for column in TITLES if column in result["systems"]["tuned"]]
    scores = pd.DataFrame(result["systems"]).T[columns].rename(columns=TITLES, index=NAMES)
    scores["n"] = result["n"]
    differences = {
        f"tuned minus {NAMES[base]}": {TITLES[m]: INTERVAL.format(*values[m]) for m in COMPARED}
        for base, values in result["differences"].items()
    }
    digits = ("", *(".1f" if column == "words" else ".3f" for column in columns), ".0f")
    text = [
        scores.rename_axis("system").to_markdown(floatfmt=digits),
        pd.DataFrame(differences).T.rename_axis("difference [95% interval]").to_markdown(),
    ]
    if result["n"] < 30:
        text.append(f"n is {result['n']}: under 30, read the intervals with care.")
    return "\n\n".join(text)


def example(result: dict, rows: list[dict], summaries: dict[str, dict[str, dict]]) -> str:
    """The text whose gain over the told base is the median one, with every summary under it."""
    gains = np.subtract(
        result["per_text"]["tuned"]["bertscore_f1"], result["per_text"]["base_told"]["bertscore_f1"]
    )
    row = rows[int(np.argsort(gains)[len(gains) // 2])]
    parts = [
        f"The text of median gain ({row['id']}):",
        row["text"],
        "-- reference (teacher)",
        row["reference"],
    ]
    for system, records in summaries.items():
        parts += [f"-- {NAMES[system]}", records[row["id"]]["text"]]
    return "\n\n".join(parts)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("config", type=Path, help="the axolotl YAML of the run")
    option("--n", type=positive, help="only the first N test documents")
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=int, help="layer to compare, if not a known encoder")
    option("--batch-size", type=positive, default=16, help="texts the encoder reads at once")
    args = parser.parse_args()
    disable_progress_bar()
    config = load_run_config(args.config)
    check_model_folder(args.encoder)
    rows = load_test_rows(config, args.n)
    references = {row["id"]: row["reference"] for row in rows}
    summaries = load_summaries(config, rows)
    scorer = BertScore(args.encoder, args.encoder_layers, args.batch_size)
    result = score_systems(summaries, references, scorer)
    result["settings"] = {
        "config": config.path.name,
        "encoder": args.encoder,
        "hash": scorer.scorer.hash,
        "rescale_baseline": scorer.baseline,
        "resamples": 10_000,
        "seed": 0,
        "rouge_score": version("rouge-score"),
        "torch": version("torch"),
        "generation": summaries["tuned"][rows[0]["id"]]["settings"],
    }
    text = table(result)
    with replacing(config.eval_dir / "scores.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1))
    note = f"BERTScore P, R and F1 raw, {scorer.scorer.hash}; ROUGE-L stemmed."
    full = f"{text}\n\n{note}\n\n{example(result, rows, summaries)}\n"
    with replacing(config.eval_dir / "scores.md") as temporary:
        temporary.write_text(full)
    print(f"\n{full}")


if __name__ == "__main__":
    logging.getLogger("transformers").setLevel(logging.ERROR)
    run(main)
