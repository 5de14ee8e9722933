"""Score the systems' answers against the teacher's references, side by side on the same texts.

Reads outputs/RUN/eval/answers/*.jsonl and the run's dataset, writes outputs/RUN/eval/scores.json,
with the measures that the task names. `just scores RUN` (eval/evaluate.py) runs it.
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

from common.cli import UserError, positive
from common.files import digest, read_json, write_text
from common.stats import RESAMPLES, paired_bootstrap
from eval.answer_texts import load_answers
from eval.bertscore import BertScore
from eval.entailment import Entailment, is_entailment_model
from eval.measures import basics, extractiveness, rouge
from eval.systems import load_test_rows
from inference.weights import memory_told
from prompts.task import Task
from training.config import RunConfig

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
MORE = "bertscore_p_rescaled bertscore_r_rescaled rouge_1 rouge_2 rouge_lsum coverage density"
MORE += " repetition empty no_answer stopped_at_limit documents_cut over_512_tokens"
MORE_TITLES = {measure: measure.replace("_", " ") for measure in MORE.split()}
COMPARED = ("bertscore_f1", "rouge_l", "faithfulness")


def load_scores(config: RunConfig) -> dict:
    """scores.json of a run. Raises UserError if it was not made."""
    if scores := read_json(config.eval_dir / "scores.json"):
        return scores
    raise UserError(f"no scores in {config.eval_dir}; make them with `just scores {config.name}`")


def load_evaluation(config: RunConfig) -> tuple[dict, list[dict], dict[str, dict[str, dict]]]:
    """(scores, test rows, system -> id -> answer) of a run, exactly those that were scored."""
    scores = load_scores(config)
    rows, settings = load_test_rows(config, scores["n"]), scores["settings"]
    if settings["documents"] != digest(*rows):
        hint = f"run `just answers {config.name}` and `just scores {config.name}`"
        raise UserError(f"the texts of {config.dataset} are not those that were scored; {hint}")
    systems = list(scores["systems"])
    return scores, rows, load_answers(config, rows, systems, asked=settings["generation"])


def commit() -> str:
    """The short hash of HEAD, with a + if tracked files differ from it; "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # there is no git
        said = ""
    return said or "unknown"


def add_scoring_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--encoder", default="microsoft/deberta-xlarge-mnli", help="Hub id or folder")
    option("--encoder-layers", type=positive, help="layer to compare, if not a known encoder")
    option("--encoder-batch", type=positive, default=64, help="texts the encoder reads at once")
    option("--nli", help="model for faithfulness (default: the encoder, if it is one)")


def load_measures(task: Task, args: argparse.Namespace) -> dict[str, Callable]:
    """The measures that a task names. Raises UserError for one that does not exist."""
    nli, wanted = args.nli or args.encoder, {"basics", *task.measures}
    makers = {
        "basics": lambda: basics,
        "bertscore": lambda: BertScore(args.encoder, args.encoder_layers, args.encoder_batch),
        "rouge": lambda: rouge,
        "extractiveness": lambda: extractiveness,
        "faithfulness": lambda: Entailment(nli, args.encoder_batch),
    }
    if unknown := wanted - makers.keys():
        place = f"{task.folder / 'task.yaml'}: measures: no {', '.join(sorted(unknown))}"
        raise UserError(f"{place}; there are {', '.join(makers)}")
    if "faithfulness" in wanted and not (args.nli or is_entailment_model(nli)):
        print(f"no faithfulness: {nli} is no entailment model; --nli names one")
        wanted.remove("faithfulness")
    return {name: make() for name, make in makers.items() if name in wanted}


def score_texts(texts: list[str], rows: list[dict], measures: dict[str, Callable]) -> pd.DataFrame:
    """A line a text, a column a figure. Raises UserError for what is not a number."""
    columns = {}
    with memory_told("lower --encoder-batch"):
        for measure in measures.values():
            columns |= measure(texts, rows)
    values = pd.DataFrame(columns)
    if faulty := values.columns[~np.isfinite(values).all()].tolist():
        raise UserError(f"{', '.join(faulty)}: some are not numbers; is the encoder sound?")
    return values


def digest_of(records: dict[str, dict], rows: list[dict]) -> str:
    """Tells a system's answers to `rows` from others."""
    return digest(*(records[row["id"]]["text"] for row in rows))


def score_all(config: RunConfig, rows: list[dict], args: argparse.Namespace) -> tuple[dict, dict]:
    """Score the systems that `args` names and write scores.json: (the scores, what was scored). The
    target of all differences is the tuned system, or the first where there is none."""
    answers, measures = load_answers(config, rows, args.systems), load_measures(config.task, args)
    scorer, entailment = measures.get("bertscore"), measures.get("faithfulness")
    target = "tuned" if "tuned" in answers else next(iter(answers))
    values, systems, support = {}, {}, {}
    for system, by_id in tqdm(answers.items(), desc="scoring", unit="system"):
        records = [by_id[row["id"]] for row in rows]
        values[system] = score_texts([record["text"] for record in records], rows, measures)
        systems[system] = values[system].mean().to_dict() | {
            "empty": sum(not record["text"].strip() for record in records),
            "no_answer": sum("unusable" in record for record in records),
            "stopped_at_limit": sum(record["finish_reason"] == "length" for record in records),
            "documents_cut": sum(record.get("n_cut_tokens", 0) > 0 for record in records),
        }
        if entailment:  # which has kept what it found of each sentence
            support[system] = [entailment.support[by_id[r["id"]]["text"], r["text"]] for r in rows]
    result = {
        "n": len(rows),
        "target": target,
        "systems": systems,
        "differences": {
            other: {m: paired_bootstrap(values[target][m], found[m]) for m in found}
            for other, found in values.items()
            if other != target
        },
        "ids": [row["id"] for row in rows],
        "per_text": {system: found.to_dict("list") for system, found in values.items()},
        "support": support or None,
    }
    result["settings"] = {
        "config": config.name,
        "task": config.task.name,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "documents": digest(*rows),
        "hash": scorer and scorer.scorer.hash,
        "rescale_baseline": scorer and scorer.baseline,
        "faithfulness": entailment and entailment.settings,
        "resamples": RESAMPLES,
        **{package: version(package) for package in ("rouge-score", "torch", "transformers")},
        "generation": {s: records[rows[0]["id"]]["settings"] for s, records in answers.items()},
        "answers": {s: digest_of(records, rows) for s, records in answers.items()},
    }
    write_text(config.eval_dir / "scores.json", json.dumps(result, indent=1))
    print(f"scores of {len(answers)} systems on {len(rows)} texts in {config.eval_dir}")
    return result, answers
