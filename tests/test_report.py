"""Intervals, tables and plots as every report shows them."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from common.stats import drawing, markdown, paired_bootstrap
from eval.measures import FIGURES


def test_the_interval_is_scipys_percentile_bootstrap():
    draw = np.random.default_rng(3)
    a, b = draw.normal(0.5, 0.1, 60), draw.normal(0.45, 0.1, 60)
    mean, low, high = paired_bootstrap(a, b)
    theirs = bootstrap([a - b], np.mean, method="percentile", n_resamples=20_000, rng=1)
    assert mean == pytest.approx(np.mean(a - b))
    assert (low, high) == pytest.approx(theirs.confidence_interval, abs=2e-3)


def test_runs_that_differ_widen_the_interval():
    draw = np.random.default_rng(4)
    texts = draw.normal(0.5, 0.1, 50)
    alike, apart = np.stack([texts] * 3), np.stack([texts - 0.2, texts, texts + 0.2])
    widths = [high - low for _, low, high in (paired_bootstrap(x, 0) for x in (alike, apart))]
    assert widths[1] > 2 * widths[0]
    one = paired_bootstrap(texts, np.zeros(50))
    assert paired_bootstrap(alike, np.zeros(1)) == pytest.approx(one, abs=3e-3)


def test_equal_scores_have_an_interval_of_no_width():
    assert paired_bootstrap([1.0, 1.0], [1.0, 1.0]) == (0, 0, 0)
    assert FIGURES["bertscore_f1"].format_gain(0.1234, -0.05, 0.3) == "+0.123 [-0.050, +0.300]"


def test_a_table_keeps_what_was_formatted():
    frame = pd.DataFrame({"F1": ["0.500", "1.000"], "n": [8, 8]}, index=["a", "b"])
    assert "| 1.000 |" in markdown(frame.rename_axis("system")).replace("  ", " ")
    assert markdown(pd.DataFrame()) == "none"


def test_a_plot_appears_whole_or_not_at_all(tmp_path):
    with drawing(tmp_path / "plots/a.png", (4, 3)) as axes:
        axes.plot([1, 2])
    assert (tmp_path / "plots/a.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ZeroDivisionError), drawing(tmp_path / "b.png", (4, 3)):
        raise ZeroDivisionError
    assert not (tmp_path / "b.png").exists()
