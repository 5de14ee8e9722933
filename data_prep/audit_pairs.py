"""What the pairs would teach besides quality: length and position, as a table.

`build_pairs` runs it. Intervals are Wilson's for shares (Wilson 1927), at 95%.
"""

import pandas as pd
from scipy.stats import binomtest

from common.stats import markdown

SIDES = ["chosen", "rejected"]
FEW = 0.1  # of the pairs; where fewer differ in length, they teach nothing of it


def measure(pairs: list[dict]) -> pd.DataFrame:
    """A row a pair: lengths in words, and whether the longer and the first answer won."""
    frame = pd.DataFrame(pairs)
    frame[SIDES] = frame[SIDES].map(lambda text: len(text.split()))
    gain, position = frame["chosen"] - frame["rejected"], frame["chosen_position"]
    frame["longer wins"] = (gain > 0).astype("boolean").where((gain != 0) & (frame["rejected"] > 0))
    frame["first wins"] = (position == 1).astype("boolean").where(position.notna())
    return frame


def share_with_interval(marks: pd.Series) -> tuple[float, float, float]:
    """The share of true ones, and its interval."""
    result = binomtest(int(marks.sum()), len(marks))
    interval = result.proportion_ci(method="wilson")
    return result.statistic, interval.low, interval.high


def audit(frame: pd.DataFrame) -> str:
    """How often the longer and the first answer won, by source, and warnings, as Markdown."""
    lines, warnings = {}, []
    groups = {"all": frame} | dict(iter(frame.groupby("source")))
    for group, members in groups.items():
        line = {"pairs": f"{len(members):,}"}
        for side in SIDES:
            if members[side].any():
                line[f"words, {side}"] = f"{members[side].mean():.1f}"
        for name in ("longer wins", "first wins"):
            marks = members[name].dropna()
            if marks.empty:
                continue
            won, low, high = share_with_interval(marks)
            line[name] = f"{won:.1%} [{low:.1%}, {high:.1%}]"
            is_common = len(marks) >= FEW * len(members)
            if group == "all" and is_common and (low > 0.6 or high < 0.4):  # a signal of its own
                which = f"the {name.split()[0]} answer wins in {won:.0%} of the pairs"
                warnings.append(f"**A student may learn this, not quality: {which}.**")
        lines[group] = line
    return "\n\n".join([markdown(pd.DataFrame(lines).T.fillna("")), *warnings])


def length_match(frame: pd.DataFrame) -> set[str]:
    """Ids of a largest subset in which chosen and rejected are equally long in distribution."""
    # Of any two lengths, in steps of 5 words, as many pairs are kept as of the two the other way.
    lengths = frame.set_index("id")[SIDES].sample(frac=1, random_state=0) // 5
    mirrored = pd.MultiIndex.from_frame(lengths[SIDES[::-1]])
    most = lengths.value_counts().reindex(mirrored, fill_value=0).to_numpy()
    return set(lengths.index[lengths.groupby(SIDES).cumcount() < most])
