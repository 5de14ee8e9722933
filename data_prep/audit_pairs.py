"""What the pairs would teach besides quality: length, position, scores; as text and as plots.

`build_pairs` runs it. Intervals are Wilson's for shares (Wilson 1927), at 95%.
"""

import random
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest, ks_2samp

from common.report import drawing, markdown
from prompts import Task

BIN = 5  # words; lengths are matched to within it
SIGNAL = 0.6  # a share of wins over this, interval included, is a signal of its own
SIDES = ("chosen", "rejected")
DOUBTS = {  # what a signal of its own may mean
    "longer wins": ("Length", "a student may learn length for quality"),
    "first wins": ("Position", "the teacher may have rated the place for the summary"),
}
META = re.compile(
    r"(?:this|the) (?:text|passage|article|document|extract|excerpt|paper|author)s? "
    r"(?:\w+ )?(?:discuss|describ|explor|explain|provid|present|is about|cover|examin|outlin|argu)",
    re.IGNORECASE,
)


def n_words(text: str) -> int:
    return len(text.split())


def share(marks: Iterable[bool | None]) -> dict:
    """{n, share, low, high} of true marks; None is left out."""
    marks = [mark for mark in marks if mark is not None]
    if not marks:
        return {"n": 0, "share": None, "low": None, "high": None}
    result = binomtest(sum(marks), len(marks))
    interval = result.proportion_ci(method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {"n": len(marks), "share": result.statistic, "low": low, "high": high}


def measure(pairs: list[dict]) -> pd.DataFrame:
    """A row a pair: lengths in words, who won, and first minus second, in points and in words."""
    rows = []
    for pair in pairs:
        chosen, rejected = (n_words(pair[side]) for side in SIDES)
        first = pair["chosen_position"] == 1
        points, sign = pair["ratings"][0] - pair["ratings"][1], 1 if first else -1
        rows.append(
            {
                "source": pair["source"],
                "teacher": pair["teacher"],
                "chosen": chosen,
                "rejected": rejected,
                "longer wins": chosen > rejected if chosen != rejected else None,
                "first wins": first,
                "asked longer": pair.get("longer"),
                "points": sign * points,
                "words": sign * (chosen - rejected),
                "meta": sum(bool(META.match(pair[side])) for side in SIDES),
            }
        )
    return pd.DataFrame(rows, dtype=object)


def audit(frame: pd.DataFrame) -> dict:
    """What is said of the training pairs, from their measures."""
    gaps = frame[["points", "words"]].astype(float)
    asked = frame["asked longer"]
    return {
        "longer wins": share(frame["longer wins"]),
        "first wins": share(frame["first wins"]),
        "first wins, longer": share(frame["first wins"][asked == 1]),
        "first wins, shorter": share(frame["first wins"][asked == 2]),
        "correlation": gaps.corr().loc["points", "words"] if gaps.nunique().min() > 1 else None,
        "length distance": float(
            ks_2samp(*(frame[side].astype(float) for side in SIDES)).statistic
        ),
        "mean words": {side: frame[side].mean() for side in SIDES},
        "meta openers": int(frame["meta"].sum()),
        "groups": {
            name: {"n": len(members), **{wins: share(members[wins])["share"] for wins in DOUBTS}}
            for key in ("source", "teacher")
            for name, members in frame.groupby(key)
        },
    }


def length_match(pairs: list[dict], seed: int) -> list[dict]:
    """The largest subset in which chosen and rejected are equally long in distribution.

    In each cell of (shorter, longer) length, in steps of BIN words, as many pairs are kept in which
    the longer one won as in which it lost, so that the two histograms are the same.
    """
    cells = defaultdict(lambda: ([], [], []))
    for pair in pairs:
        chosen, rejected = (n_words(pair[side]) // BIN for side in SIDES)
        cell = cells[min(chosen, rejected), max(chosen, rejected)]
        cell[0 if chosen == rejected else 1 if chosen > rejected else 2].append(pair["id"])
    draw, kept = random.Random(seed), set()
    for _, (equal, won, lost) in sorted(cells.items()):
        n = min(len(won), len(lost))
        kept |= {*equal, *draw.sample(won, n), *draw.sample(lost, n)}
    return [pair for pair in pairs if pair["id"] in kept]


def percent(value: dict) -> str:
    if not value["n"]:
        return "none"
    return f"{value['share']:.1%} [{value['low']:.1%}, {value['high']:.1%}], n {value['n']:,}"


def warnings_of(found: dict) -> list[str]:
    """Sentences for what a user of the dataset must know before training on it."""
    return [
        f"{predictor} alone predicts the winner: the {name.split()[0]} summary wins in "
        f"{found[name]['share']:.0%} of the pairs; {doubt}."
        for name, (predictor, doubt) in DOUBTS.items()
        if found[name]["n"] and (found[name]["low"] > SIGNAL or found[name]["high"] < 1 - SIGNAL)
    ]


def to_markdown(found: dict) -> str:
    """The audit as a table and its warnings, for the terminal and the card."""
    correlation, words = found["correlation"], found["mean words"]
    rows = {
        "the longer summary wins": percent(found["longer wins"]),
        "the summary written first wins": percent(found["first wins"]),
        "... asked to be the longer one": percent(found["first wins, longer"]),
        "... asked to be the shorter one": percent(found["first wins, shorter"]),
        "correlation of score with length, first minus second": "none"
        if correlation is None
        else f"{correlation:+.2f}",
        "mean words, chosen and rejected": f"{words['chosen']:.0f} and {words['rejected']:.0f}",
        "distance of the two length distributions (KS)": f"{found['length distance']:.2f}",
        'summaries that open with "this text discusses" or alike': f"{found['meta openers']:,}",
    }
    for name, group in found["groups"].items():
        wins = (f"{'-' if group[w] is None else format(group[w], '.1%')} {w}" for w in DOUBTS)
        rows[f"`{name}`"] = f"{group['n']:,} pairs, {', '.join(wins)}"
    frame = pd.DataFrame({" ": rows}).rename_axis("of the training pairs")
    return "\n\n".join([markdown(frame), *(f"**{said}**" for said in warnings_of(found))])


def draw_plots(pairs: list[dict], frame: pd.DataFrame, task: Task, folder: Path) -> list[str]:
    """Write lengths.png, scores_by_length.png and criteria.png; return their names."""
    with drawing(folder / "lengths.png", (7, 4)) as ((axes,),):
        axes.hist([frame[side].astype(float) for side in SIDES], bins=30, label=SIDES)
        axes.set(xlabel="words", ylabel="pairs", title="Length of the summaries")
        axes.legend()
    with drawing(folder / "scores_by_length.png", (7, 4)) as ((axes,),):
        alpha = max(0.05, min(0.6, 200 / len(frame)))
        axes.scatter(frame["words"], frame["points"], s=12, alpha=alpha, linewidths=0)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(title="Score against length", xlabel="words, first minus second summary")
        axes.set_ylabel("score, first minus second")
    panels = len(task.criteria)
    with drawing(folder / "criteria.png", (4 + 3 * panels, 4), 1, panels) as (row,):
        for axes, (name, highest) in zip(row, task.criteria.items(), strict=True):
            for i, side in enumerate(SIDES):
                points = [p["criteria"][i][name] for p in pairs if name in p["criteria"][i]]
                places, counts = np.unique(points, return_counts=True)
                axes.bar(places + 0.4 * i - 0.2, counts, width=0.4, label=side)
            scale = range(1, highest + 1)
            axes.set(title=name, xlabel="score", ylabel="summaries", xticks=scale)
            axes.set_xlim(0.5, highest + 0.5)
        row[0].legend()
    return ["lengths.png", "scores_by_length.png", "criteria.png"]
