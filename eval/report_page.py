"""What report.html shows, computed here so that its template only places it: pictures, texts."""

from dataclasses import dataclass

from data_prep.find_facts import invented_facts
from eval.conclusion import gains_in
from eval.measures import Figure
from prompts.task import Task

UNSUPPORTED = 0.5  # entailment, under which a sentence is dotted
MARGIN = 0.1  # of a picture's width, beside what it shows


@dataclass(frozen=True)
class Bar:
    """A gain and its interval; places are per cent of the picture's width, from the left."""

    name: str
    low: float
    high_from_right: float
    mean: float
    holds_zero: bool
    text: str


@dataclass(frozen=True)
class Picture:
    """The gains of a figure, one under the other, and what stands at 0."""

    caption: str
    bars: list[Bar]
    zero: float
    left: str  # what is on its left, "" where there is no room to say it
    right: str


def gain_picture(scores: dict, figure: Figure, task: Task) -> Picture | None:
    """None where the target stands alone."""
    gains = gains_in(scores, figure)
    if not gains:
        return None
    ends = [0.0, *(end for gain in gains.values() for end in gain)]
    width = (max(ends) - min(ends)) * (1 + MARGIN) or 1.0
    least = min(ends) - (width - (max(ends) - min(ends))) / 2
    most = least + width

    def percent(value: float) -> float:
        return round(100 * (value - least) / width, 2)

    bars = [
        Bar(
            f"over {task.title(system)}",
            percent(low),
            round(100 - percent(high), 2),
            percent(mean),
            low <= 0 <= high,
            figure.format_gain(mean, low, high),
        )
        for system, (mean, low, high) in gains.items()
    ]
    lower, higher = figure.sides
    caption = f"Difference of {task.title(scores['target'])} in {figure.title}"
    # A word has room on a side that takes a fifth of the width.
    left = f"\u2190 {lower}" if least < -0.2 * width else ""
    right = f"0 \u00b7 {higher} \u2192" if most > 0.2 * width else "0"
    return Picture(caption, bars, percent(0.0), left, right)


@dataclass(frozen=True)
class Cell:
    """A system's answer to a text, with its value of the chief figure."""

    title: str
    text: str
    value: str
    is_best: bool
    invented: list[tuple[int, int]]  # places of names and numbers that the text lacks
    unsupported: list[str]  # sentences

    @property
    def invented_words(self) -> list[str]:
        as_in_browser = self.text.encode("utf-16-le", "surrogatepass")
        parts = [as_in_browser[2 * start : 2 * end] for start, end in self.invented]
        return [part.decode("utf-16-le", "replace") for part in parts]


@dataclass(frozen=True)
class TextOnPage:
    """A test text with all answers to it."""

    id: str
    source: str
    text: str
    reference: Cell
    cells: list[Cell]
    gains: list[float]  # of the target over each other system


def length_in_browser(text: str) -> int:
    """The length of a text as JavaScript counts it, in units of UTF-16."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def invented_places(answer: str, text: str) -> list[tuple[int, int]]:
    """(start, end) of the names and numbers of an answer that its text lacks, as JavaScript counts
    them."""
    return [
        (length_in_browser(answer[: fact.start]), length_in_browser(answer[: fact.end]))
        for fact in invented_facts(answer, text)
    ]


def cell_of(title: str, answer: str, text: str, with_invented: bool, **more: object) -> Cell:
    answer = answer.replace("\r\n", "\n")  # as a browser reads it, or places would be shifted
    places = invented_places(answer, text) if with_invented else []
    defaults = {"value": "", "is_best": False, "unsupported": []}
    return Cell(title, answer, invented=places, **defaults | more)


def unsupported_sentences(support: dict[str, float]) -> list[str]:
    return [sentence for sentence, value in support.items() if value < UNSUPPORTED]


def page_texts(
    scores: dict, rows: list[dict], answers: dict, chief: Figure, task: Task
) -> list[TextOnPage]:
    """The texts in their order, with every answer marked for what is wrong in it."""
    values = {system: found[chief.name] for system, found in scores["per_text"].items()}
    target, support = scores["target"], scores.get("support")
    with_invented = "invented" in scores["systems"][target]
    texts = []
    for place, row in enumerate(rows):
        text = row["text"]
        here = {system: found[place] for system, found in values.items()}
        best = max(here.values(), key=lambda value: value * chief.better)
        cells = []
        for system, records in answers.items():
            more = {"value": f"{here[system]:.3f}"}
            more["is_best"] = chief.better != 0 and here[system] == best
            if support:
                more["unsupported"] = unsupported_sentences(support[system][place])
            answer = records[row["id"]]["text"]
            cells.append(cell_of(task.title(system), answer, text, with_invented, **more))
        reference = cell_of("reference (teacher)", row["reference"], text, with_invented)
        gains = [here[target] - here[other] for other in scores["differences"]]
        texts.append(TextOnPage(row["id"], row["source"], text, reference, cells, gains))
    return texts
