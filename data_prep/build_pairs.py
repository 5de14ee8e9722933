"""Turn the teacher's replies into preference pairs; say what was dropped, and audit the rest.

Reads data/extracts and data/replies, writes data/pairs/{train,test}.jsonl, dropped.jsonl (every
reply is in exactly one of them), plots/ and made.json with the funnel and the audit. Of a test pair
only the better summary counts, as the reference, so checks of the pair do not apply to it. Where
data/replies/judge.jsonl holds a second judge's reply, its verdict stands in the pair as "judge".

    python -m data_prep.build_pairs
"""

import argparse
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from tqdm import tqdm

from common.cli import UserError, positive, run, script_parser
from common.files import load_records, mark_made, read_records, write_records
from data_prep.audit_pairs import audit, draw_plots, length_match, to_markdown
from data_prep.clean_documents import load_tokenizer
from data_prep.filter_pairs import CHECKS, Limits, fault
from data_prep.teacher.parsing import ParseError, parse_reply, parse_verdict


def to_pair(extract: dict, reply: dict) -> dict:
    """The preference pair of a reply. Raises ParseError."""
    if reply["finish_reason"] == "length":
        raise ParseError("cut off at the token limit")
    parsed = parse_reply(reply["text"])
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


def read_verdicts(path: Path, teacher: tuple[str, str]) -> dict[str, dict]:
    """id -> {model, best: 1 or 2, ratings}, both in the teacher's order, where readable."""
    verdicts = {}
    for record in (
        read_records(path, ("id", "model", "text", "of", "order")) if path.exists() else ()
    ):
        if (record["of"]["model"], record["of"]["prompt_sha"]) == teacher:
            with suppress(ParseError):
                scores, best = parse_verdict(record["text"])
                verdicts[record["id"]] = {
                    "model": record["model"],
                    "best": record["order"][best],
                    "ratings": [scores[record["order"].index(n)] for n in (1, 2)],
                }
    return verdicts


def only_teacher(replies: list[dict], model: str | None) -> tuple[str, str]:
    """The (model, prompt_sha) to take replies of. Raises UserError if the choice is open."""
    made_by = Counter((r["model"], r["prompt_sha"]) for r in replies)
    fitting = [key for key in made_by if model in (None, key[0])]
    if not fitting:
        raise UserError(
            f"no reply by {model}; there are replies by {', '.join(m for m, _ in made_by)}"
        )
    if len({m for m, _ in fitting}) > 1:
        raise UserError(
            "replies by several teachers: "
            f"{', '.join(sorted({m for m, _ in fitting}))}; choose one with --model"
        )
    newest = max((r for r in replies if r["model"] == fitting[0][0]), key=lambda r: r["created"])
    return newest["model"], newest["prompt_sha"]


def build_split(
    split: str, args: argparse.Namespace, limits: Limits
) -> tuple[list[dict], list[dict], list[dict]]:
    """(replies, pairs, dropped) of one split."""
    extracts = load_records(
        args.extracts / f"{split}.jsonl", ("id", "text", "n_tokens"), "just extracts"
    )
    by_id = {extract["id"]: extract for extract in extracts}
    fields = ("id", "model", "prompt_sha", "text", "finish_reason", "created")
    replies = load_records(args.replies / f"{split}.jsonl", fields, "just replies")
    teacher = only_teacher(replies, args.model)
    pairs: dict[str, dict] = {}
    dropped = []

    def drop(reply: dict, reason: str, detail: str = "") -> None:
        dropped.append(
            {
                "id": reply["id"],
                "split": split,
                "model": reply["model"],
                "prompt_sha": reply["prompt_sha"],
                "reason": reason,
                "detail": detail,
            }
        )

    for reply in tqdm(replies, desc=f"{split} pairs", unit="reply"):
        if (reply["model"], reply["prompt_sha"]) != teacher:
            drop(reply, "another teacher or an earlier prompt")
        elif reply["id"] not in by_id:
            drop(reply, "its extract is gone")
        elif reply["id"] in pairs:
            drop(reply, "a second reply to the same extract")
        else:
            try:
                pair = to_pair(by_id[reply["id"]], reply)
            except ParseError as error:
                drop(reply, "not readable", str(error))
                continue
            if why := fault(pair, split, limits, args.keep):
                drop(reply, *why)
            else:
                pairs[pair["id"]] = pair
    return replies, list(pairs.values()), dropped


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


def print_funnel(split: str, counts: dict) -> None:
    n_dropped = sum(number for _, number in counts["dropped"])
    usd = "unknown" if counts["usd"] is None else f"${counts['usd_per_pair']:.5f}"
    print(
        f"{split}: {counts['replies']:,} replies in, {counts['kept']:,} pairs kept, "
        f"{n_dropped:,} dropped; a kept pair took {counts['tokens_per_pair']:,} tokens, cost {usd}"
    )
    for reason, number in counts["dropped"]:
        print(f"  {number:,}: {reason}")


def lazy_token_counter(name: str) -> Callable[[str], int]:
    """Count tokens by a tokenizer that is loaded only when a summary needs counting."""
    tokenizer = cache(lambda: load_tokenizer(name))
    return lambda text: len(tokenizer().encode(text, add_special_tokens=False).ids)


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--extracts", type=Path, default=Path("data/extracts"), help="folder")
    option("--replies", type=Path, default=Path("data/replies"), help="folder")
    option("--output", type=Path, default=Path("data/pairs"), help="folder")
    option("--model", help="take the replies of this teacher (needed if there are several)")
    option("--max-similarity", type=float, default=0.75, help="Levenshtein; drop what is over it")
    option("--min-difference", type=float, default=1, help="of scores; drop this or less")
    option("--max-repetition", type=float, default=0.2, help="share of repeated 4-grams")
    option("--max-tokens", type=positive, default=3072, help="training length, prompt and answer")
    option(
        "--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="the student's: Hub id or folder"
    )
    option("--keep", nargs="+", default=[], choices=CHECKS, help="checks to leave out")
    option("--length-match", action="store_true", help="keep a subset free of a length signal")
    option("--seed", type=int, default=0, help="of --length-match")
    args = parser.parse_args()
    limits = Limits(
        args.max_similarity,
        args.min_difference,
        args.max_repetition,
        args.max_tokens,
        lazy_token_counter(args.tokenizer),
    )
    made = {name: getattr(args, name) for name in ("keep", "length_match", "seed")}
    made |= {k: v for k, v in vars(limits).items() if k != "count_tokens"}
    all_dropped = []
    for split in ("train", "test"):
        replies, pairs, dropped = build_split(split, args, limits)
        if split == "train" and args.length_match:
            matched = {pair["id"] for pair in length_match(pairs, args.seed)}
            dropped += [
                {
                    "id": p["id"],
                    "split": split,
                    "model": p["teacher"],
                    "prompt_sha": p["prompt_sha"],
                    "reason": "left out to match lengths",
                    "detail": "",
                }
                for p in pairs
                if p["id"] not in matched
            ]
            pairs = [pair for pair in pairs if pair["id"] in matched]
        if split == "train" and pairs:
            teacher = pairs[0]["teacher"], pairs[0]["prompt_sha"]
            verdicts = read_verdicts(args.replies / "judge.jsonl", teacher)
            pairs = [pair | {"judge": verdicts.get(pair["id"])} for pair in pairs]
        made[split] = funnel(pairs, dropped, replies)
        print_funnel(split, made[split])
        if not pairs:
            raise UserError(f"no {split} pair is left; see the reasons above")
        write_records(args.output / f"{split}.jsonl", pairs)
        all_dropped += dropped
        if split == "train":
            found = audit(pairs)
            made["plots"] = draw_plots(pairs, found, args.output / "plots")
            made["audit"] = to_markdown(found)
    write_records(args.output / "dropped.jsonl", all_dropped)
    mark_made(args.output, made)
    print(f"\n{made['audit']}\n\nplots in {args.output / 'plots'}")


if __name__ == "__main__":
    run(main)
