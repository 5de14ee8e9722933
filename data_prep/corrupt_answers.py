"""An answer with one name or number exchanged, to be rejected; no model is asked.

The two differ in one fact alone, so that a preference between them says nothing but "what the text
says" (as TrueBrief, arXiv:2601.04212, and delta learning, arXiv:2507.06187, do).
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.find_facts import MONTHS, find_facts, plain_word, value_of

BETWEEN = {" ", " of ", " de ", " von ", "-"}  # what may stand between the words of one name


class Entity(NamedTuple):
    """A whole name, or a number, and where it stands."""

    start: int
    end: int
    text: str
    kind: str  # "name", "month", "year" or "number"


def is_year(number: str) -> bool:
    """Whether digits are those of a year: four, for Python reads no number of 5,000 digits."""
    return len(number) == 4 and number.isdigit() and 1000 <= int(number) <= 2100


def find_entities(text: str) -> list[Entity]:
    """Names with all of their words together, months, years and other numbers, in their order."""
    entities: list[Entity] = []
    for fact in find_facts(text):
        if fact.kind == "name" and (len(fact.text) == 1 or "." in fact.text):
            continue  # an initial, or U.S., which mostly stands for an adjective
        last = entities[-1] if entities else None
        if fact.kind == "number":
            kind = "year" if is_year(fact.text) else "number"
        else:
            kind = "month" if plain_word(fact.text) in MONTHS.split() else "name"
        joined = last and last.kind == kind == "name" and text[last.end : fact.start] in BETWEEN
        start = last.start if joined else fact.start
        if joined:
            entities.pop()
        entities.append(Entity(start, fact.end, text[start : fact.end], kind))
    return entities


def is_like(one: Entity, other: Entity) -> bool:
    """Whether both are the same, or one a part of the other."""
    if one.kind != other.kind:
        return False
    if one.kind in ("number", "year"):
        return value_of(one.text) == value_of(other.text)
    ours, theirs = ({plain_word(word) for word in e.text.split()} for e in (one, other))
    return ours <= theirs or theirs <= ours


def corrupt(answer: str, sources: Sequence[str], seed: str) -> str | None:
    """`answer` with one entity exchanged for another of its kind from `sources`.

    Which one, and for what, is drawn by `seed` alone. Of the candidates those as long in words
    are taken first. None where the answer has no entity, or the sources none of its kind.
    """
    draw = random.Random(seed)
    in_answer = find_entities(answer)
    in_sources = [entity for source in sources for entity in find_entities(source)]
    for target in draw.sample(in_answer, len(in_answer)):
        candidates = {
            entity.text
            for entity in in_sources
            if entity.kind == target.kind and not any(is_like(entity, one) for one in in_answer)
        }
        if not candidates:
            continue
        length = len(target.text.split())
        nearest = min(abs(len(text.split()) - length) for text in candidates)
        fitting = [text for text in candidates if abs(len(text.split()) - length) == nearest]
        return answer[: target.start] + draw.choice(sorted(fitting)) + answer[target.end :]
    return None
