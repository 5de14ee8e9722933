"""Pairs whose chosen answer is the teacher's: which replies are read, and what is set against them.

The rejected side is the teacher's own other answer, or that of a `RejectedSide`: a model's answer
to the same text, the same answer with a fact exchanged, or nothing at all.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, Protocol

from tqdm import tqdm

from common.cli import UserError
from common.files import share_of
from data_prep.candidates import UNRATED, Candidate, Checks, NoPair, new_pair
from data_prep.corrupt_answers import corrupt
from data_prep.parse_replies import ParseError, parse_answer, parse_reply
from data_prep.teacher.teacher_prompts import TeacherPrompts
from prompts.task import Task

OTHER_TEXTS = 4  # that a name or number is taken from, so that most kinds of them are there
EXCHANGES = ("others", "text", "either")


class Maker(NamedTuple):
    """The teacher and the prompt whose replies are taken."""

    model: str
    prompt_sha: str


def is_of_use(reply: dict, prompts: TeacherPrompts) -> bool:
    """Whether a reply is an answer, and to a text that is there."""
    if reply.get("unusable") or reply["id"] not in prompts.extracts:
        return False
    return reply.get("text_digest") in (None, prompts.text_digest(reply["id"]))


def choose_maker(
    replies: list[dict], prompts: TeacherPrompts, model: str | None, prompt_sha: str | None
) -> Maker:
    """Of several teachers and prompts those with most replies of use, or those asked for.

    Raises UserError if there are no such replies.
    """
    usable = [reply for reply in replies if is_of_use(reply, prompts)]
    makers = [Maker(reply["model"], reply["prompt_sha"]) for reply in usable or replies]
    counts = Counter(makers).most_common()
    there = ", ".join(f"{n:,} by {maker.model} with prompt {maker[1]}" for maker, n in counts)
    for maker, _ in counts:
        if model in (None, maker.model) and prompt_sha in (None, maker.prompt_sha):
            if len(counts) > 1:
                others = "--model and --prompt-sha choose others"
                print(f"there are {there}; taking {maker.prompt_sha} ({others})")
            return maker
    raise UserError(f"no such replies; choose with --model, --prompt-sha; there are {there}")


def why_not_joined(reply: dict, prompts: TeacherPrompts, maker: Maker) -> str:
    """Why a reply is not to be read as one about its extract; "" if it is."""
    if (reply["model"], reply["prompt_sha"]) != maker:
        return "another teacher or prompt"
    if reply["id"] not in prompts.extracts:
        return "its extract is gone"
    if "prompt" not in reply and "text_digest" not in reply:
        return "of an earlier version, not shown to be of this text (--adopt-old takes it)"
    if not prompts.is_of_today(reply):
        return "its text, prompt or criteria changed"
    unusable = reply.get("unusable")
    return f"unusable ({unusable})" if unusable else ""


def read_pair(extract: dict, reply: dict, kind: str, rated: bool, task: Task) -> dict:
    """The pair of a reply; if it need not be `rated`, one of two that tie is drawn by the id.

    Raises ParseError if it cannot be read, UserError if it is to be rated and holds one answer.
    """
    pair = new_pair(extract, kind)
    pair |= {"chosen_by": "teacher", "teacher": reply["model"], "prompt_sha": reply["prompt_sha"]}
    if reply.get("answers") == 1:
        if rated:
            raise UserError(
                "the replies hold one answer each: --rejected student, corrupted, a RUN or none"
            )
        return pair | {"chosen": parse_answer(reply["text"], task)}
    answers, scores, criteria, best = parse_reply(reply["text"], task, rated)
    if best is None:
        best = int(share_of(f"chosen {extract['id']}", 0) < 0.5)
    other = 1 - best
    if None not in scores:
        pair["ratings"] = [scores[best], scores[other]]
        pair["criteria"] = [criteria[best], criteria[other]]
    pair |= {"chosen": answers[best], "rejected": answers[other]}
    return pair | {"chosen_position": best + 1, "rejected_by": "teacher"}


class RejectedSide(Protocol):
    """Gives the answer to reject, in the place of the teacher's own other one."""

    by: str | None  # who wrote it

    def answer_for(self, pair: dict) -> str:
        """The answer to set against the chosen one of `pair`. Raises NoPair if there is none."""


class NoSide:
    """Nothing is rejected: the chosen answers alone, for SFT."""

    by = None

    def answer_for(self, pair: dict) -> str:
        return ""


@dataclass(frozen=True)
class ModelSide:
    """A model's own answer to the same text; `records` by the text's id."""

    by: str
    records: dict[str, dict]

    def answer_for(self, pair: dict) -> str:
        if pair["id"] not in self.records:
            raise NoPair(f"no answer by {self.by}")
        return self.records[pair["id"]]["text"]


class CorruptedSide:
    """The chosen answer with one name or number exchanged; no model is asked.

    `exchange` says where the new one is from: "others", some other texts; "text", the very text,
    of which it is a true part in the wrong place; "either", drawn by the id.
    """

    by = "corrupted"

    def __init__(self, texts_by_id: dict[str, str], exchange: str = "others"):
        self.texts_by_id, self.exchange = texts_by_id, exchange
        # Other texts are the next ones in an order drawn by the ids, so that the pair of a text
        # stays the same when texts far from it in that order come or go.
        self.order = sorted(texts_by_id, key=lambda key: share_of(f"corrupted {key}", 0))
        self.place = {key: place for place, key in enumerate(self.order)}

    def other_texts(self, key: str) -> list[str]:
        start = self.place[key] + 1
        following = [*self.order[start : start + OTHER_TEXTS], *self.order[:OTHER_TEXTS]]
        others = (other for other in following if other != key)
        return [self.texts_by_id[other] for other in islice(others, OTHER_TEXTS)]

    def answer_for(self, pair: dict) -> str:
        key = pair["id"]
        own, others = [pair["prompt"]], self.other_texts(key)
        own_first = share_of(f"exchange {key}", 0) < 0.5
        either = [own, others] if own_first else [others, own]
        tries = {"others": [others], "text": [own], "either": either}[self.exchange]
        for sources in tries:
            corrupted = corrupt(pair["chosen"], sources, key)
            if corrupted is not None:
                return corrupted
        raise NoPair("no name or number to exchange")


@dataclass(frozen=True)
class ReplyReader:
    """Reads the replies of one maker into pairs that pass the checks."""

    maker: Maker
    task: Task
    checks: Checks

    def candidates(
        self,
        split: str,
        kind: str,
        replies: list[dict],
        prompts: TeacherPrompts,
        side: RejectedSide | None = None,
    ) -> Iterator[Candidate]:
        """What becomes of each reply; without a `side` the teacher's other answer is rejected."""
        paired: set[str] = set()
        for reply in tqdm(replies, desc=f"{split} pairs", unit="reply"):
            candidate = Candidate(kind, split, reply)
            reason = why_not_joined(reply, prompts, self.maker)
            if not reason and reply["id"] in paired:
                reason = "a second reply to the same extract"
            if reason:
                yield candidate.dropped(reason)
                continue
            candidate = self.read(candidate, prompts.extracts[reply["id"]], side)
            if not candidate.reason:
                paired.add(reply["id"])
            yield candidate

    def read(self, candidate: Candidate, extract: dict, side: RejectedSide | None) -> Candidate:
        rated = candidate.split == "train" and side is None
        try:
            pair = read_pair(extract, candidate.made_of, candidate.kind, rated, self.task)
            if side:
                pair |= {"rejected": side.answer_for(pair), "rejected_by": side.by} | UNRATED
        except ParseError as error:
            return candidate.dropped(f"not readable ({error})")
        except NoPair as error:
            return candidate.dropped(str(error))
        made = Candidate(candidate.kind, candidate.split, candidate.made_of, pair)
        return self.checks.passed(made)
