"""Turn the teacher's replies into preference pairs, and say what was dropped and why.

Reads data/extracts and data/replies, writes data/pairs/{train,test}.jsonl and dropped.jsonl: every
reply is in exactly one of them. Training pairs that are too alike or too close in score are
dropped; for the test split only the better summary counts, as the reference, so it is not filtered.

    python -m data_prep.build_pairs
"""

import argparse
from collections import Counter
from pathlib import Path

from rapidfuzz.distance import Levenshtein
from tqdm import tqdm

from data_prep.parse_reply import ParseError, parse_reply
from data_prep.records import UserError, load_records, mark_made, run, script_parser, write_records


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
        "ratings": [parsed.scores[best], parsed.scores[other]],
        "teacher": reply["model"],
        "prompt_sha": reply["prompt_sha"],
    }


def similarity(pair: dict) -> float:
    """Levenshtein similarity of chosen and rejected, 0 to 1 (1 - distance / longer length)."""
    return Levenshtein.normalized_similarity(pair["chosen"], pair["rejected"])


def reason_to_drop(
    pair: dict, max_similarity: float, min_difference: float
) -> tuple[str, str] | None:
    """(reason, detail) if the pair teaches no clear preference, else None."""
    difference = pair["ratings"][0] - pair["ratings"][1]
    if difference <= min_difference:
        return "scores too close", f"difference {difference:g}"
    if (alike := similarity(pair)) > max_similarity:
        return "summaries too alike", f"similarity {alike:.3f}"
    return None


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


def build_split(split: str, args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """(pairs, dropped) of one split."""
    extracts = load_records(args.extracts / f"{split}.jsonl", ("id", "text"), "just extracts")
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
            why = reason_to_drop(pair, args.max_similarity, args.min_difference)
            if why and split == "train":
                drop(reply, *why)
            else:
                pairs[pair["id"]] = pair
    return list(pairs.values()), dropped


def report(split: str, pairs: list[dict], dropped: list[dict]) -> None:
    print(
        f"{split}: {len(pairs) + len(dropped):,} replies in, {len(pairs):,} pairs kept, "
        f"{len(dropped):,} dropped"
    )
    why = Counter(
        d["reason"] + (f" ({d['detail']})" if d["reason"] == "not readable" else "")
        for d in dropped
    )
    for reason, number in why.most_common():
        print(f"  {number:,}: {reason}")


def main() -> None:
    parser = script_parser(__doc__)
    option = parser.add_argument
    option("--extracts", type=Path, default=Path("data/extracts"), help="folder")
    option("--replies", type=Path, default=Path("data/replies"), help="folder")
    option("--output", type=Path, default=Path("data/pairs"), help="folder")
    option("--model", help="take the replies of this teacher (needed if there are several)")
    option("--max-similarity", type=float, default=0.75, help="Levenshtein; drop what is over it")
    option("--min-difference", type=float, default=1, help="of scores; drop this or less")
    args = parser.parse_args()
    dropped, n_pairs = [], 0
    for split in ("train", "test"):
        pairs, out = build_split(split, args)
        report(split, pairs, out)
        if not pairs:
            raise UserError(f"no {split} pair is left; see the reasons above")
        write_records(args.output / f"{split}.jsonl", pairs)
        dropped += out
        n_pairs += len(pairs)
    write_records(args.output / "dropped.jsonl", dropped)
    mark_made(
        args.output,
        {
            "max_similarity": args.max_similarity,
            "min_difference": args.min_difference,
            "n_replies": n_pairs + len(dropped),
            "dropped": Counter(d["reason"] for d in dropped).most_common(),
        },
    )


if __name__ == "__main__":
    run(main)
