"""What the pairs would teach besides quality: length, position, scores; as text and as plots.

Intervals are Wilson's for shares (Wilson 1927), at 95%.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from scipy.stats import binomtest, ks_2samp, pearsonr

from data_prep.filter_pairs import META
from data_prep.teacher.parsing import CRITERIA

BIN = 5  # words; lengths are matched to within it
HIGHEST_GRADE = dict(zip(CRITERIA, (5, 5, 3, 5), strict=True))
SIGNAL = 0.6  # a share of wins over this, interval included, is a signal of its own


def n_words(text: str) -> int:
    return len(text.split())


def share(marks: Iterable[bool]) -> dict:
    """{n, share, low, high} of true marks."""
    marks = list(marks)
    if not marks:
        return {"n": 0, "share": None, "low": None, "high": None}
    result = binomtest(sum(marks), len(marks))
    interval = result.proportion_ci(method="wilson")
    low, high = float(interval.low), float(interval.high)
    return {"n": len(marks), "share": result.statistic, "low": low, "high": high}


def longer_wins(pairs: list[dict]) -> dict:
    """How often the longer summary was chosen, in words; ties left out."""
    gaps = (n_words(pair["chosen"]) - n_words(pair["rejected"]) for pair in pairs)
    return share(gap > 0 for gap in gaps if gap)


def first_wins(pairs: list[dict]) -> dict:
    """How often the summary that the teacher wrote first was chosen."""
    return share(pair["chosen_position"] == 1 for pair in pairs)


def first_wins_asked_longer(pairs: list[dict], longer: int) -> dict:
    """How often the first summary was chosen where summary 1 or 2 was asked to be the longer."""
    return first_wins([pair for pair in pairs if pair.get("longer") == longer])


def differences(pairs: list[dict]) -> tuple[list[float], list[int]]:
    """(score, words) of the first summary minus the second, per pair."""
    scores, words = [], []
    for pair in pairs:
        sign = 1 if pair["chosen_position"] == 1 else -1
        scores.append(sign * (pair["ratings"][0] - pair["ratings"][1]))
        words.append(sign * (n_words(pair["chosen"]) - n_words(pair["rejected"])))
    return scores, words


def audit(pairs: list[dict]) -> dict:
    """What is said of the training pairs."""
    scores, words = differences(pairs)
    varied = len(set(scores)) > 1 and len(set(words)) > 1
    groups = {key: defaultdict(list) for key in ("source", "teacher")}
    for pair in pairs:
        for key, group in groups.items():
            group[pair[key]].append(pair)
    sides = {side: [n_words(pair[side]) for pair in pairs] for side in ("chosen", "rejected")}
    return {
        "n": len(pairs),
        "longer wins": longer_wins(pairs),
        "first wins": first_wins(pairs),
        "first wins, longer": first_wins_asked_longer(pairs, 1),
        "first wins, shorter": first_wins_asked_longer(pairs, 2),
        "correlation": float(pearsonr(scores, words)[0]) if varied else None,
        "mean words": {side: float(np.mean(values)) for side, values in sides.items()},
        "length distance": float(ks_2samp(*sides.values()).statistic),
        "meta openers": sum(bool(META.match(p[s])) for p in pairs for s in sides),
        "judge agrees": share(
            p["judge"]["best"] == p["chosen_position"] for p in pairs if p.get("judge")
        ),
        "groups": [
            {
                "group": name,
                "n": len(members),
                "longer wins": longer_wins(members)["share"],
                "first wins": first_wins(members)["share"],
            }
            for group in groups.values()
            for name, members in sorted(group.items())
        ],
        "criteria": {
            side: {
                name: dict(
                    sorted(
                        Counter(
                            p["criteria"][i][name] for p in pairs if name in p["criteria"][i]
                        ).items()
                    )
                )
                for name in CRITERIA
            }
            for i, side in enumerate(sides)
        },
    }


def length_match(pairs: list[dict], seed: int) -> list[dict]:
    """The largest subset in which chosen and rejected are equally long in distribution.

    In each cell of (shorter, longer) length, in steps of BIN words, as many pairs are kept in which
    the longer one won as in which it lost, so that the two histograms are the same.
    """
    cells = defaultdict(lambda: ([], [], []))
    for pair in pairs:
        chosen, rejected = (n_words(pair[side]) // BIN for side in ("chosen", "rejected"))
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


def warnings(found: dict) -> list[str]:
    """Sentences for what a user of the dataset must know before training on it."""
    said = []
    for name, predictor, doubt in (
        ("longer wins", "Length", "a student may learn length for quality"),
        ("first wins", "Position", "the teacher may have rated the place for the summary"),
    ):
        low, high = found[name]["low"], found[name]["high"]
        if low is not None and (low > SIGNAL or high < 1 - SIGNAL):
            said.append(
                f"{predictor} alone predicts the winner: the {name.split()[0]} summary wins in "
                f"{found[name]['share']:.0%} of the pairs; {doubt}."
            )
    return said


def to_markdown(found: dict) -> str:
    """The audit as a table and its warnings, for the terminal and the card."""
    correlation = found["correlation"]
    rows = {
        "the longer summary wins": percent(found["longer wins"]),
        "the summary written first wins": percent(found["first wins"]),
        "... asked to be the longer one": percent(found["first wins, longer"]),
        "... asked to be the shorter one": percent(found["first wins, shorter"]),
        "correlation of score with length, first minus second": "none"
        if correlation is None
        else f"{correlation:+.2f}",
        "mean words, chosen and rejected": "{chosen:.0f} and {rejected:.0f}".format(
            **found["mean words"]
        ),
        "distance of the two length distributions (KS)": f"{found['length distance']:.2f}",
        'summaries that open with "this text discusses" or alike': f"{found['meta openers']:,}",
        "a second judge, in swapped order, agrees": percent(found["judge agrees"]),
    }
    for group in found["groups"]:
        wins = [
            f"{'-' if group[w] is None else format(group[w], '.1%')} {w}"
            for w in ("longer wins", "first wins")
        ]
        rows[f"`{group['group']}`"] = f"{group['n']:,} pairs, {', '.join(wins)}"
    lines = [
        "| of the training pairs | |",
        "|---|---|",
        *(f"| {k} | {v} |" for k, v in rows.items()),
    ]
    return "\n".join([*lines, *(f"\n**{sentence}**" for sentence in warnings(found))])


def draw_plots(pairs: list[dict], found: dict, folder: Path) -> list[str]:
    """Write lengths.png, scores_by_length.png and criteria.png; return their names."""
    from matplotlib.figure import Figure

    def plot(name: str, draw: Callable, panels: int = 1) -> str:
        figure = Figure(figsize=(4 + 3 * panels, 4), layout="constrained")
        draw(figure.subplots(1, panels))
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / name, dpi=100)
        return name

    def lengths(axes) -> None:
        sides = {side: [n_words(pair[side]) for pair in pairs] for side in ("chosen", "rejected")}
        axes.hist(sides.values(), bins=30, label=list(sides))
        axes.set(xlabel="words", ylabel="pairs", title="Length of the summaries")
        axes.legend()

    def scores_by_length(axes) -> None:
        scores, words = differences(pairs)
        axes.scatter(words, scores, s=12, alpha=max(0.05, min(0.6, 200 / len(pairs))), linewidths=0)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.axvline(0, color="grey", linewidth=0.8)
        axes.set(
            xlabel="words, first minus second summary",
            ylabel="score, first minus second",
            title="Score against length",
        )

    def criteria(all_axes) -> None:
        for axes, name in zip(all_axes, CRITERIA, strict=True):
            for offset, side in ((-0.2, "chosen"), (0.2, "rejected")):
                counts = found["criteria"][side][name]
                axes.bar([k + offset for k in counts], counts.values(), width=0.4, label=side)
            scale = range(1, HIGHEST_GRADE[name] + 1)
            axes.set(title=name, xlabel="score", ylabel="summaries", xticks=scale)
            axes.set_xlim(0.5, scale[-1] + 0.5)
        all_axes[0].legend()

    return [
        plot("lengths.png", lengths),
        plot("scores_by_length.png", scores_by_length),
        plot("criteria.png", criteria, len(CRITERIA)),
    ]
