"""What every report is made of: a mean with its interval, a Markdown table, a plot on disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from common.cli import UserError
from common.files import replacing

RESAMPLES = 10_000


def paired_bootstrap(a: ArrayLike, b: ArrayLike, resamples: int = RESAMPLES) -> tuple[float, ...]:
    """Mean of a - b and its 95% percentile interval (Efron & Tibshirani 1993, chapter 13).

    `a` and `b` are scores of shape (texts,), or (runs, texts): runs of one recipe that differ in
    the seed. Texts are resampled with replacement, and so are the runs. Raises UserError if there
    are none.
    """
    differences = np.atleast_2d(np.asarray(a, float) - np.asarray(b, float))
    if not differences.size:
        raise UserError("there is nothing to compare: no text has a score on both sides")
    draw, (runs, texts) = np.random.default_rng(0), differences.shape
    # A resample takes each run and each text so many times, which is a multinomial draw.
    of_runs = draw.multinomial(runs, np.full(runs, 1 / runs), size=resamples) / runs
    of_texts = draw.multinomial(texts, np.full(texts, 1 / texts), size=resamples) / texts
    means = ((of_runs @ differences) * of_texts).sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def in_cell(value: object) -> object:
    """A string that stays in its cell of a Markdown table, whatever a source is called."""
    return " ".join(value.split()).replace("|", "\\|") if isinstance(value, str) else value


def markdown(frame: pd.DataFrame) -> str:
    """A table of formatted values, its index on the left."""
    if frame.empty:
        return "none"
    sides = ("left", *["right"] * len(frame.columns))
    frame = frame.map(in_cell).rename(index=in_cell, columns=in_cell)
    return frame.to_markdown(disable_numparse=True, colalign=sides)


@contextmanager
def drawing(path: Path, inches: tuple[float, float], panels: int = 1) -> Iterator:
    """matplotlib's axes of a plot that is saved as PNG when the block ends well; of several panels,
    an array of axes that share their names on the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=inches, layout="constrained")
    yield figure.subplots(1, panels, sharey=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
