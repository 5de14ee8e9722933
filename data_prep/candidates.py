"""What may become a preference pair, and what becomes of it: kept, or dropped with a reason."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from data_prep.filter_pairs import pair_faults
from prompts.task import Task

UNRATED = dict.fromkeys(("chosen_position", "ratings", "criteria"))
# A check that would drop what a kind of pairs is made for. Two answers that differ in one fact are
# alike; what a person chose is chosen, whatever it looks like.
NOT_CHECKED = {
    "corrupted": {"similarity", "difference"},
    "samples": {"similarity", "difference"},
    "choices": {
        "similarity",
        "difference",
        "repetition",
        "longer",
        "refusal",
        "lead",
        "language",
        "invented",
    },
}


class NoPair(Exception):
    """No pair can be made of a record; the message is the reason."""


@dataclass(frozen=True)
class Candidate:
    """A record that a pair may be made of, with that pair, or the reason why there is none.

    `kind` says whose answer is rejected (see `build_pairs`), `made_of` holds the id, and as it may
    be the model, prompt_sha, created and cost_usd of the record.
    """

    kind: str
    split: str
    made_of: dict
    pair: dict | None = None
    reason: str = ""
    detail: str = ""

    def dropped(self, reason: str, detail: str = "") -> Candidate:
        return replace(self, reason=reason, detail=detail)


@dataclass(frozen=True)
class Checks:
    """What a pair must pass: check -> limit, and the tokenizer that counts its length."""

    limits: dict[str, float]
    tokenizer: str
    task: Task = field(compare=False)

    def of_kind(self, kind: str) -> Checks:
        left_out = NOT_CHECKED.get(kind, set())
        limits = {name: limit for name, limit in self.limits.items() if name not in left_out}
        return replace(self, limits=limits)

    def passed(self, candidate: Candidate) -> Candidate:
        """The candidate as it is, or dropped for the first fault of its pair."""
        pair, split = candidate.pair, candidate.split
        # axolotl finds an answer by its text in a dummy chat, so an empty one is read as another
        # text.
        if not pair["chosen"].strip():
            return candidate.dropped("the chosen answer is empty")
        if split == "train" and pair["rejected_by"] and not pair["rejected"].strip():
            return candidate.dropped("the rejected answer is empty")
        checks = self.of_kind(candidate.kind)
        for check, detail in pair_faults(pair, split, checks, self.task):
            return candidate.dropped(check, detail)
        return candidate


def new_pair(extract: dict, kind: str) -> dict:
    """A pair about a text, its two sides still to be filled in."""
    pair = {name: extract[name] for name in ("id", "source", "url")}
    pair |= {"kind": kind} | UNRATED
    pair |= {"prompt": extract["text"], "chosen": "", "rejected": ""}
    return pair | dict.fromkeys(("chosen_by", "rejected_by", "teacher", "prompt_sha"))
