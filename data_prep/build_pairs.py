"""Turn the teacher's replies into preference pairs; say what was dropped, and audit the rest.

Reads data/extracts and data/replies, writes data/pairs/{train,test}.jsonl, dropped.jsonl (every
reply is in exactly one of them), plots/ and made.json with the funnel and the audit. Of a test pair
only the better summary counts, as the reference, so checks of the pair do not apply to it.

    python -m data_prep.build_pairs
"""

import argparse
from collections import Counter
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import load_records, mark_made, write_records
from common.report import markdown
from data_prep.audit_pairs import audit, draw_plots, length_match, measure
from data_prep.filter_pairs import CHECKS, fault
from data_prep.teacher.parsing import ParseError, parse_reply
from prompts import Task, load_task

SPLITS = ("train", "test")
REPLY = ("id", "model", "prompt_sha", "text", "finish_reason")
EXTRACT = ("id", "text", "n_tokens")


def to_pair(extract: dict, reply: dict, task: Task) -> dict:
    """The preference pair of a reply. Raises ParseError."""
    if reply["finish_reason"] == "length":
        raise ParseError("cut off at the token limit")
    parsed = parse_reply(reply["text"], task)
    best, other = parsed.best, 1 - parsed.best
    return {
        "id": extract["id"],
        "source": extract["source"],
        "url": extract["url"],
        "prompt": extract["text"],
        "chosen": parsed.summaries[best],
        "rejected": parsed.summaries[other],
        "chosen_position": best + 1,
        "longer": reply.get("longer"),
        "ratings": [parsed.scores[best], parsed.scores[other]],
        "teacher": reply["model"],
        "prompt_sha": reply["prompt_sha"],
        "criteria": [parsed.criteria[best], parsed.criteria[other]],
        "n_tokens": extract["n_tokens"],
    }


def choose_teacher(replies: list[dict], args: argparse.Namespace) -> tuple[str, str]:
    """The (model, prompt_sha) to take replies of: of several prompts the one with most replies.

    Raises UserError if there are several models, or no such replies.
    """
    counts = Counter((reply["model"], reply["prompt_sha"]) for reply in replies).most_common()
    there = ", ".join(f"{n:,} by {model} with prompt {sha}" for (model, sha), n in counts)
    fitting = [
        (model, sha)
        for (model, sha), _ in counts
        if args.model in (None, model) and args.prompt_sha in (None, sha)
    ]
    if len({model for model, _ in fitting}) != 1:
        raise UserError(f"choose one teacher with --model, --prompt-sha; there are {there}")
    if len(fitting) > 1:
        print(f"several prompts: {there}; taking {fitting[0][1]} (--prompt-sha chooses another)")
    return fitting[0]


def build_split(
    split: str, replies: list[dict], teacher: tuple[str, str], args: argparse.Namespace, task: Task
) -> tuple[list[dict], list[dict]]:
    """(pairs, dropped) of one split."""
    extracts = load_records(args.extracts / f"{split}.jsonl", EXTRACT, "just extracts")
    by_id, pairs, dropped = {extract["id"]: extract for extract in extracts}, {}, []

    def drop(key: str, model: str, sha: str, reason: str, detail: str = "") -> None:
        made = {"split": split, "model": model, "prompt_sha": sha}
        dropped.append({"id": key, **made, "reason": reason, "detail": detail})

    for reply in tqdm(replies, desc=f"{split} pairs", unit="reply"):
        key, made_by, pair = reply["id"], (reply["model"], reply["prompt_sha"]), None
        if made_by != teacher:
            why = ("another teacher or prompt",)
        elif key not in by_id:
            why = ("its extract is gone",)
        elif key in pairs:
            why = ("a second reply to the same extract",)
        else:
            try:
                pair = to_pair(by_id[key], reply, task)
                why = fault(pair, split, vars(args))
            except ParseError as error:
                why = ("not readable", str(error))
        if why:
            drop(key, *made_by, *why)
        else:
            pairs[key] = pair
    if split == "train" and args.length_match:
        matched = {pair["id"]: pair for pair in length_match(list(pairs.values()), args.seed)}
        for key in pairs:
            if key not in matched:
                drop(key, *teacher, "left out to match lengths")
        pairs = matched
    return list(pairs.values()), dropped


def funnel(pairs: list[dict], dropped: list[dict], replies: list[dict]) -> dict[str, str]:
    """Replies in, pairs kept, what a kept pair took, and replies out by each reason."""
    costs, kept = [reply.get("cost_usd") for reply in replies], max(1, len(pairs))
    tokens = sum(sum((reply.get("usage") or {}).values()) for reply in replies)
    usd = None if None in costs else sum(costs)
    unread = {"not readable": " ({detail})"}  # here the detail is one of a few
    names = (f"dropped: {d['reason']}{unread.get(d['reason'], '').format(**d)}" for d in dropped)
    reasons = Counter(names).most_common()
    return {
        "replies": f"{len(replies):,}",
        "pairs kept": f"{len(pairs):,}",
        "tokens for a kept pair": f"{tokens / kept:,.0f}",
        "cost": "unknown" if usd is None else f"${usd:.2f}",
        "cost of a kept pair": "unknown" if usd is None else f"${usd / kept:.5f}",
        **{reason: f"{n:,}" for reason, n in reasons},
    }


def write_pairs(folder: Path, built: dict[str, tuple[list, list]], made: dict, task: Task) -> None:
    """Write all files; made.json, without which no later stage reads them, goes first and last."""
    (folder / "made.json").unlink(missing_ok=True)
    for split, (pairs, _) in built.items():
        write_records(folder / f"{split}.jsonl", pairs)
    write_records(folder / "dropped.jsonl", built["train"][1] + built["test"][1])
    train, _ = built["train"]
    frame = measure(train)
    draw_plots(train, frame, task, folder / "plots")
    made["audit"] = audit(frame)
    mark_made(folder, made)


def main() -> None:
    task = load_task()
    parser = script_parser(__doc__)
    option, limits = parser.add_argument, task.limits
    option("--extracts", type=Path, default=Path("data/extracts"), help="folder")
    option("--replies", type=Path, default=Path("data/replies"), help="folder")
    option("--output", type=Path, default=Path("data/pairs"), help="folder")
    option("--model", help="take the replies of this teacher (needed if there are several)")
    option("--prompt-sha", help="take the replies to this prompt (default: the most frequent)")
    option("--max-similarity", type=float, default=limits["similarity"], help="Levenshtein")
    option("--min-difference", type=float, default=limits["difference"], help="of scores; over it")
    option("--max-repetition", type=float, default=limits["repetition"], help="of 4-grams")
    option("--max-tokens", type=positive, default=3072, help="training length, prompt and answer")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="Hub id or folder")
    option("--keep", nargs="+", default=[], choices=CHECKS, help="checks to leave out")
    option("--length-match", action="store_true", help="keep a subset free of a length signal")
    option("--seed", type=int, default=0, help="of --length-match")
    args = parser.parse_args()
    replies = {
        split: load_records(args.replies / f"{split}.jsonl", REPLY, "just replies")
        for split in SPLITS
    }
    teacher = choose_teacher(replies["train"], args)
    built = {split: build_split(split, replies[split], teacher, args, task) for split in SPLITS}
    counts = pd.DataFrame({split: funnel(*built[split], replies[split]) for split in SPLITS})
    made = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    made["funnel"] = markdown(counts.fillna("0"))
    print(made["funnel"])
    if empty := [split for split in SPLITS if not built[split][0]]:
        raise UserError(f"no {empty[0]} pair is left; see the reasons above")
    write_pairs(args.output, built, made, task)
    print(f"\n{made['audit']}\n\nplots in {args.output / 'plots'}")


if __name__ == "__main__":
    run(main)
