"""Turn the teacher's replies into preference pairs; say what was dropped, and audit the rest.

Reads data/extracts and data/replies, writes data/pairs/{train,test}.jsonl, dropped.jsonl (every
reply is in exactly one of them), plots/ and made.json with the funnel and the audit. Of a test pair
only the better summary counts, as the reference, so checks of the pair do not apply to it.

    python -m data_prep.build_pairs
"""

import argparse
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import load_records, mark_made, write_records
from common.report import markdown
from data_prep.audit_pairs import audit, draw_plots, length_match, measure, to_markdown
from data_prep.count_tokens import load_tokenizer
from data_prep.filter_pairs import CHECKS, Limits, fault
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


def choose_teacher(
    replies: list[dict], model: str | None, prompt_sha: str | None
) -> tuple[str, str]:
    """The (model, prompt_sha) to take replies of: of several prompts the one with most replies.

    Raises UserError if there are several models, or no such replies.
    """
    counts = Counter((reply["model"], reply["prompt_sha"]) for reply in replies)
    there = ", ".join(f"{n:,} by {m} with prompt {sha}" for (m, sha), n in counts.most_common())
    fitting = {
        key: n
        for key, n in counts.items()
        if model in (None, key[0]) and prompt_sha in (None, key[1])
    }
    if not fitting:
        asked = " ".join(filter(None, (model and f"by {model}", prompt_sha)))
        raise UserError(f"no reply {asked}; there are {there}")
    if len(models := sorted({m for m, _ in fitting})) > 1:
        raise UserError(
            f"replies by several teachers: {', '.join(models)}; choose one with --model"
        )
    chosen = max(fitting, key=fitting.get)
    if len(fitting) > 1:
        print(
            f"several prompts: {there}; taking {chosen[1]}, the one with most replies "
            "(--prompt-sha chooses another)"
        )
    return chosen


def drop(split: str, one: dict, reason: str, detail: str = "") -> dict:
    """The record in dropped.jsonl of a reply, or of its pair."""
    model = one["model"] if "model" in one else one["teacher"]
    made_by = {"model": model, "prompt_sha": one["prompt_sha"]}
    return {"id": one["id"], "split": split, **made_by, "reason": reason, "detail": detail}


def build_split(
    split: str, replies: list[dict], teacher: tuple[str, str], limits: Limits, args, task: Task
) -> tuple[list[dict], list[dict]]:
    """(pairs, dropped) of one split; `args` are the command line's."""
    extracts = load_records(args.extracts / f"{split}.jsonl", EXTRACT, "just extracts")
    by_id = {extract["id"]: extract for extract in extracts}
    pairs, dropped = {}, []
    for reply in tqdm(replies, desc=f"{split} pairs", unit="reply"):
        pair, why = None, None
        if (reply["model"], reply["prompt_sha"]) != teacher:
            why = ("another teacher or prompt",)
        elif reply["id"] not in by_id:
            why = ("its extract is gone",)
        elif reply["id"] in pairs:
            why = ("a second reply to the same extract",)
        else:
            try:
                pair = to_pair(by_id[reply["id"]], reply, task)
                why = fault(pair, split, limits, args.keep)
            except ParseError as error:
                why = "not readable", str(error)
        if why:
            dropped.append(drop(split, reply, *why))
        else:
            pairs[reply["id"]] = pair
    if split == "train" and args.length_match:
        matched = {pair["id"]: pair for pair in length_match(list(pairs.values()), args.seed)}
        left_out = [pair for key, pair in pairs.items() if key not in matched]
        dropped += [drop(split, pair, "left out to match lengths") for pair in left_out]
        pairs = matched
    return list(pairs.values()), dropped


def funnel(pairs: list[dict], dropped: list[dict], replies: list[dict]) -> dict:
    """Replies in, out by each reason, pairs kept, and what a kept pair took."""
    reasons = Counter(
        d["reason"] + (f" ({d['detail']})" if d["reason"] == "not readable" else "")
        for d in dropped
    )
    costs = [reply.get("cost_usd") for reply in replies]
    tokens = sum(sum((reply.get("usage") or {}).values()) for reply in replies)
    return {
        "replies": len(replies),
        "dropped": reasons.most_common(),
        "kept": len(pairs),
        "tokens_per_pair": round(tokens / max(1, len(pairs))),
        "usd": None if None in costs else sum(costs),
        "usd_per_pair": None if None in costs else sum(costs) / max(1, len(pairs)),
    }


def funnel_table(splits: dict[str, dict]) -> str:
    """The funnels of the splits side by side, as Markdown, for the terminal and the card."""

    def usd(amount: float | None, digits: int) -> str:
        return "an unknown sum" if amount is None else f"${amount:.{digits}f}"

    columns = {}
    for split, counts in splits.items():
        columns[split] = {"replies": f"{counts['replies']:,}", "pairs kept": f"{counts['kept']:,}"}
        columns[split]["tokens for a kept pair"] = f"{counts['tokens_per_pair']:,}"
        columns[split]["cost"] = usd(counts["usd"], 2)
        columns[split]["cost of a kept pair"] = usd(counts["usd_per_pair"], 5)
        columns[split] |= {f"dropped: {why}": f"{n:,}" for why, n in counts["dropped"]}
    return markdown(pd.DataFrame(columns).fillna("0"))


def lazy_token_counter(name: str) -> Callable[[str], int]:
    """Count tokens by a tokenizer that is loaded only when a summary needs counting."""
    tokenizer = cache(lambda: load_tokenizer(name))
    return lambda text: len(tokenizer().encode(text, add_special_tokens=False).ids)


def write_pairs(folder: Path, built: dict[str, tuple[list, list]], made: dict, task: Task) -> None:
    """Write all files; made.json, without which no later stage reads them, goes first and last."""
    (folder / "made.json").unlink(missing_ok=True)
    for split, (pairs, _) in built.items():
        write_records(folder / f"{split}.jsonl", pairs)
    write_records(
        folder / "dropped.jsonl", (one for _, dropped in built.values() for one in dropped)
    )
    train, _ = built["train"]
    frame = measure(train)
    made["plots"] = draw_plots(train, frame, task, folder / "plots")
    made["audit"] = to_markdown(audit(frame))
    mark_made(folder, made)


def parse_options(task: Task) -> argparse.Namespace:
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
    option(
        "--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: Hub id or folder"
    )
    option("--keep", nargs="+", default=[], choices=CHECKS, help="checks to leave out")
    option("--length-match", action="store_true", help="keep a subset free of a length signal")
    option("--seed", type=int, default=0, help="of --length-match")
    return parser.parse_args()


def main() -> None:
    task = load_task()
    args = parse_options(task)
    names = ("max_similarity", "min_difference", "max_repetition", "max_tokens")
    made = {name: getattr(args, name) for name in names}
    limits = Limits(**made, count_tokens=lazy_token_counter(args.tokenizer))
    made |= {name: getattr(args, name) for name in ("keep", "length_match", "seed")}
    replies = {
        split: load_records(args.replies / f"{split}.jsonl", REPLY, "just replies")
        for split in SPLITS
    }
    teacher = choose_teacher(replies["train"], args.model, args.prompt_sha)
    built = {
        split: build_split(split, replies[split], teacher, limits, args, task) for split in SPLITS
    }
    for split, (pairs, dropped) in built.items():
        made[split] = funnel(pairs, dropped, replies[split])
    made["funnel"] = funnel_table({split: made[split] for split in SPLITS})
    print(made["funnel"])
    if empty := [split for split in SPLITS if not made[split]["kept"]]:
        raise UserError(f"no {empty[0]} pair is left; see the reasons above")
    write_pairs(args.output, built, made, task)
    print(f"\n{made['audit']}\n\nplots in {args.output / 'plots'}")


if __name__ == "__main__":
    run(main)
