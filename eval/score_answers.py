"""Score the systems' answers against the teacher's references, side by side on the same texts.

Reads outputs/RUN/eval/answers/*.jsonl and the references of the run's dataset, writes
outputs/RUN/eval/scores.json, which `build_report` shows and records. The task names the measures
(eval/measures.py, eval/faithfulness.py); differences with a paired bootstrap 95% interval.

    python -m eval.score_answers smollm2-135m-dpo-sft-lora
"""

import argparse
import json
import subprocess
from collections.abc import Callable
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
from eval.generate_answers import load_answers
from eval.measures import BertScore, basics, extractiveness, rouge
from eval.systems import add_run_options, load_test_rows, systems_of
from prompts import Task
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
MORE += " density novel_bigrams repetition empty stopped_at_limit documents_cut over_512_tokens"
MORE_TITLES = {measure: measure.replace("_", " ") for measure in MORE.split()}
COMPARED = ("bertscore_f1", "rouge_l", "faithfulness")
MEASURES = ("bertscore", "rouge", "extractiveness", "faithfulness")


def load_scores(config: RunConfig) -> dict:
    """scores.json of a run. Raises UserError if it was not made."""
    path = config.eval_dir / "scores.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        hint = f"make it with `just scores {config.name}`"
        raise UserError(f"cannot read {path}: {error.strerror}; {hint}") from None


def load_evaluation(config: RunConfig) -> tuple[dict, list[dict], dict[str, dict[str, dict]]]:
    """(scores, test rows, system -> id -> answer) of a run, exactly those that were scored."""
    scores = load_scores(config)
    rows, settings = load_test_rows(config, scores["n"]), scores["settings"]
    if settings["documents"] != hash_of(rows):
        raise UserError(
            f"the test documents of {config.dataset} are not those that were scored; run "
            f"`just answers {config.name}` and `just scores {config.name}`"
        )
    systems = list(scores["systems"])
    return scores, rows, load_answers(config, rows, systems, asked=settings["generation"])


def hash_of(rows: list[dict]) -> str:
    """What tells these documents and references from others."""
    return digest(*(part for row in rows for part in (row["id"], row["text"], row["reference"])))


def commit() -> str:
    """The short hash of HEAD, with a + if tracked files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=int, help="layer to compare, if not a known encoder")
    option("--encoder-batch", type=positive, default=64, help="texts the encoder reads at once")
    option("--nli", help="model for faithfulness, or none (default: the encoder, if it is one)")


def load_measures(task: Task, args: argparse.Namespace) -> dict[str, Callable]:
    """The measures that a task names. Raises UserError for one that does not exist."""
    if unknown := set(task.measures) - {*MEASURES}:
        raise UserError(
            f"{task.folder / 'task.yaml'}: measures: no {', '.join(sorted(unknown))}; there are "
            f"{', '.join(MEASURES)}"
        )
    found = {"basics": basics, "rouge": rouge, "extractiveness": extractiveness}
    found = {name: one for name, one in found.items() if name in ("basics", *task.measures)}
    if "bertscore" in task.measures:
        check_model_folder(args.encoder)
        scorer = BertScore(args.encoder, args.encoder_layers, args.encoder_batch)
        found = {"bertscore": scorer, **found}
    if "faithfulness" in task.measures and args.nli != "none":
        if nli := args.nli or (is_entailment_model(args.encoder) and args.encoder):
            found["faithfulness"] = Entailment(nli, args.encoder_batch)
        else:
            print(f"no faithfulness: {args.encoder} is no entailment model; --nli names one")
    return found


def score_texts(texts: list[str], rows: list[dict], measures: dict[str, Callable]) -> pd.DataFrame:
    """A line a text, by its id, a column a figure. Raises UserError for what is not a number."""
    columns = {}
    for measure in measures.values():
        columns |= measure(texts, rows)
    values = pd.DataFrame(columns, index=[row["id"] for row in rows])
    faulty = ~np.isfinite(values)
    for name in values.columns[faulty.any()]:
        place = faulty.index[faulty[name]][0]
        raise UserError(f"{name} of text {place} is not a number; is the encoder sound?")
    return values


def count(records: list[dict], scorer: BertScore | None) -> dict[str, int]:
    """What was cut, and what is empty, among a system's answers."""
    texts = [record["text"] for record in records]
    counts = {
        "empty": sum(not text.strip() for text in texts),
        "stopped_at_limit": sum(record["finish_reason"] == "length" for record in records),
        "documents_cut": sum(record.get("n_cut_tokens", 0) > 0 for record in records),
    }
    return counts | ({"over_512_tokens": scorer.n_cut(texts)} if scorer else {})


def score_systems(answers: dict[str, dict], rows: list[dict], measures: dict) -> dict:
    """What scores.json holds, without its settings. The target of all differences is the tuned
    system, or the first where there is none."""
    values, counts, scorer = {}, {}, measures.get("bertscore")
    for system, by_id in tqdm(answers.items(), desc="scoring", unit="system"):
        records = [by_id[row["id"]] for row in rows]
        values[system] = score_texts([record["text"] for record in records], rows, measures)
        counts[system] = count(records, scorer)
    target = "tuned" if "tuned" in values else next(iter(values))
    return {
        "n": len(rows),
        "target": target,
        "systems": {s: found.mean().to_dict() | counts[s] for s, found in values.items()},
        "references_over_512_tokens": scorer and scorer.n_cut([row["reference"] for row in rows]),
        "differences": {
            other: {m: paired_bootstrap(values[target][m], found[m]) for m in found}
            for other, found in values.items()
            if other != target
        },
        "ids": [row["id"] for row in rows],
        "per_text": {system: found.to_dict("list") for system, found in values.items()},
    }


def score_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> None:
    """Score the systems that `args` names and write scores.json."""
    answers, measures = load_answers(config, rows, args.systems), load_measures(config.task, args)
    result = score_systems(answers, rows, measures)
    scorer, entailment = measures.get("bertscore"), measures.get("faithfulness")
    result["settings"] = {
        "config": config.name,
        "task": config.task.name,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "documents": hash_of(rows),
        "encoder": scorer and args.encoder,
        "hash": scorer and scorer.hash,
        "rescale_baseline": scorer and scorer.baseline,
        "faithfulness": entailment and entailment.settings,
        "resamples": RESAMPLES,
        "seed": 0,
        **{package: version(package) for package in ("rouge-score", "torch", "transformers")},
        "generation": {s: records[rows[0]["id"]]["settings"] for s, records in answers.items()},
    }
    write_text(config.eval_dir / "scores.json", json.dumps(result, indent=1))
    print(f"scores of {len(answers)} systems on {len(rows)} texts in {config.eval_dir}")


def main() -> None:
    parser = script_parser(__doc__)
    add_run_options(parser)
    add_scoring_options(parser)
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    config = load_run_config(args.config)
    systems_of(config, args.systems)
    score_all(config, load_test_rows(config, args.n), args)


if __name__ == "__main__":
    run(main)
