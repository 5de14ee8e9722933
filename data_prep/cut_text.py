"""Cut a long text into parts of about equal size: extracts for training, and in use what an adapter
reads at once. It is cut at the ends of paragraphs, or else of sentences, lines or words."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import regex

# Behind what a text may be cut, the best first.
BORDERS = (
    regex.compile(r"\n\s*\n"),  # "... of a paragraph.\n\nThe next ..."
    # "... (a sentence.) The next", not "approx. three"
    regex.compile(r"""(?<=[.!?\u2026\u061f][\p{Pe}\p{Pf}"']*)\s+(?=\P{Ll})"""),
    # The full stop of Chinese and Japanese, and wide ! and ?, which no space follows
    regex.compile(r"(?<=[\u3002\uff01\uff1f][\p{Pe}\p{Pf}]*)(?=[^\p{Pe}\p{Pf}])"),
    regex.compile(r"\n"),  # of a table, a list, verses
    regex.compile(r"\s+"),
)
Count = Callable[[str], int]  # tokens or characters of a text; it may stop counting over `most`


@dataclass(frozen=True)
class Part:
    """A part of a text, and the character of it at which it begins."""

    start: int
    text: str


def split_behind(text: str, border: regex.Pattern) -> list[str]:
    """The pieces of a text, each with the border behind it; together they are the text."""
    ends = [0, *(match.end() for match in border.finditer(text)), len(text)]
    return [text[start:end] for start, end in pairwise(ends) if start < end]


def split_pieces(text: str, count: Count, most: int, borders: tuple = BORDERS) -> list[str]:
    """The pieces of a text of at most `most` (or one character), as large as borders allow;
    together they are the text."""
    if len(text) < 2 or count(text) <= most:
        return [text]
    if borders:
        halves, borders = split_behind(text, borders[0]), borders[1:]
    else:  # an endless word
        middle = len(text) // 2
        halves = [text[:middle], text[middle:]]
    pieces = []
    for half in halves:
        pieces += split_pieces(half, count, most, borders)
    return pieces


def join_evenly(pieces: list[str], sizes: list[int], most: int) -> list[Part]:
    """Neighbouring pieces joined to parts whose sizes add up to at most `most`.

    Of all ways it is the one with the least sum of squared distances from the even size, as
    paragraphs are broken into lines (Knuth and Plass 1981). Parts of white space are left out.
    """
    ends = [0, *accumulate(sizes)]
    even = ends[-1] / max(1, -(-ends[-1] // most))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n pieces: the sum, the last cut
    for end in range(1, len(pieces) + 1):
        choices = []
        for start in range(end - 1, -1, -1):
            size = ends[end] - ends[start]
            if size > most and start < end - 1:
                break
            choices.append((best[start][0] + (size - even) ** 2, start))
        best.append(min(choices))
    cuts = [len(pieces)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    cuts.reverse()
    parts, position = [], 0
    for start, end in pairwise(cuts):
        part = "".join(pieces[start:end])
        if part.strip():
            parts.append(Part(position, part))
        position += len(part)
    return parts


def cut_text(text: str, count: Count, most: int) -> list[Part]:
    """The parts of a text, each of at most `most`, as few and as equal as its borders allow."""
    pieces = split_pieces(text, count, most)
    sizes = [count(piece) for piece in pieces]
    room = most
    while True:
        parts = join_evenly(pieces, sizes, room)
        excess = max((count(part.text) for part in parts), default=0) - most
        if excess <= 0 or room <= 1:
            return parts
        room = max(1, room - excess)  # where pieces meet, some tokenizers count a little more
