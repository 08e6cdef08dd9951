"""Means, shares and ratios: against SciPy, the definition, and how often an interval covers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pem_composition.evaluation import standard_errors


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_the_interval_of_a_share_is_wilsons(flags):
    found = standard_errors.share(flags)
    expected = binomtest(sum(flags), len(flags)).proportion_ci(method="wilson")
    assert found.value == pytest.approx(np.mean(flags))
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)


def test_none_of_two_hundred_is_not_none_for_sure():
    found = standard_errors.share([False] * 200)
    assert (found.value, found.low) == (0, 0) and found.high == pytest.approx(0.0188, abs=1e-4)
    mirrored = standard_errors.share([True] * 200)
    assert (mirrored.low, mirrored.high) == (pytest.approx(1 - found.high), 1)
    assert standard_errors.share([]) == (None, 0.0, 1.0)


def test_groups_widen_the_interval_to_what_is_independent():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 10)
    alike = np.repeat(rng.random(20) < 0.4, 10)  # every text of a prompt is like the others
    found, apart = standard_errors.share(alike, groups), standard_errors.share(alike[::10])
    assert found.value == apart.value
    # The error of groups has n - 1 in it where that of a share has n: as one group less.
    wide = standard_errors.wilson(apart.value, 19)
    assert found.low == pytest.approx(wide.low) and found.high == pytest.approx(wide.high)
    none = standard_errors.share([False] * 200, groups)
    assert none.high == pytest.approx(standard_errors.share([False] * 20).high)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for p, n in ((0.02, 200), (0.5, 50)):
        covered = 0
        for _ in range(500):
            found = standard_errors.share(rng.random(n) < p)
            covered += found.low <= p <= found.high
        assert 0.92 <= covered / 500 <= 0.99


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=30))
def test_the_error_of_a_mean_is_that_of_the_textbook_and_of_groups_of_one(values):
    found = standard_errors.mean(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    assert found.stderr == pytest.approx(error, abs=1e-12)
    assert standard_errors.mean(values, range(len(values))).stderr == pytest.approx(error, abs=1e-9)
    assert standard_errors.mean([]) == (None, None) and standard_errors.mean([1.0]) == (1.0, None)


def test_the_error_of_a_ratio_is_that_of_the_mean_where_all_counts_are_equal():
    sums = np.random.default_rng(2).normal(size=30)
    found, plain = standard_errors.ratio(sums, np.full(30, 4)), standard_errors.mean(sums / 4)
    assert found.value == pytest.approx(plain.value) and found.stderr == pytest.approx(plain.stderr)
    assert standard_errors.ratio([6.0], [2]) == (3.0, 0.0)
