"""Preferences among a student's own answers to texts that it was not taught.

Trains the small student by SFT, draws answers to each text, takes the best as chosen and the worst
as rejected, and goes on with DPO and an SFT term. `--rank self`: to passages that no
teacher answered, by likeness to the other answers (self-consistency preferences, arXiv:2411.04109).
`--rank teacher`: to the texts of the SFT, by likeness to the teacher's answer, drawn by two models
each taught on the other half. Beside it, from the same SFT: SFT on the chosen alone, and without
more training, of the greedy and as many sampled answers to a held-out text, the one most like them
all (`consensus`). Scores held-out passages, with paired intervals to SFT. What it makes is kept in
outputs/self_consistency, so that it goes on where it stopped, and its answers can be scored
(--score) where the measures are installed. docs/results.md says how data/wide is made.
`--folds 3 --fold 0` holds out a third of the articles of the training split instead, whose passages
a teacher answered too: what was chosen on the test split can be tried on texts that chose nothing.

    python -m benchmarks.self_consistency --data data/wide --seeds 42 43 44
"""

import argparse
import copy
import json
import random
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from tqdm import tqdm

from benchmarks.likeness import MeaningLikeness, rouge_likeness
from benchmarks.sampled_student import DEVICE, STUDENT, Student
from common.cli import UserError, run
from common.files import is_made, load_records, mark_made, read_json, replacing, write_text
from eval.generate_answers import most_alike

KEPT = Path("outputs/self_consistency")
GAP = 0.5  # of the two sides' likeness, in standard deviations
RATES = {"SFT": 1e-3, "preferences": 3e-4, "SFT on the chosen": 3e-4}
TAUGHT = 590  # texts of the SFT, of a fold
WAYS = ["preferences", "SFT on the chosen", "consensus"]


def read_texts(data: Path, split: str) -> list[dict]:
    """[{id, text, reply}] of the extracts, `reply` empty where there is no whole one. UserError."""
    lines = load_records(data / f"summarize/replies/{split}.jsonl", made_by="just replies")
    replies = {one["id"]: one["text"] for one in lines if one["finish_reason"] == "stop"}
    extracts = load_records(data / f"extracts/{split}.jsonl", made_by="just extracts")
    return [
        {"article": one["url"], "text": one["text"], "reply": replies.get(one["id"], "").strip()}
        for one in extracts
    ]


def split_texts(args, fold: int | None) -> dict[str, list[dict]]:
    """The texts of the SFT, those that no teacher answers, and the held-out ones."""
    train, test = (read_texts(args.data, split) for split in ("train", "test"))
    if fold is None:
        taught = [one for one in train if one["reply"]]
        free = [one for one in train if not one["reply"]]
    else:
        articles = sorted({one["article"] for one in train})
        held_out = set(articles[fold :: args.folds])
        rest = [one for one in train + test if one["article"] not in held_out]
        random.Random(fold).shuffle(rest)
        rest.sort(key=lambda one: not one["reply"])
        taught, free = rest[:TAUGHT], rest[TAUGHT:]
        test = [one for one in train if one["article"] in held_out]
    test = [one for one in test if one["reply"]]
    texts = {"train": taught, "free": free[: args.free], "test": test}
    return {kind: part[: args.texts] for kind, part in texts.items()}


def agreement(drawn: list[list[str]], others: list[list[str]], meaning: bool) -> np.ndarray:
    """How like each answer is to its text's others, (texts, answers): by ROUGE-L, and by meaning F1
    of BERTScore as well; each counts by its spread."""
    measures = [rouge_likeness, *([MeaningLikeness()] if meaning else [])]
    scores = [
        [measure(answers, found).mean(1) for measure in measures]
        for answers, found in zip(tqdm(drawn, "ranking", disable=None), others, strict=True)
    ]
    scores = np.array(scores)  # (texts, measures, answers)
    return (scores / scores.std(axis=(0, 2), keepdims=True)).mean(axis=1)


def rank(student: Student, texts: list[dict], drawn: list, meaning: bool, teacher: bool) -> list:
    """Of each text's answers the two best, then the two worst, where they are far enough apart."""
    read = [[student.text(answer) for answer in answers] for answers in drawn]
    others = [[text["reply"]] for text in texts] if teacher else read
    rows = []
    for text, answers, score in zip(texts, drawn, agreement(read, others, meaning), strict=True):
        whole = np.array([answer[-1] == student.end for answer in answers])
        order = np.argsort(-(score - 10 * ~whole))
        best, worst = order[: student.chosen], order[::-1][: student.chosen]
        if whole[best].all() and score[best].mean() - score[worst].mean() > GAP:
            both = [answers[i] for i in (*best, *worst)]
            rows.append({"prompt": text["prompt"], "answers": both})
    return rows


def consensus(student: Student, prompts: list, greedy: list[str], args) -> list[str]:
    """Of each prompt's greedy and sampled answers the one most like them all, as of `just run
    --samples`."""
    drawn = student.answer(prompts, args.samples, args.temperature)
    read = [[one, *map(student.text, more)] for one, more in zip(greedy, drawn, strict=True)]
    return [texts[most_alike(texts)] for texts in read]


def draw_unseen(student: Student, seed: int, texts: list[dict], args) -> list:
    """Answers to each text, by a student that was taught on the other half of the texts."""
    drawn = [[] for _ in texts]
    for half in (0, 1):
        student.reset(seed)
        student.train(texts[1 - half :: 2], student.sft_loss, RATES["SFT"], 16, args.passes)
        prompts = [one["prompt"] for one in texts[half::2]]
        drawn[half::2] = student.answer(prompts, args.samples, args.temperature)
    return drawn


def run_seed(student: Student, seed: int, texts: dict, args, kept: dict, folder: Path) -> None:
    """Train and answer by all ways; their answers to the test texts go into `kept`."""
    prompts = [one["prompt"] for one in texts["test"]]

    def keep(way: str, answers: list[str]) -> None:
        kept[f"{way}, {seed}"] = answers
        write_text(folder / "answers.json", json.dumps(kept))
        print(f"seed {seed}: {way}, {time.strftime('%H:%M:%S')}", flush=True)

    def trained(way: str, rows: list, loss, passes: int = 1) -> None:
        path = folder / f"{way.replace(' ', '-')}-{seed}.pt"
        if path.exists():
            set_peft_model_state_dict(student.model, torch.load(path, map_location=DEVICE))
        else:
            student.train(rows, loss, RATES[way], 16, passes)
            with replacing(path) as temporary:
                torch.save(get_peft_model_state_dict(student.model), temporary)
        if f"{way}, {seed}" not in kept:
            keep(way, [student.text(answers[0]) for answers in student.answer(prompts)])

    student.reset(seed)
    trained("SFT", texts["train"], student.sft_loss, args.passes)
    tuned, path = copy.deepcopy(student.model.state_dict()), folder / f"rows-{seed}.json"
    if "consensus" in args.ways and f"consensus, {seed}" not in kept:
        keep("consensus", consensus(student, prompts, kept[f"SFT, {seed}"], args))
    if args.ways == ["consensus"]:
        return
    if not path.exists():
        teacher = args.rank == "teacher"
        asked = texts["train" if teacher else "free"]
        if teacher:
            drawn = draw_unseen(student, seed, asked, args)
            student.model.load_state_dict(tuned)
        else:
            asked_prompts = [one["prompt"] for one in asked]
            drawn = student.answer(asked_prompts, args.samples, args.temperature)
        rows = rank(student, asked, drawn, args.by_meaning, teacher)
        student.add_references(rows)
        write_text(path, json.dumps(rows))
    rows = json.loads(path.read_text())
    losses = {"preferences": student.preference_loss, "SFT on the chosen": student.chosen_loss}
    for way in (way for way in args.ways if way in losses):
        student.model.load_state_dict(tuned)
        trained(way, rows, losses[way])


def score(parts: list[tuple[dict, list[dict]]]) -> None:
    """Print and record F1, ROUGE-L and words of every way, and its intervals to SFT, over the
    (answers, texts) of all folds."""
    from common.report import paired_bootstrap
    from eval.build_report import LEDGER, append_ledger
    from eval.measures import BertScore, basics, rouge
    from eval.score_answers import commit

    rows = [{"reference": one["reply"]} for _, test in parts for one in test]
    encoder, found, lines = BertScore("models/minilm", 6, 64), {}, []
    for name in (name for name in parts[0][0] if all(name in kept for kept, _ in parts)):
        answers = [answer for kept, _ in parts for answer in kept[name]]
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
            "[{:+.3f}, {:+.3f}]".format(*line[3:]) if line[4] is not None else "",
        )
    about = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "config": STUDENT}
    about |= {"command": shlex.join(["just", "bench", "self_consistency", *sys.argv[1:]])}
    append_ledger(lines, about | {"encoder": encoder.scorer.hash, "n": len(rows)}, LEDGER)


def make(args, folder: Path, texts: dict[str, list[dict]], kept: dict) -> None:
    """Train and answer with every seed, into the folder and `kept`."""
    shaping = ("data", "rank", "samples", "texts", "passes", "free", "by_meaning")
    shaping += ("max_new_tokens", "temperature", "folds", "chosen", "sft_weight")
    settings = {name: str(getattr(args, name)) for name in shaping}
    if empty := [kind for kind, part in texts.items() if not part]:
        raise UserError(f"{args.data} has too few texts for this: none is left for {empty[0]}")
    if (folder / "made.json").exists() and not is_made(folder, settings):
        raise UserError(f"{folder} was made with other settings; move it away")
    mark_made(folder, settings)
    student = Student(args.max_new_tokens, args.chosen, args.sft_weight)
    for one in (one for part in texts.values() for one in part):
        one["prompt"] = student.prompt(one["text"])
        one["chosen"] = [*student.ids(one["reply"]), student.end]
    for seed in args.seeds:
        run_seed(student, seed, texts, args, kept, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/wide"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--rank", choices=("self", "teacher"), default="self", help="by whom")
    parser.add_argument("--samples", type=int, default=12, help="answers drawn for each text")
    parser.add_argument("--texts", type=int, help="only the first so many of each kind")
    parser.add_argument("--passes", type=int, default=3, help="of SFT over the teacher's answers")
    parser.add_argument(
        "--chosen", type=int, default=2, help="of a text's answers; as many rejected"
    )
    parser.add_argument("--sft-weight", type=float, default=0.1, help="beside DPO's loss")
    parser.add_argument("--free", type=int, help="only the first so many of the passages to sample")
    parser.add_argument("--by-meaning", action="store_true", help="BERTScore F1 for likeness too")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--score", action="store_true", help="only score the answers that are kept")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples")
    parser.add_argument("--folds", type=int, default=3, help="into which articles are split")
    parser.add_argument("--fold", type=int, nargs="+", help="held out; not given: the test split")
    args = parser.parse_args()
    parts = []
    for fold in args.fold or [None]:
        folder, texts = KEPT if fold is None else KEPT / f"fold-{fold}", split_texts(args, fold)
        kept = read_json(folder / "answers.json")
        if not args.score:
            make(args, folder, texts, kept)
        parts.append((kept, texts["test"]))
    if args.score or DEVICE == "cpu":
        score(parts)


if __name__ == "__main__":
    run(main)
