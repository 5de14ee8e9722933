"""Make preference pairs, say what was dropped and why, and audit the rest.

Whose answers are rejected, one kind or several (`--rejected corrupted samples`):

    teacher    the worse of the teacher's two, by its own rating
    student    an untrained student's own, told what to do (`just answers STUDENT --split train`)
    RUN        those of a trained run (`just answers RUN --split train --systems tuned`)
    none       nobody's: the chosen answers alone, for SFT
    corrupted  the teacher's chosen answer with one name or number exchanged
    samples    of a run's own samples one that its text does not support, against one that it does
               (`just answers RUN --split unseen`, then `--student RUN`)
    choices    what stood beside the answer that a person chose in `just play`

Reads DATA/extracts, DATA/TASK/replies, answers of runs and DATA/TASK/choices.jsonl, as the kinds
ask for them. Writes DATA/TASK/pairs/{train,test}.jsonl, dropped.jsonl (every record is in exactly
one of them, once for each kind), and made.json with the funnel and the audit. The test pairs are
the teacher's, whatever the kind.

    python -m data_prep.build_pairs
"""

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from common.cli import UserError, run, script_parser
from common.files import load_as_written, mark_made, write_records
from common.stats import markdown
from data_prep.audit_pairs import SIDES, audit, length_match, measure
from data_prep.candidates import Candidate, Checks
from data_prep.filter_pairs import limits_of
from data_prep.load_extracts import load_extracts, without_reply
from data_prep.model_answers import load_answers, run_name
from data_prep.pairs_from_choices import load_choices, pairs_of_choices
from data_prep.pairs_from_replies import (
    EXCHANGES,
    CorruptedSide,
    ModelSide,
    NoSide,
    RejectedSide,
    ReplyReader,
    choose_maker,
)
from data_prep.pairs_from_samples import pairs_of_samples
from data_prep.teacher.ask import ask_all, teacher_options
from data_prep.teacher.client import AskOptions, ask_options
from data_prep.teacher.judge import pair_requests, points
from data_prep.teacher.reply_table import adopt_old, fill_in, find_replies
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import Task, add_task_options, data_folder, task_of

SPLITS = ["train", "test"]
REPLY = ("id", "model", "prompt_sha", "text", "finish_reason", "created", "cost_usd")
DROPPED = ["id", "split", "kind", "model", "prompt_sha", "reason", "detail"]
VERDICT = ("id", "model", "settings")
WITHOUT_REPLIES = ("samples", "choices")  # kinds whose training pairs need no reply


@dataclass(frozen=True)
class Places:
    """Folders and files that are read."""

    extracts: Path
    replies: Path
    choices: Path


@dataclass(frozen=True)
class PairOptions:
    """What pairs are made, of the command line."""

    kinds: tuple[str, ...]
    student: str
    exchange: str
    model: str | None
    prompt_sha: str | None
    limits: dict[str, float]
    tokenizer: str
    verify: bool
    length_match: bool
    adopt_old: bool

    @property
    def need_replies(self) -> bool:
        """Whether the training pairs are made of the teacher's replies."""
        return any(kind not in WITHOUT_REPLIES for kind in self.kinds)


@dataclass(frozen=True)
class Replies:
    """A split's replies, the table that they are in, and the prompts that they answer."""

    path: Path
    records: list[dict]
    prompts: TeacherPrompts


def load_replies(split: str, places: Places, options: PairOptions, task: Task) -> Replies:
    """The replies of a split, none where no pair needs them. Raises UserError."""
    extracts = places.extracts / f"{split}.jsonl"
    path = places.replies / f"{split}.jsonl"
    if split == "train" and not options.need_replies:
        return Replies(path, [], TeacherPrompts(task, load_extracts(extracts)))
    records = load_as_written(path, REPLY, "just replies")  # `fill_in` knows old ones by content
    prompts = TeacherPrompts(task, load_extracts(extracts))
    adopt_old(path, extracts, prompts, options.adopt_old)
    return Replies(path, list(fill_in(records, path)), prompts)


@dataclass(frozen=True)
class PairBuilder:
    """Makes the candidates of every kind. Raises UserError where a kind's records are not there."""

    places: Places
    options: PairOptions
    task: Task
    train: Replies
    test: Replies
    reader: ReplyReader

    def train_candidates(self, kind: str) -> Iterator[Candidate]:
        extracts = self.train.prompts.extracts
        if kind == "samples":
            unseen = without_reply(extracts, self.train.path)
            name = run_name(self.options.student, self.task.name)
            records = load_answers(name, "samples", unseen, self.task)
            return pairs_of_samples(unseen, records, f"{name}:samples", self.reader.checks)
        if kind == "choices":
            choices = load_choices(self.places.choices)
            test_texts = {e["text"].strip() for e in self.test.prompts.extracts.values()}
            return pairs_of_choices(choices, self.reader.checks, test_texts)
        side = self.rejected_side(kind, extracts)
        return self.reader.candidates("train", kind, self.train.records, self.train.prompts, side)

    def rejected_side(self, kind: str, extracts: dict[str, dict]) -> RejectedSide | None:
        """What is set against the teacher's answer; None for its own other one."""
        if kind == "teacher":
            return None
        if kind == "none":
            return NoSide()
        if kind == "corrupted":
            texts_by_id = {key: extract["text"] for key, extract in extracts.items()}
            return CorruptedSide(texts_by_id, self.options.exchange)
        if kind == "student":
            name, system = run_name(self.options.student, self.task.name), "instructed"
        else:
            name, system = kind, "tuned"
        records = load_answers(name, system, extracts, self.task)
        return ModelSide(f"{name}:{system}", records)

    def test_candidates(self) -> Iterator[Candidate]:
        return self.reader.candidates("test", "teacher", self.test.records, self.test.prompts)


def load_builder(places: Places, options: PairOptions, task: Task) -> PairBuilder:
    """Read the replies and choose whose to take, in both splits. Raises UserError."""
    train, test = (load_replies(split, places, options, task) for split in SPLITS)
    of_maker = train if train.records else test
    maker = choose_maker(of_maker.records, of_maker.prompts, options.model, options.prompt_sha)
    checks = Checks(options.limits, options.tokenizer, task)
    return PairBuilder(places, options, task, train, test, ReplyReader(maker, task, checks))


def confirmed(pairs: list[dict], path: Path, options: AskOptions, task: Task) -> set[str]:
    """Ids of the pairs whose chosen answer the teacher prefers in both orders. Raises UserError.

    `path` is the table of the verdicts.
    """
    rows = [{"id": pair["id"], "text": pair["prompt"]} for pair in pairs]
    chosen, rejected = ({pair["id"]: pair[side] for pair in pairs} for side in SIDES)
    requests = pair_requests(rows, chosen, rejected, task)
    left = ask_all(requests, path, options, "verdicts", key=VERDICT)
    if left:
        raise UserError(f"{left} verdicts are still to come; run again, or raise --budget-usd")
    wanted = [request | {"model": options.model} for request in requests]
    verdicts = find_replies(path, wanted, VERDICT)
    won = points(requests, verdicts, task)
    return set(won.index[won.eq(1).all(axis=1)])


def keep_only(candidates: list[Candidate], ids: set[str], reason: str) -> list[Candidate]:
    """The candidates, with those pairs dropped for `reason` whose ids are not among `ids`."""
    left = []
    for candidate in candidates:
        if not candidate.reason and candidate.pair["id"] not in ids:
            candidate = candidate.dropped(reason)
        left.append(candidate)
    return left


def pairs_among(candidates: list[Candidate]) -> list[dict]:
    return [candidate.pair for candidate in candidates if not candidate.reason]


def to_frame(candidates: list[Candidate]) -> pd.DataFrame:
    """A row a candidate: what it is made of, its kind and split, and what became of it."""
    rows = []
    for candidate in candidates:
        row = {name: candidate.made_of.get(name) for name in ("id", "model", "prompt_sha")}
        row |= {"split": candidate.split, "kind": candidate.kind}
        row |= {"reason": candidate.reason, "detail": candidate.detail, "pair": candidate.pair}
        rows.append(row)
    return pd.DataFrame(rows)


def funnel(frame: pd.DataFrame, replies: list[dict]) -> str:
    """Records in, pairs kept, records out by each reason, and what a pair cost, as Markdown."""
    kinds = frame.loc[frame["split"] == "train", "kind"].unique()
    labels = {kind: f"train, {kind}" for kind in kinds} if len(kinds) > 1 else {}
    columns = frame["split"].where(frame["split"] == "test", frame["kind"].map(labels))
    columns = columns.fillna("train").where(frame["split"] != "test", "test")
    total = "replies" if set(kinds).isdisjoint(WITHOUT_REPLIES) else "all"
    reasons = ("dropped: " + frame["reason"]).replace("dropped: ", "pairs kept")
    counts = pd.crosstab(reasons, columns, margins=True, margins_name=total)
    counts.index.name, counts.columns.name = "reason", "split"
    counts = counts.sort_values(total, ascending=False)
    counts = counts[[*(labels.values() or ["train"]), "test"]]
    usd = sum_of([reply["cost_usd"] for reply in replies])
    n_pairs = int(frame["reason"].eq("").sum())
    cost = "The replies cost an unknown sum."
    if usd is not None:
        a_pair = usd / max(1, n_pairs)
        cost = f"The replies cost ${usd:,.2f}, ${a_pair:.5f} for each pair that was kept."
    return f"{markdown(counts.map('{:,}'.format))}\n\n{cost}"


def sum_of(costs: list[float | None]) -> float | None:
    """The sum in dollars, None if one of them is not known."""
    return None if None in costs else float(sum(costs))


def dates_of(candidates: list[Candidate]) -> list[str]:
    """The first and the last day on which the teacher gave a reply that a pair is made of."""
    kept = [c for c in candidates if not c.reason and c.kind not in WITHOUT_REPLIES]
    days = sorted(str(candidate.made_of["created"])[:10] for candidate in kept)
    return [days[0], days[-1]]


def write_pairs(candidates: list[Candidate], builder: PairBuilder, folder: Path) -> None:
    """Write all files, last made.json, without which no later stage reads them."""
    task, options = builder.task, builder.options
    prompts = {task.sha(t.stem): t.read_text() for t in task.folder.glob("teacher*.jinja")}
    frame = to_frame(candidates)
    made = {
        "limits": options.limits,
        "rejected": list(options.kinds),
        "exchange": options.exchange,
        "verify": options.verify,
        "length_match": options.length_match,
        "funnel": funnel(frame, [*builder.train.records, *builder.test.records]),
        "teacher_prompt": prompts.get(builder.reader.maker.prompt_sha, ""),
    }
    print(made["funnel"])
    pairs = {}
    for split in SPLITS:
        pairs[split] = pairs_among([c for c in candidates if c.split == split])
        if not pairs[split]:
            raise UserError(f"no {split} pair is left; see the reasons above")
    made["dates"] = dates_of(candidates)
    shutil.rmtree(folder, ignore_errors=True)
    for split in SPLITS:
        write_records(folder / f"{split}.jsonl", pairs[split])
    dropped = frame.loc[frame["reason"] != "", DROPPED]
    write_records(folder / "dropped.jsonl", dropped.to_dict("records"))
    made["audit"] = audit(measure(pairs["train"]))
    mark_made(folder, made)
    print(f"\n{made['audit']}")


def make_parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add_task_options(parser)
    option = parser.add_argument
    option("--prompt-sha", help="take the replies to this prompt (default: the most frequent)")
    option("--check", nargs="+", default=[], metavar="NAME=LIMIT", help="over those of task.yaml")
    option("--keep", nargs="+", default=[], metavar="NAME", help="checks to leave out")
    option("--tokenizer", default="Qwen/Qwen2-1.5B-Instruct", help="Hub id or folder")
    whose = "whose, one or several: teacher, student, corrupted, samples, choices, a run's; or none"
    option("--rejected", nargs="+", default=["teacher"], metavar="KIND", help=whose)
    student = "config of --rejected student, run of --rejected samples"
    option("--student", default="qwen2-1.5b-dpo-sft-qlora", help=student)
    source = "where a corrupted answer's new name or number is from: other texts, its own, either"
    option("--exchange", choices=EXCHANGES, default="others", help=source)
    option("--verify", action="store_true", help="keep what the teacher prefers in both orders")
    option("--length-match", action="store_true", help="keep a subset free of a length signal")
    option("--name", default="", help="write pairs-NAME")
    old = "take replies of earlier versions as replies to today's texts and prompts"
    option("--adopt-old", action="store_true", help=old)
    teacher_options(parser.add_argument_group("the teacher (all but --model for --verify)"))
    parser.set_defaults(model=None, temperature=0.0, max_tokens=2048)
    return parser


def options_of(args: argparse.Namespace, task: Task) -> PairOptions:
    """The options of a command line. Raises UserError for those that do not go together."""
    kinds = tuple(dict.fromkeys(args.rejected))
    if "none" in kinds and len(kinds) > 1:
        raise UserError("--rejected none, for SFT, goes with no other kind")
    if "none" in kinds and (args.verify or args.length_match):
        raise UserError("--verify and --length-match need a rejected answer; see --rejected")
    return PairOptions(
        kinds=kinds,
        student=args.student,
        exchange=args.exchange,
        model=args.model,
        prompt_sha=args.prompt_sha,
        limits=limits_of(task, args.check, args.keep),
        tokenizer=args.tokenizer,
        verify=args.verify,
        length_match=args.length_match,
        adopt_old=args.adopt_old,
    )


def train_candidates(
    kind: str, builder: PairBuilder, verdicts: Path, asking: AskOptions
) -> list[Candidate]:
    """The training pairs of a kind, with what --verify and --length-match leave out."""
    candidates = list(builder.train_candidates(kind))
    if builder.options.verify:
        ids = confirmed(pairs_among(candidates), verdicts, asking, builder.task)
        candidates = keep_only(candidates, ids, "not confirmed by the teacher")
    pairs = pairs_among(candidates)
    if builder.options.length_match and pairs:
        ids = length_match(measure(pairs))
        candidates = keep_only(candidates, ids, "left out to match lengths")
    return candidates


def main() -> None:
    args = make_parser().parse_args()
    task = task_of(args)
    options, replies = options_of(args, task), data_folder(args, "replies")
    places = Places(data_folder(args, "extracts"), replies, replies.with_name("choices.jsonl"))
    builder = load_builder(places, options, task)
    asking = replace(ask_options(args), model=builder.reader.maker.model)
    candidates: list[Candidate] = []
    for kind in options.kinds:
        candidates += train_candidates(kind, builder, replies / "verdicts.jsonl", asking)
    candidates += builder.test_candidates()
    write_pairs(candidates, builder, data_folder(args, "pairs", args.name))


if __name__ == "__main__":
    run(main)
