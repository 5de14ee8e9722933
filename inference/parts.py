"""A text that is longer than those an adapter was taught on, read in parts (map and reduce).

It is cut into parts of about equal length within what was taught and what a prompt may hold. Each
is answered; their answers, a paragraph each, are the text to be answered then, in parts once more
while that is too long.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

from common.cli import UserError, warn
from data_prep.cut_text import Part, cut_text
from prompts.task import Task
from training.chat import build_chat
from training.lengths import Lengths

# How much longer than all that was taught a text may be and still be read in one.
MORE_THAN_TAUGHT = 1.25
# Answers that are longer than this share of what they are of get nowhere.
NO_SHORTER = 0.9


@dataclass(frozen=True)
class Cutter:
    """When a text is read in parts, and in which, by a student's prompts."""

    tokenizer: object
    task: Task
    template: str | None
    longest: int  # tokens of a prompt that is read in one
    most: int  # tokens of the prompt of a part
    bound: str  # what a longer text is beyond, in words

    def size(self, text: str) -> int:
        """Tokens of the prompt of a text."""
        prompt = build_chat(self.tokenizer, self.task.student_messages(text, self.template))
        return self.count(prompt)

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)

    def is_long(self, text: str) -> bool:
        return self.size(text) > self.longest

    def parts_of(self, text: str) -> list[Part]:
        """The parts of a text; none where it is read in one. Raises UserError if what stands around
        a text fills them."""
        if not self.is_long(text):
            return []
        room = self.most - self.size("")
        if room < 1:
            full = f"parts of {self.most:,} tokens leave no room for any text"
            raise UserError(f"{full}; --parts takes more, --whole reads it in one")
        while True:
            parts = cut_text(text, self.count, room)
            largest = max((self.size(part.text.strip()) for part in parts), default=0)
            if largest <= self.most or room == 1:
                return parts if len(parts) > 1 else []
            # A prompt may have more than its text: control tokens in it are read letter by letter.
            room = max(1, room * self.most // largest)

    def tell_length(self, name: str, text: str, then: str) -> None:
        print(f"{name}: {self.size(text):,} tokens, {self.bound}; {then}", file=sys.stderr)


def make_cutter(
    tokenizer,
    task: Task,
    template: str | None,
    lengths: Lengths | None,
    asked: int | None,
    limit: int,
) -> Cutter | None:
    """For parts of as many tokens as are asked for, or as were taught, and of a prompt of `limit`
    tokens at most; None if neither is known.

    A part may be as long as 95% of what was taught, for of the longest there may be few.
    """
    if asked:
        longest, most, bound = asked, asked, f"over --parts {asked:,}"
    elif lengths:
        longest, most = int(MORE_THAN_TAUGHT * lengths.most), lengths.most_of_95_percent
        bound = f"and it was taught on {lengths.least:,} to {lengths.most:,}"
    else:
        return None
    if longest > limit:  # the end of a longer prompt would be left out
        longest, bound = limit, f"over the {limit:,} that are read at once"
    return Cutter(tokenizer, task, template, longest, min(most, limit), bound)


@dataclass(frozen=True)
class Condensed:
    """What of a text is to be answered last, and the parts, with their answers, that it is of:
    those of the text first, then those of their answers."""

    text: str
    steps: list[list[tuple[Part, str]]]


def condense(
    name: str, text: str, cutter: Cutter, answer: Callable[[list[str]], list[str]]
) -> Condensed:
    """Answer the parts of a text, and of their answers, until these are short enough to be answered
    in one. `answer` gives the answers to some texts."""
    steps = []
    while parts := cutter.parts_of(text):
        of = ", the answers to its parts" if steps else ""
        cutter.tell_length(f"{name}{of}", text, f"read in {len(parts)} parts")
        answers = answer([part.text.strip() for part in parts])
        joined = "\n\n".join(filter(None, answers))
        if not 0 < cutter.count(joined) < NO_SHORTER * cutter.count(text):
            warn(
                f"{name}: the answers to its parts are empty or as long as it, so it is read in one"
            )
            break
        steps.append(list(zip(parts, answers, strict=True)))
        text = joined
    return Condensed(text, steps)


def show_parts(condensed: Condensed) -> None:
    """Print the answers to the parts, each with where its part begins."""
    for number, step in enumerate(condensed.steps):
        kind = "answers to parts, part" if number else "part"
        for position, (part, answer) in enumerate(step, 1):
            begins = " ".join(part.text.split()[:8])[:80]
            print(f'-- {kind} {position} of {len(step)}, from "{begins}":\n{answer}\n')
