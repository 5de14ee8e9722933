"""Preferences among a student's own answers to texts that it was not taught.

Trains the small student by SFT, draws 12 answers to each text, takes the best two as chosen and the
worst two as rejected, and goes on with DPO and a small SFT term. `--rank self`: to passages that no
teacher answered, by likeness to the other answers (self-consistency preferences, arXiv:2411.04109).
`--rank teacher`: to the texts of the SFT, by likeness to the teacher's answer, drawn by two models
each taught on the other half. Beside it, from the same SFT: SFT on the chosen alone. Scores
held-out passages, with paired intervals to SFT: some 100 s a seed on a GPU; an hour on two cores
with `--samples 8 --free 700`. What it makes is kept in outputs/self_consistency, so that it goes on
where it stopped, and its answers can be scored (--score) where the measures are installed.
docs/results.md says how data/wide is made.

    python -m benchmarks.self_consistency --data data/wide --seeds 42 43 44
"""

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
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
GAP = 0.5  # of the two sides' likeness, in standard deviations
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


def rouge_likeness(texts: list[str], others: list[str]) -> np.ndarray:
    """How like each text is to each other: F1 of ROUGE-L, 2 LCS / (both lengths)."""
    words, found = ([text.lower().split() or [""] for text in part] for part in (texts, others))
    return cdist(words, found, scorer=Indel.normalized_similarity)


def likeness_by(meaning: bool) -> Callable[[list[str], list[str]], np.ndarray]:
    """(texts, others) -> how like they are, (measures, texts, others): ROUGE-L, if by `meaning` F1
    of BERTScore as well, which a bare GPU machine does not have."""
    if not meaning:
        return lambda texts, others: rouge_likeness(texts, others)[None]
    from eval.measures import BertScore

    encoder = BertScore("models/minilm", 6, 64)

    def likeness(texts: list[str], others: list[str]) -> np.ndarray:
        rows = [{"reference": other.strip() or "-"} for other in others * len(texts)]
        f1 = encoder([text for text in texts for _ in others], rows)["bertscore_f1"]
        f1 = np.array(f1).reshape(len(texts), len(others))
        return np.stack([f1, rouge_likeness(texts, others)])

    return likeness


def rank(student: Student, texts: list[dict], drawn: list, meaning: bool, teacher: bool) -> list:
    """Of each text's answers the two best, then the two worst, where they are far enough apart."""
    likeness, scores = likeness_by(meaning), []
    for text, answers in zip(tqdm(texts, "ranking", disable=None), drawn, strict=True):
        read = [student.text(answer) for answer in answers]
        scores.append(likeness(read, [text["reply"]] if teacher else read).mean(axis=2))
    scores = np.array(scores)  # (texts, measures, answers); the measures count alike
    scores = (scores / scores.std(axis=(0, 2), keepdims=True)).mean(axis=1)
    rows = []
    for text, answers, score in zip(texts, drawn, scores, strict=True):
        whole = np.array([answer[-1] == student.end for answer in answers])
        order = np.argsort(-(score - 10 * ~whole))
        best, worst = order[:CHOSEN], order[::-1][:CHOSEN]
        if whole[best].all() and score[best].mean() - score[worst].mean() > GAP:
            both = [answers[i] for i in (*best, *worst)]
            rows.append({"prompt": text["prompt"], "answers": both})
    return rows


def draw_unseen(student: Student, seed: int, texts: list[dict], samples: int, passes: int) -> list:
    """Answers to each text, by a student that was taught on the other half of the texts."""
    drawn = [[] for _ in texts]
    for half in (0, 1):
        student.reset(seed)
        student.train(texts[1 - half :: 2], student.sft_loss, RATES["SFT"], 16, passes)
        drawn[half::2] = student.answer([one["prompt"] for one in texts[half::2]], samples)
    return drawn


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
        teacher = args.rank == "teacher"
        asked = texts["train" if teacher else "free"]
        if teacher:
            drawn = draw_unseen(student, seed, asked, args.samples, args.passes)
            student.model.load_state_dict(tuned)
        else:
            drawn = student.answer([one["prompt"] for one in asked], args.samples)
        rows = rank(student, asked, drawn, args.by_meaning, teacher)
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
    parser.add_argument("--rank", choices=("self", "teacher"), default="self", help="by whom")
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
        shaping = ("data", "rank", "samples", "texts", "passes", "free", "by_meaning")
        shaping += ("max_new_tokens",)
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
