"""The bootstrap of every table: seeded, paired, and as wide as the standard error says."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.stats import paired_bootstrap

numbers = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30)


@settings(suppress_health_check=[HealthCheck.too_slow])  # so it is where others work
@given(numbers)
def test_the_bootstrap_is_seeded_paired_and_bracketed(pairs):
    a, b = zip(*pairs, strict=True)
    mean, low, high = paired_bootstrap(a, b, resamples=300)
    assert (mean, low, high) == paired_bootstrap(a, b, resamples=300)
    differences = [x - y for x, y in pairs]
    assert math.isclose(mean, sum(differences) / len(pairs), abs_tol=1e-9)
    assert min(differences) - 1e-9 <= low <= high <= max(differences) + 1e-9
    back = paired_bootstrap(b, a, resamples=300)
    np.testing.assert_allclose(back, (-mean, -high, -low), atol=1e-9)


def test_the_interval_of_a_clear_difference_is_above_zero():
    rng = np.random.default_rng(0)
    a = rng.normal(0.6, 0.1, 40)
    mean, low, high = paired_bootstrap(a, a - rng.normal(0.05, 0.05, 40))
    standard_error = 0.05 / math.sqrt(40)
    assert low > 0 and high - low == pytest.approx(2 * 1.96 * standard_error, rel=0.3)
    assert low < mean < high
