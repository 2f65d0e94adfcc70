"""Each metric against a case worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpath_runtime.slides.context import masked_spots
from stpath_train.evaluation import metrics

# Deviations of 1, 2, 3, 4 from 2.5: -1.5 -0.5 0.5 1.5; of 1, 3, 2, 4: -1.5 0.5 -0.5 1.5. Their products add up to
# 2.25 - 0.25 - 0.25 + 2.25 = 4, their squares to 5 each: r = 4 / 5. The second gene falls as the truth rises: -1. The
# third is constant.
TRUTH = np.array([[1, 1, 2], [2, 2, 2], [3, 3, 2], [4, 4, 2]], np.float32)
PREDICTED = np.array([[1, 8, 1], [3, 6, 3], [2, 4, 2], [4, 2, 4]], np.float32)


def test_pearson_of_each_gene_and_its_mean():
    found = metrics.pearson_by_gene(TRUTH, PREDICTED)
    np.testing.assert_allclose(found, [0.8, -1, np.nan])
    assert metrics.mean(found) == pytest.approx(-0.1)  # (0.8 - 1) / 2: the constant gene is left out
    assert np.isnan(metrics.mean(np.array([np.nan])))
    assert metrics.pearson(TRUTH[:, 0], PREDICTED[:, 0]) == pytest.approx(0.8)


def test_spearman_is_pearson_of_the_ranks():
    # 10, 30, 20, 1000 has the ranks 1, 3, 2, 4: 0.8 as above.
    assert metrics.spearman(np.arange(4), np.array([10, 30, 20, 1000])) == pytest.approx(0.8)
    assert np.isnan(metrics.spearman(np.arange(4), np.ones(4)))


def test_squared_error():
    # (0 + 1 + 1 + 0) / 4; (7² + 4² + 1² + 2²) / 4; (1 + 1 + 0 + 4) / 4.
    np.testing.assert_allclose(metrics.squared_error_by_gene(TRUTH, PREDICTED), [0.5, 17.5, 1.5])


def test_interval_of_what_every_resample_agrees_on():
    truth = np.random.default_rng(0).standard_normal((40, 3))
    resamples = metrics.pearson_resamples(truth, 2 * truth + 1, seed=0)
    assert resamples.shape == (3, metrics.RESAMPLES)
    np.testing.assert_allclose(metrics.interval(resamples), np.ones((2, 3)))
    np.testing.assert_allclose(metrics.interval(metrics.mean(resamples, axis=0)), [1, 1])


def test_interval_is_of_percentiles_and_leaves_out_the_undefined():
    # Of 0, 1, ..., 100, with linear interpolation, the percentile q is q.
    values = np.append(np.random.default_rng(0).permutation(101).astype(float), np.nan)
    np.testing.assert_allclose(metrics.interval(values), [2.5, 97.5])


def test_resamples_are_those_of_the_seed_and_the_same_spots_for_all_genes():
    rng = np.random.default_rng(1)
    truth, predicted = rng.standard_normal((2, 30, 1)).repeat(2, axis=2)
    first, second = metrics.pearson_resamples(truth, predicted, seed=3)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, metrics.pearson_resamples(truth, predicted, seed=3)[0])
    assert not np.array_equal(first, metrics.pearson_resamples(truth, predicted, seed=4)[0])
    # Every resample draws spots with replacement: the sum of 0..29 over them is 435 on average, and varies.
    sums = metrics.resample(np.sum, (np.arange(30.0),), seed=0)
    assert abs(sums.mean() - 435) < 3 * sums.std() / 10 < 60


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.floats(-5, 5))
def test_pearson_does_not_depend_on_scale_and_offset(seed, scale, offset):
    truth, predicted = np.random.default_rng(seed).standard_normal((2, 20, 2))
    expected = [np.corrcoef(truth[:, i], predicted[:, i])[0, 1] for i in range(2)]
    np.testing.assert_allclose(metrics.pearson_by_gene(truth, scale * predicted + offset), expected, rtol=1e-9)


def test_mean_and_deviation_over_folds():
    # Mean of 0.1 and 0.3 is 0.2, both 0.1 from it; the undefined fold is left out.
    assert metrics.mean_and_std(np.array([0.1, 0.3, np.nan])) == pytest.approx((0.2, 0.1))


def test_clustering_scores():
    # Regions 0 0 1 1, clusters 0 0 1 2. Of the 6 pairs one is together in both, 2 in the regions, 1 in the clusters:
    # ARI = (1 - 2 * 1 / 6) / ((2 + 1) / 2 - 2 * 1 / 6) = 4 / 7.
    # Each cluster is of one region: homogeneity 1. In units of ln 2: entropies 1 and 1.5, information 1, so
    # NMI = 1 / 1.25. Of shuffled clusters the pair falls into one region in 1 / 3 of the cases (information 1), else
    # it is split (1 / 2): expected 2 / 3, and AMI = (1 - 2 / 3) / (1.25 - 2 / 3) = 4 / 7.
    found = metrics.clustering_scores(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2]))
    assert found == pytest.approx({"ARI": 4 / 7, "AMI": 4 / 7, "NMI": 0.8, "homogeneity": 1})
    same = metrics.clustering_scores(np.array(["a", "b", "b"]), np.array(["2", "0", "0"]))
    assert same == pytest.approx(dict.fromkeys(metrics.CLUSTERING, 1))


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # Pairs of a positive (0.35, 0.8) and a negative (0.1, 0.4): only 0.35 against 0.4 is wrong.
    assert metrics.auc(np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])) == 0.75
    assert np.isnan(metrics.auc(np.array([1, 1]), np.array([0.1, 0.4])))


def test_auc_of_several_classes_is_the_mean_of_each_against_the_rest():
    # Class 0: 0.6 against 0.61 and 0.2, one of two right. Class 1: 0.32 against 0.3 and 0.35, one. Class 2: both.
    probabilities = np.array([[0.6, 0.3, 0.1], [0.61, 0.32, 0.07], [0.2, 0.35, 0.45]])
    assert metrics.auc_of_classes(np.array([0, 1, 2]), probabilities) == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert np.isnan(metrics.auc_of_classes(np.array([0, 1, 1]), probabilities))  # class 2 has no slide
    assert metrics.auc_of_classes(np.array([0, 1]), np.array([[0.9, 0.1], [0.2, 0.8]])) == 1


def test_masks_of_a_small_grid():
    # Columns x = 0..4 of two spots each; spot 2 x + y. The rightmost is the first of (4, 0) and (4, 1): spot 8.
    # Farthest from it: (0, 1) at sqrt(17), then (0, 0) at 4, then (1, 1) at sqrt(10).
    coords = np.array([(x, y) for x in range(5) for y in range(2)])
    assert masked_spots(coords, 0.8).tolist() == [2, 3, 4, 5, 6, 7, 8, 9]
    assert masked_spots(coords, 0.9).tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert masked_spots(coords, 0.95).tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]  # int(9.5) is 9


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 60), st.sampled_from([0.95, 0.9, 0.8]), st.integers(0, 1000))
def test_masked_spots_are_the_nearest_to_the_rightmost(n, masked, seed):
    coords = np.random.default_rng(seed).integers(0, 1000, (n, 2))
    spots = masked_spots(coords, masked)
    distance = np.linalg.norm(coords - coords[np.argmax(coords[:, 0])], axis=1)
    assert len(spots) == len(set(spots)) == int(n * masked)
    assert distance[spots].max() <= np.delete(distance, spots).min()
