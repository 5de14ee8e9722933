"""What the pairs would teach besides quality: length, position, scores; as text and as plots.

`build_pairs` runs it. Intervals are Wilson's for shares (Wilson 1927), at 95%.
"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ks_2samp

from common.report import drawing, markdown
from prompts import Task

BIN = 5  # words; lengths are matched to within it
SIGNAL = 0.6  # a share of wins over this, interval included, is a signal of its own
SIDES = ["chosen", "rejected"]
DOUBTS = {  # what a signal of its own may mean
    "longer wins": ("Length", "a student may learn length for quality"),
    "first wins": ("Position", "the teacher may have rated the place for the summary"),
}


def n_words(text: str) -> int:
    return len(text.split())


def share(marks: pd.Series) -> tuple[float, float, float]:
    """The share of true marks and its interval; a missing mark is left out."""
    marks = marks.dropna()
    if marks.empty:
        return np.nan, 0.0, 1.0
    result = binomtest(int(marks.sum()), len(marks))
    return result.statistic, *result.proportion_ci(method="wilson")


def measure(pairs: list[dict]) -> pd.DataFrame:
    """A row a pair: lengths in words, who won, and first minus second, in points and in words."""
    frame = pd.DataFrame(pairs)
    frame["first wins"] = frame["chosen_position"] == 1
    frame[SIDES] = frame[SIDES].map(n_words)
    longer_wins = frame["chosen"] > frame["rejected"]
    frame["longer wins"] = longer_wins.astype(object).where(frame["chosen"] != frame["rejected"])
    sign = np.where(frame["first wins"], 1, -1)
    frame["points"] = sign * (frame["ratings"].str[0] - frame["ratings"].str[1])
    frame["words"] = sign * (frame["chosen"] - frame["rejected"])
    return frame


def wins(frame: pd.DataFrame) -> pd.DataFrame:
    """How often the longer and the first summary won, in groups of pairs, as `share` gives it."""
    groups = {
        "all": frame,
        "first asked to be the longer": frame[frame["longer"] == 1],
        "first asked to be the shorter": frame[frame["longer"] == 2],
    }
    groups |= {f"`{source}`": members for source, members in frame.groupby("source")}
    rows = {
        group: {"pairs": str(len(members))} | {name: share(members[name]) for name in DOUBTS}
        for group, members in groups.items()
        if len(members)
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def audit(frame: pd.DataFrame) -> str:
    """Tables of what the measures of the training pairs say, and warnings, as Markdown."""
    table, warnings = wins(frame), []
    for name, (predictor, doubt) in DOUBTS.items():
        won, low, high = table.loc["all", name]
        if low > SIGNAL or high < 1 - SIGNAL:
            warnings.append(
                f"**{predictor} alone predicts the winner: the {name.split()[0]} summary wins in "
                f"{won:.0%} of the pairs; {doubt}.**"
            )
        table[name] = [f"{won:.1%} [{low:.1%}, {high:.1%}]" for won, low, high in table[name]]
    correlation = frame[["points", "words"]].corr().iloc[0, 1]
    distance = ks_2samp(frame["chosen"], frame["rejected"]).statistic
    lengths = f"{frame['chosen'].mean():.0f} and {frame['rejected'].mean():.0f}"
    measures = {
        "correlation of score with length, first minus second": f"{correlation:+.2f}",
        "mean words, chosen and rejected": lengths,
        "distance of the two length distributions (KS)": f"{distance:.2f}",
    }
    tables = markdown(table), markdown(pd.DataFrame({" ": measures}))
    return "\n\n".join([*tables, *warnings])


def length_match(pairs: list[dict], seed: int) -> list[dict]:
    """A largest subset in which chosen and rejected are equally long in distribution.

    Of any two lengths, in steps of BIN words, as many pairs are kept in which the longer summary
    won as in which it lost.
    """
    drawn = random.Random(seed).sample(pairs, len(pairs))
    lengths = [tuple(n_words(pair[side]) // BIN for side in SIDES) for pair in drawn]
    there, taken, kept = Counter(lengths), Counter(), set()
    for pair, (chosen, rejected) in zip(drawn, lengths, strict=True):
        if taken[chosen, rejected] < there[rejected, chosen]:
            taken[chosen, rejected] += 1
            kept.add(pair["id"])
    return [pair for pair in pairs if pair["id"] in kept]


def draw_plots(pairs: list[dict], frame: pd.DataFrame, task: Task, folder: Path) -> None:
    """Write lengths.png, scores_by_length.png and criteria.png, which the card shows."""
    with drawing(folder / "lengths.png", (7, 4)) as ((axes,),):
        axes.hist(frame[SIDES].to_numpy(), bins=30, label=SIDES)
        axes.set(xlabel="words", ylabel="pairs", title="Length of the summaries")
        axes.legend()
    with drawing(folder / "scores_by_length.png", (7, 4)) as ((axes,),):
        axes.scatter(frame["words"], frame["points"], s=12, alpha=0.2)
        axes.set(xlabel="words, first minus second summary", ylabel="score, first minus second")
    panels = len(task.criteria)
    with drawing(folder / "criteria.png", (4 + 3 * panels, 4), 1, panels) as (row,):
        for axes, (name, highest) in zip(row, task.criteria.items(), strict=True):
            sides = zip(*(pair["criteria"] for pair in pairs), strict=True)
            points = [[given[name] for given in side if name in given] for side in sides]
            axes.hist(points, bins=np.arange(0.5, highest + 1), label=SIDES)
            axes.set(title=name, xlabel="score", ylabel="summaries")
        row[0].legend()
