"""Preferences with no teacher: what a model says most often against what it says least often.

Trains the small student by SFT, draws 12 answers to passages that no teacher answered, takes the
two most like the others (mean ROUGE-L) as chosen and the two least like them as rejected, and goes
on with DPO and a small SFT term (self-consistency preferences, arXiv:2411.04109). Beside it, from
the same SFT: SFT on the chosen alone. Scores held-out passages, with paired intervals to SFT: some
100 s a seed on a GPU; an hour on two cores with `--samples 8 --free 700`, in up to 24 GiB. What it
makes is kept in outputs/self_consistency, so that it goes on where it stopped, and its answers can
be scored (--score) where the measures are installed. docs/results.md says how data/wide is made.

    python -m benchmarks.self_consistency --data data/wide --seeds 42 43 44
"""

import argparse
import copy
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from rapidfuzz.distance import Indel
from rapidfuzz.process import cdist
from tqdm import tqdm

from benchmarks.sampled_student import CHOSEN, DEVICE, STUDENT, Student
from common.cli import UserError, run
from common.files import is_made, load_records, mark_made, read_json, replacing, write_text

KEPT = Path("outputs/self_consistency")
GAP = 0.05  # of the two sides' likeness to the other samples
RATES = {"SFT": 1e-3, "preferences": 3e-4, "SFT on the chosen": 3e-4}
WAYS = ["preferences", "SFT on the chosen"]


def read_texts(data: Path, split: str) -> list[dict]:
    """[{id, text, reply}] of the extracts, `reply` empty where there is no whole one. UserError."""
    lines = load_records(data / f"summarize/replies/{split}.jsonl", made_by="just replies")
    replies = {one["id"]: one["text"] for one in lines if one["finish_reason"] == "stop"}
    extracts = load_records(data / f"extracts/{split}.jsonl", made_by="just extracts")
    return [
        {"id": one["id"], "text": one["text"], "reply": replies.get(one["id"], "").strip()}
        for one in extracts
    ]


def rouge_likeness(texts: list[str]) -> np.ndarray:
    """How like each text is to each, (n, n): F1 of ROUGE-L, 2 LCS / (both lengths)."""
    words = [text.lower().split() or [""] for text in texts]
    return cdist(words, words, scorer=Indel.normalized_similarity)


def consensus_rows(student: Student, prompts: list, samples: int, by_meaning: bool) -> list[dict]:
    """Of each prompt's samples the two most like the others, then the two least like them."""
    likeness = rouge_likeness
    if by_meaning:  # F1 of BERTScore as well, which a bare GPU machine does not have
        from eval.measures import BertScore

        encoder = BertScore("models/minilm", 6, 64)

        def likeness(texts: list[str]) -> np.ndarray:
            n = len(texts)
            others = [{"reference": text if text.strip() else "-"} for text in texts * n]
            repeated = [text for text in texts for _ in texts]
            f1 = np.array(encoder(repeated, others)["bertscore_f1"]).reshape(n, n)
            return (f1 + rouge_likeness(texts)) / 2

    rows = []
    drawn = student.answer(prompts, samples)
    for prompt, answers in zip(tqdm(prompts, "agreement", disable=None), drawn, strict=True):
        whole = np.array([answer[-1] == student.end for answer in answers])
        agreed = likeness([student.text(answer) for answer in answers]).mean(axis=1)
        order = np.argsort(-(agreed - ~whole))
        best, worst = order[:CHOSEN], order[::-1][:CHOSEN]
        if whole[best].all() and agreed[best].mean() - agreed[worst].mean() > GAP:
            rows.append({"prompt": prompt, "answers": [answers[i] for i in (*best, *worst)]})
    return rows


def run_seed(student: Student, seed: int, texts: dict, args, kept: dict) -> None:
    """Train and answer by all ways; their answers to the test texts go into `kept`."""

    def trained(way: str, rows: list, loss, passes: int = 1) -> None:
        path = KEPT / f"{way.replace(' ', '-')}-{seed}.pt"
        if path.exists():
            set_peft_model_state_dict(student.model, torch.load(path, map_location=DEVICE))
        else:
            student.train(rows, loss, RATES[way], 16, passes)
            with replacing(path) as temporary:
                torch.save(get_peft_model_state_dict(student.model), temporary)
        if f"{way}, {seed}" not in kept:
            greedy = student.answer([one["prompt"] for one in texts["test"]])
            kept[f"{way}, {seed}"] = [student.text(answers[0]) for answers in greedy]
            write_text(KEPT / "answers.json", json.dumps(kept))
        print(f"seed {seed}: {way}, {len(rows)} texts, {time.strftime('%H:%M:%S')}", flush=True)

    student.reset(seed)
    trained("SFT", texts["train"], student.sft_loss, args.passes)
    tuned, path = copy.deepcopy(student.model.state_dict()), KEPT / f"rows-{seed}.json"
    if not path.exists():
        free = [one["prompt"] for one in texts["free"]]
        rows = consensus_rows(student, free, args.samples, args.by_meaning)
        student.add_references(rows)
        write_text(path, json.dumps(rows))
    rows = json.loads(path.read_text())
    losses = {"preferences": student.preference_loss, "SFT on the chosen": student.chosen_loss}
    for way in args.ways:
        student.model.load_state_dict(tuned)
        trained(way, rows, losses[way])


def score(kept: dict, test: list[dict]) -> None:
    """Print and record F1, ROUGE-L and words of every way, and its intervals to SFT."""
    from common.report import paired_bootstrap
    from eval.build_report import LEDGER, append_ledger
    from eval.measures import BertScore, basics, rouge
    from eval.score_answers import commit

    rows = [{"reference": one["reply"]} for one in test]
    encoder, found, lines = BertScore("models/minilm", 6, 64), {}, []
    for name, answers in kept.items():
        columns = {k: v for m in (encoder, rouge, basics) for k, v in m(answers, rows).items()}
        way, seed = name.rsplit(", ", 1)
        found.setdefault(way, {})[seed] = columns
    for way, of_seeds in found.items():
        for measure in ("bertscore_f1", "rouge_l", "words", "repetition"):
            values = {seed: columns[measure] for seed, columns in of_seeds.items()}
            lines.append((way, measure, np.mean([*values.values()]), None, None))
            if way != "SFT" and measure in ("bertscore_f1", "rouge_l"):
                sft = [found["SFT"][seed][measure] for seed in values]
                gain = paired_bootstrap([*values.values()], sft)
                lines.append((f"{way} - SFT", measure, *gain))
    for line in lines:
        print(
            "{}: {} {:.4f}".format(*line[:3]),
            "[{:+.3f}, {:+.3f}]".format(*line[3:]) if line[4] else "",
        )
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "config": STUDENT}
    about |= {"command": shlex.join(["just", "bench", "self_consistency", *sys.argv[1:]])}
    append_ledger(lines, about | {"encoder": encoder.scorer.hash, "n": len(rows)}, LEDGER)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/wide"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--samples", type=int, default=12, help="answers drawn for each text")
    parser.add_argument("--texts", type=int, help="only the first so many of each kind")
    parser.add_argument("--passes", type=int, default=3, help="of SFT over the teacher's answers")
    parser.add_argument("--free", type=int, help="only the first so many of the passages to sample")
    parser.add_argument("--by-meaning", action="store_true", help="BERTScore F1 for likeness too")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--score", action="store_true", help="only score the answers that are kept")
    args = parser.parse_args()
    test = [one for one in read_texts(args.data, "test") if one["reply"]][: args.texts]
    kept = read_json(KEPT / "answers.json")
    if not args.score:
        train = read_texts(args.data, "train")
        shaping = ("data", "samples", "texts", "passes", "free", "by_meaning", "max_new_tokens")
        settings = {name: str(getattr(args, name)) for name in shaping}
        if KEPT.exists() and not is_made(KEPT, settings):
            raise UserError(f"{KEPT} was made with other settings; move it away")
        mark_made(KEPT, settings)
        student = Student(args.max_new_tokens)
        texts = {"train": [one for one in train if one["reply"]][: args.texts], "test": test}
        texts["free"] = [one for one in train if not one["reply"]][: args.free or args.texts]
        for one in (one for part in texts.values() for one in part):
            one["prompt"] = student.prompt(one["text"])
            one["chosen"] = [*student.ids(one["reply"]), student.end]
        for seed in args.seeds:
            run_seed(student, seed, texts, args, kept)
    if args.score or DEVICE == "cpu":
        score(kept, test)


if __name__ == "__main__":
    run(main)
