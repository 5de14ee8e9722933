"""Turn the teacher's replies into preference pairs; say what was dropped, and audit the rest.

Reads DATA/extracts and DATA/TASK/replies, writes DATA/TASK/pairs/{train,test}.jsonl, dropped.jsonl
(every reply is in exactly one of them), and made.json with the funnel and the audit.

    python -m data_prep.build_pairs
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from common.cli import UserError, run, script_parser
from common.files import load_records, mark_made, read_json, share_of, write_records
from common.stats import markdown
from common.table import load
from data_prep.audit_pairs import SIDES, audit, length_match, measure
from data_prep.filter_pairs import limits_of, pair_faults
from data_prep.load_extracts import load_extracts
from data_prep.parse_replies import ParseError, parse_answer, parse_reply
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.client import ask_options
from data_prep.teacher.judge import pair_requests, points
from data_prep.teacher.reply_table import adopt_old, fill_in, find_replies
from data_prep.teacher.teacher_prompts import TeacherPrompts, prompt_digest
from prompts.task import Task, add_task_options, data_folder, task_of

SPLITS = ["train", "test"]
REPLY = ("id", "model", "prompt_sha", "text", "finish_reason", "created", "cost_usd")
DROPPED = ["id", "split", "model", "prompt_sha", "reason", "detail"]
UNRATED = dict.fromkeys(("chosen_position", "ratings", "criteria"))
VERDICT = ("id", "model", "settings")
ANSWER = ("id", "prompt", "settings")  # as eval/answer_texts.py keeps them


def is_of_use(reply: dict, prompts: TeacherPrompts) -> bool:
    """Whether a reply is an answer, and to a text that is there."""
    if reply.get("unusable") or reply["id"] not in prompts.extracts:
        return False
    return reply.get("text_digest") in (None, prompts.text_digest(reply["id"]))


def choose_teacher(
    replies: list[dict], prompts: TeacherPrompts, args: argparse.Namespace
) -> tuple[str, str]:
    """(model, prompt_sha): of several teachers and prompts those with most replies of use."""
    usable = [reply for reply in replies if is_of_use(reply, prompts)]
    makers = [(reply["model"], reply["prompt_sha"]) for reply in usable or replies]
    counts = Counter(makers).most_common()
    there = ", ".join(f"{n:,} by {model} with prompt {sha}" for (model, sha), n in counts)
    for (model, sha), _ in counts:
        if args.model in (None, model) and args.prompt_sha in (None, sha):
            if len(counts) > 1:
                print(f"there are {there}; taking {sha} (--model and --prompt-sha choose others)")
            return model, sha
    raise UserError(f"no such replies; choose with --model, --prompt-sha; there are {there}")


def load_rejected(
    extracts: dict[str, dict], args: argparse.Namespace, task: Task
) -> tuple[str | None, dict]:
    """(RUN:SYSTEM, id -> record) of a model's answers asked for last, to the very texts and in the
    template of today. Raises UserError."""
    if args.rejected == "none":
        return None, {key: {"text": ""} for key in extracts}
    own = args.student if args.task == "summarize" else f"{args.task}-{args.student}"
    name, system = (own, "instructed") if args.rejected == "student" else (args.rejected, "tuned")
    folder = Path("outputs") / name / "eval/answers"
    if not (settings := read_json(folder / "asked.json").get(system)):
        raise UserError(f"no {system} answers in {folder}; make them: `just answers --split train`")
    template = task.student_template(instructed=system == "instructed")
    wanted = []
    for key, extract in extracts.items():
        prompt = prompt_digest(task.student_messages(extract["text"], template))
        wanted.append({"id": key, "prompt": prompt, "settings": settings})
    return f"{name}:{system}", load(folder / f"{system}.jsonl", wanted, ANSWER)


def to_pair(extract: dict, reply: dict, rated: bool, task: Task) -> dict:
    """The pair of a reply; if it need not be `rated`, one of two that tie is drawn by the id."""
    pair = {name: extract[name] for name in ("id", "source", "url")} | UNRATED
    pair |= {"prompt": extract["text"], "rejected": "", "rejected_by": None}
    pair |= {"teacher": reply["model"], "prompt_sha": reply["prompt_sha"]}
    if reply.get("answers") == 1:
        if rated:
            raise UserError("the replies hold one answer each: --rejected student, a RUN or none")
        return pair | {"chosen": parse_answer(reply["text"], task)}
    answers, scores, criteria, best = parse_reply(reply["text"], task, rated)
    if best is None:
        best = int(share_of(f"chosen {extract['id']}", 0) < 0.5)
    if None not in scores:
        pair["ratings"], pair["criteria"] = ([s[best], s[1 - best]] for s in (scores, criteria))
    pair |= {"chosen": answers[best], "rejected": answers[1 - best]}
    return pair | {"chosen_position": best + 1, "rejected_by": "teacher"}


def why_not_joined(reply: dict, prompts: TeacherPrompts, args: argparse.Namespace) -> str:
    """Why a reply is not to be read as one about its extract; "" if it is."""
    if (reply["model"], reply["prompt_sha"]) != (args.model, args.prompt_sha):
        return "another teacher or prompt"
    if reply["id"] not in prompts.extracts:
        return "its extract is gone"
    if "prompt" not in reply and "text_digest" not in reply:
        return "of an earlier version, not shown to be of this text (--adopt-old takes it)"
    if not prompts.is_of_today(reply):
        return "its text, prompt or criteria changed"
    unusable = reply.get("unusable")
    return f"unusable ({unusable})" if unusable else ""


def read_split(
    split: str, replies: list, prompts: TeacherPrompts, args: argparse.Namespace, task: Task
) -> Iterator[dict]:
    """What became of each reply: its `pair`, or the `reason` for none, with a `detail`."""
    extracts = prompts.extracts
    paired, by_model = set(), split == "train" and args.rejected != "teacher"
    by, rejected = load_rejected(extracts, args, task) if by_model else ("teacher", extracts)
    for reply in tqdm(replies, desc=f"{split} pairs", unit="reply"):
        key, pair, detail = reply["id"], None, ""
        reason = why_not_joined(reply, prompts, args)
        if not reason and key in paired:
            reason = "a second reply to the same extract"
        elif not reason and key not in rejected:
            reason = f"no answer by {by}"
        elif not reason:
            try:
                pair = to_pair(extracts[key], reply, split == "train" and not by_model, task)
                if by_model:
                    pair |= {"rejected": rejected[key]["text"], "rejected_by": by, **UNRATED}
                reason, detail = find_fault(pair, split, args, task)
            except ParseError as error:
                reason = f"not readable ({error})"
        if not reason:
            paired.add(key)
        yield reply | {"split": split, "reason": reason, "detail": detail, "pair": pair}


def find_fault(pair: dict, split: str, args: argparse.Namespace, task: Task) -> tuple[str, str]:
    """(reason, detail) for which a pair is dropped, two times "" if it is kept."""
    # axolotl finds an answer by its text in a dummy chat, so an empty one is read as another text.
    if not pair["chosen"].strip():
        return "the chosen answer is empty", ""
    if split == "train" and pair["rejected_by"] and not pair["rejected"].strip():
        return "the rejected answer is empty", ""
    return next(pair_faults(pair, split, args, task), ("", ""))


def confirmed(pairs: list[dict], args: argparse.Namespace, task: Task) -> set[str]:
    """Ids of the pairs whose chosen answer the teacher prefers in both orders. Raises UserError."""
    rows = [{"id": pair["id"], "text": pair["prompt"]} for pair in pairs]
    chosen, rejected = ({pair["id"]: pair[side] for pair in pairs} for side in SIDES)
    requests = pair_requests(rows, chosen, rejected, task)
    path = data_folder(args, "replies") / "verdicts.jsonl"
    if left := ask_all(requests, path, ask_options(args), "verdicts", key=VERDICT):
        raise UserError(f"{left} verdicts are still to come; run again, or raise --budget-usd")
    wanted = [request | {"model": args.model} for request in requests]
    verdicts = find_replies(path, wanted, VERDICT)
    won = points(requests, verdicts, task)
    return set(won.index[won.eq(1).all(axis=1)])


def funnel(frame: pd.DataFrame) -> str:
    """Replies in, pairs kept, replies out by each reason, and what a pair cost, as Markdown."""
    reasons = ("dropped: " + frame["reason"]).replace("dropped: ", "pairs kept")
    counts = pd.crosstab(reasons, frame["split"], margins=True, margins_name="replies")
    counts = counts.sort_values("replies", ascending=False)[SPLITS]
    usd, pairs = frame["cost_usd"].astype(float).sum(skipna=False), frame["reason"].eq("").sum()
    cost = f"The replies cost ${usd:,.2f}, ${usd / max(1, pairs):.5f} for each pair that was kept."
    return f"{markdown(counts.map('{:,}'.format))}\n\n{cost}".replace("$nan", "an unknown sum")


def write_pairs(frame: pd.DataFrame, args: argparse.Namespace, task: Task) -> None:
    """Write all files, last made.json, without which no later stage reads them."""
    folder = data_folder(args, "pairs", args.name)
    prompts = {task.sha(t.stem): t.read_text() for t in task.folder.glob("teacher*.jinja")}
    made = {name: vars(args)[name] for name in ("limits", "rejected", "verify", "length_match")}
    made |= {"funnel": funnel(frame), "teacher_prompt": prompts.get(args.prompt_sha, "")}
    print(made["funnel"])
    kept = frame[frame["reason"] == ""]
    pairs = {split: kept.loc[kept["split"] == split, "pair"].tolist() for split in SPLITS}
    if empty := [split for split in pairs if not pairs[split]]:
        raise UserError(f"no {empty[0]} pair is left; see the reasons above")
    made["dates"] = [min(kept["created"])[:10], max(kept["created"])[:10]]
    shutil.rmtree(folder, ignore_errors=True)
    for split in pairs:
        write_records(folder / f"{split}.jsonl", pairs[split])
    dropped = frame.loc[frame["reason"] != "", DROPPED]
    write_records(folder / "dropped.jsonl", dropped.to_dict("records"))
    made["audit"] = audit(measure(pairs["train"]))
    mark_made(folder, made)
    print(f"\n{made['audit']}")


def load_replies(split: str, args: argparse.Namespace, task: Task) -> tuple[list, TeacherPrompts]:
    """(replies, prompts) of a split. Raises UserError."""
    extracts = data_folder(args, "extracts") / f"{split}.jsonl"
    path = data_folder(args, "replies") / f"{split}.jsonl"
    records = load_records(path, REPLY, "just replies")
    prompts = TeacherPrompts(task, load_extracts(extracts))
    adopt_old(path, extracts, prompts, args.adopt_old)
    return list(fill_in(records, path)), prompts


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add_task_options(parser)
    option = parser.add_argument
    option("--prompt-sha", help="take the replies to this prompt (default: the most frequent)")
    option("--check", nargs="+", default=[], metavar="NAME=LIMIT", help="over those of task.yaml")
    option("--keep", nargs="+", default=[], metavar="NAME", help="checks to leave out")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="Hub id or folder")
    option("--rejected", default="teacher", help="whose: teacher, student, a run's; none: for SFT")
    option("--student", default="qwen2-1.5b-dpo-sft-qlora", help="config, for --rejected student")
    option("--verify", action="store_true", help="keep what the teacher prefers in both orders")
    option("--length-match", action="store_true", help="keep a subset free of a length signal")
    option("--name", default="", help="write pairs-NAME")
    old = "take replies of earlier versions as replies to today's texts and prompts"
    option("--adopt-old", action="store_true", help=old)
    teacher_options(parser.add_argument_group("the teacher (all but --model for --verify)"))
    parser.set_defaults(model=None, temperature=0.0, max_tokens=2048)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    task = task_of(args)
    if args.rejected == "none" and (args.verify or args.length_match):
        raise UserError("--verify and --length-match need a rejected answer; see --rejected")
    args.limits = limits_of(task, args.check, args.keep)
    loaded = {split: load_replies(split, args, task) for split in SPLITS}
    args.model, args.prompt_sha = choose_teacher(*loaded["train"], args)
    built = {split: [*read_split(split, *loaded[split], args, task)] for split in SPLITS}
    kept = {one["id"]: one for one in built["train"] if not one["reason"]}
    if args.verify:
        for key in kept.keys() - confirmed([one["pair"] for one in kept.values()], args, task):
            kept.pop(key)["reason"] = "not confirmed by the teacher"
    if args.length_match:
        for key in kept.keys() - length_match(measure([one["pair"] for one in kept.values()])):
            kept.pop(key)["reason"] = "left out to match lengths"
    write_pairs(pd.DataFrame(built["train"] + built["test"]), args, task)


if __name__ == "__main__":
    run(main)
