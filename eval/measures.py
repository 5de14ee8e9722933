"""What is measured of answers: each measure with its function, its figures, and what they say.

A measure is one entry of MEASURES: its name in a task.yaml, its function and its figures. A
function takes answers and their rows {text, reference}, and gives a column of numbers a figure, one
an answer. All that shows a figure (tables, report, cards, ledger) reads its entry here, so that a
new measure is a function and an entry in this file, and a test.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from common.cli import UserError
from common.text import count_words, words_of
from data_prep.filter_pairs import repetition
from data_prep.find_facts import find_facts, invented_facts
from eval.bertscore import BertScore
from eval.entailment import Entailment, is_entailment_model
from eval.rouge import rouge
from prompts.task import Task

Columns = dict[str, list[float]]
Scorer = Callable[[list[str], list[dict]], Columns]


@dataclass(frozen=True)
class ScoringOptions:
    """The models that some measures take: a Hub id or a folder each."""

    encoder: str
    encoder_layers: int | None = None  # the layer to compare, if bert-score does not know it
    encoder_batch: int = 64  # texts the encoder reads at once
    nli: str | None = None  # for faithfulness; None: the encoder, if it is an entailment model

    @property
    def entailment_model(self) -> str:
        return self.nli or self.encoder


@dataclass(frozen=True)
class Figure:
    """A number that a measure gives of every answer, and how it is shown as a mean of them."""

    name: str  # its column in scores.json
    title: str  # its heading in tables
    says: str  # what a reader has to know of it, on the report, in scores.md and on the card
    chief: bool = False  # in the first table, on the card and in the ledger
    headline: bool = False  # with a sentence and a picture at the head of the report
    compared: bool = False  # with the intervals of its differences beside those
    percent: bool = False
    decimals: int = 3
    per: str = ""  # of a share of all: the column that it is divided by, both summed over the texts
    # Of answers where it is lower, and where it is higher: in the report's sentence
    verdicts: tuple[str, str] = ("are worse than", "are nearer to the teacher's than")
    sides: tuple[str, str] = ("worse", "better")  # left and right in its picture

    @property
    def better(self) -> int:
        """1 where more is better, -1 where less is, 0 where neither."""
        return {"better": 1, "worse": -1}.get(self.sides[1], 0)

    def format(self, value: float) -> str:
        if self.percent:
            return f"{value:.1%}"
        return f"{value:.{self.decimals}f}"

    def format_gain(self, mean: float, low: float, high: float) -> str:
        if self.percent:
            return f"{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points"
        mean, low, high = (f"{end:+.{self.decimals}f}" for end in (mean, low, high))
        return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Measure:
    """A name for task.yaml, and either a function or what makes one of models (`load`)."""

    name: str
    figures: tuple[Figure, ...]
    of_likeness: bool = False  # to the teacher's answers, of which it says nothing
    function: Scorer | None = None
    load: Callable[[ScoringOptions], Scorer] | None = None

    def scorer(self, options: ScoringOptions) -> Scorer:
        return self.function or self.load(options)


def basics(answers: list[str], rows: list[dict]) -> Columns:
    """words; repetition: share of repeated 4-grams."""
    words = [float(count_words(answer)) for answer in answers]
    return {"words": words, "repetition": [repetition(answer) for answer in answers]}


def inventions(answers: list[str], rows: list[dict]) -> Columns:
    """invented: 1 for an answer with a name or number that its text lacks; invented_facts: how many
    of them; facts: how many names and numbers (Nan et al. 2021, see data_prep/find_facts.py)."""
    facts, invented = [], []
    for answer, row in zip(answers, rows, strict=True):
        facts.append(float(len(find_facts(answer))))
        invented.append(float(len(invented_facts(answer, row["text"]))))
    any_invented = [float(count > 0) for count in invented]
    return {"invented": any_invented, "invented_facts": invented, "facts": facts}


def fragments(document: list[str], answer: list[str]) -> list[int]:
    """Lengths of the longest word runs that the answer shares with the document, left to right, by
    the greedy matching of Grusky et al. 2018 (Newsroom), figure 3."""
    text = f" {' '.join(document)} "
    lengths = []
    start = 0
    while start < len(answer):
        end = start
        while end < len(answer) and f" {' '.join(answer[start : end + 1])} " in text:
            end += 1
        if end > start:
            lengths.append(end - start)
        start = max(end, start + 1)
    return lengths


def extractiveness(answers: list[str], rows: list[dict]) -> Columns:
    """coverage: share of an answer's words inside runs that the document holds; density: mean
    length of the run a word is in (Grusky et al. 2018)."""
    coverage, density = [], []
    for answer, row in zip(answers, rows, strict=True):
        words = words_of(answer)
        runs = fragments(words_of(row["text"]), words)
        length = max(1, len(words))
        coverage.append(sum(runs) / length)
        density.append(sum(run**2 for run in runs) / length)
    return {"coverage": coverage, "density": density}


MEASURES = (
    Measure(
        "bertscore",
        load=lambda options: BertScore(
            options.encoder, options.encoder_layers, options.encoder_batch
        ),
        of_likeness=True,
        figures=(
            Figure(
                "bertscore_f1",
                "BERTScore F1",
                "likeness in meaning to the teacher's answer, 0 to 1 (Zhang et al. 2020)",
                chief=True,
                compared=True,
            ),
            Figure(
                "bertscore_f1_rescaled",
                "F1 rescaled",
                "the same, so that unrelated texts have 0",
                chief=True,
            ),
            Figure("bertscore_p", "BERTScore P", "how much of the answer is in the teacher's"),
            Figure("bertscore_r", "BERTScore R", "how much of the teacher's is in the answer"),
            Figure("bertscore_p_rescaled", "P rescaled", "P, so that unrelated texts have 0"),
            Figure("bertscore_r_rescaled", "R rescaled", "R, so that unrelated texts have 0"),
            Figure(
                "over_512_tokens",
                "over 512 tokens",
                "share of answers longer than the encoder reads",
            ),
        ),
    ),
    Measure(
        "rouge",
        function=rouge,
        of_likeness=True,
        figures=(
            Figure(
                "rouge_l",
                "ROUGE-L",
                "the longest sequence of words shared with the teacher's answer, 0 to 1 (Lin 2004)",
                chief=True,
                compared=True,
            ),
            Figure("rouge_1", "ROUGE-1", "words shared with the teacher's answer"),
            Figure("rouge_2", "ROUGE-2", "pairs of words shared with the teacher's answer"),
            Figure("rouge_lsum", "ROUGE-Lsum", "ROUGE-L sentence by sentence"),
        ),
    ),
    Measure(
        "faithfulness",
        load=lambda options: Entailment(options.entailment_model, options.encoder_batch),
        figures=(
            Figure(
                "faithfulness",
                "faithfulness",
                "support of an answer's sentences by its text, 0 to 1, by an NLI model "
                "(SummaC-ZS, Laban et al. 2022)",
                chief=True,
                compared=True,
                verdicts=("are less true than", "are truer to the texts than"),
            ),
        ),
    ),
    Measure(
        "invented",
        function=inventions,
        figures=(
            Figure(
                "invented",
                "answers that invent",
                "share of answers with a name (a capitalized word inside a sentence) or a number "
                "that their text lacks (Nan et al. 2021); less is better",
                chief=True,
                headline=True,
                compared=True,
                percent=True,
                verdicts=("invent less than", "invent more than"),
                sides=("better", "worse"),
            ),
            Figure(
                "invented_facts",
                "facts invented",
                "share of all names and numbers that the texts lack",
                chief=True,
                percent=True,
                per="facts",
                verdicts=("invent less than", "invent more than"),
                sides=("better", "worse"),
            ),
            Figure(
                "facts",
                "facts an answer",
                "names and numbers in a mean answer: who says nothing invents nothing",
                chief=True,
                compared=True,
                decimals=2,
                verdicts=("hold fewer facts than", "hold more facts than"),
                sides=("fewer", "more"),
            ),
        ),
    ),
    Measure(
        "extractiveness",
        function=extractiveness,
        figures=(
            Figure(
                "coverage", "coverage", "share of words in runs that the text has (Newsroom, 2018)"
            ),
            Figure(
                "density",
                "density",
                "mean length of the run of the text that a word is in",
                decimals=1,
            ),
        ),
    ),
    Measure(
        "basics",
        function=basics,
        figures=(
            Figure(
                "words",
                "mean words",
                "words an answer",
                chief=True,
                decimals=1,
                verdicts=("are shorter than", "are longer than"),
                sides=("shorter", "longer"),
            ),
            Figure("repetition", "repetition", "share of repeated sequences of four words"),
        ),
    ),
)


def is_cut(record: dict) -> bool:
    """Whether an answer was cut at the limit of tokens."""
    return record["finish_reason"] == "length"


# What is counted of the answers' records, no mean.
COUNTS: dict[Figure, Callable[[dict], bool]] = {
    Figure("empty", "empty", "answers without a word", decimals=0): lambda record: (
        not record["text"].strip()
    ),
    Figure("no_answer", "no answer", "replies of an endpoint that were no answers", decimals=0): (
        lambda record: "unusable" in record
    ),
    Figure(
        "stopped_at_limit", "cut", "answers cut at the limit of tokens", chief=True, decimals=0
    ): is_cut,
    Figure("documents_cut", "documents cut", "texts whose end the model did not see", decimals=0): (
        lambda record: record.get("n_cut_tokens", 0) > 0
    ),
}
ALWAYS = "basics"  # measured of every task
OF_LIKENESS = [measure.name for measure in MEASURES if measure.of_likeness]
FIGURES = {figure.name: figure for measure in MEASURES for figure in measure.figures}
FIGURES |= {figure.name: figure for figure in COUNTS}
CHIEF = [name for name, figure in FIGURES.items() if figure.chief]
COMPARED = [name for name, figure in FIGURES.items() if figure.compared]


def load_scorers(task: Task, options: ScoringOptions) -> dict[str, Scorer]:
    """The functions of the measures that a task names. Raises UserError for one that is not."""
    wanted = {ALWAYS, *task.measures}
    names = [measure.name for measure in MEASURES]
    if unknown := ", ".join(sorted(wanted.difference(names))):
        place = f"{task.folder / 'task.yaml'}: measures: no {unknown}"
        raise UserError(f"{place}; there are {', '.join(names)}")
    model = options.entailment_model
    if "faithfulness" in wanted and not (options.nli or is_entailment_model(model)):
        print(f"no faithfulness: {model} is no entailment model; --nli names one")
        wanted.remove("faithfulness")
    return {measure.name: measure.scorer(options) for measure in MEASURES if measure.name in wanted}


def linearize_shares(values: pd.DataFrame) -> pd.DataFrame:
    """A line a text, with columns whose means are the figures.

    A share of all, such as invented_facts of all facts, is a ratio of two means. Its column is
    the ratio, linearized around them (Cochran 1977, section 2.11): the mean is the share, and an
    interval over texts holds for it too.
    """
    values = values.copy()
    for name in values:
        per = FIGURES[name].per if name in FIGURES else ""
        if not per:
            continue
        mean = values[per].mean()
        share = values[name].mean() / mean if mean else 0.0
        values[name] = share + (values[name] - share * values[per]) / (mean or 1.0)
    return values
