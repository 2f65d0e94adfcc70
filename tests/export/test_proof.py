"""The measures of the proof, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from stpath_export.proof import compare, lowest_pearson
from stpath_runtime.measures.agreement import relative_l2

RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((50, 4))


def test_relative_l2_by_hand():
    assert relative_l2(np.array([3.0, 4.5]), np.array([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_l2(np.array([3.0, 4.0]), np.array([3.0, 4.0])) == 0


def test_lowest_pearson_by_hand():
    exact = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = np.array([[1.0, 1.0], [2.0, 3.0], [3.0, 2.0]])
    r, flat = lowest_pearson(found, exact)
    assert r == pytest.approx(0.5)
    assert flat == 0


def test_a_gene_without_spread_tells_nothing_and_is_counted():
    exact = np.column_stack([EXACT, np.full(50, 0.7)])
    r, flat = lowest_pearson(exact + 1e-6 * RNG.standard_normal(exact.shape), exact)
    assert r > 0.99999
    assert flat == 1
    assert lowest_pearson(exact[:1], exact[:1]) == (None, 5)


def test_a_gene_with_a_small_spread_is_still_judged():
    exact = np.column_stack([EXACT, 0.7 + 0.01 * EXACT[:, 0]])
    found = exact.copy()
    found[:, 4] = 0.7 - 0.01 * EXACT[:, 0]
    assert lowest_pearson(found, exact)[0] == pytest.approx(-1)


@pytest.mark.parametrize(("error", "passed"), [(1e-7, True), (0.9e-5, True), (1.2e-5, False), (np.nan, False)])
def test_the_fp32_bar(error, passed):
    wrong = EXACT * (1 + error)
    assert compare((EXACT, wrong), (EXACT, EXACT))["passed"] is passed
    assert compare((wrong, EXACT), (EXACT, EXACT))["passed"] is passed


def test_a_gene_that_correlates_too_little_fails_alone():
    exact = np.column_stack([1000 * EXACT, 2.4 * EXACT[:, 0]])  # the last gene hardly counts in L2
    found = exact.copy()
    found[:, 4] += 0.017 * RNG.standard_normal(50)
    row = compare((EXACT, found), (EXACT, exact))
    assert row["relative_l2"] <= row["bar_l2"]
    assert row["flat_genes"] == 0
    assert not row["passed"]


@pytest.mark.parametrize(("times", "passed"), [(0.5, True), (1.9, True), (2.1, False)])
def test_a_low_precision_may_err_twice_what_pytorch_errs(times, passed):
    low = EXACT * (1 + 1e-3)
    found = EXACT * (1 + times * 1e-3)
    assert compare((found, found), (EXACT, EXACT), (low, low), None)["passed"] is passed
