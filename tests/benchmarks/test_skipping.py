"""The study of keys that global attention could leave out: its bounds hold, and each is above the next."""

from __future__ import annotations

import numpy as np
import pytest
import skipping
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 400), w=st.floats(-3, 3))
def test_no_bound_lets_go_more_than_the_scores_do(seed, n, w):
    rng = np.random.default_rng(seed)
    q, k, coords = rng.standard_normal((n, 4)), rng.standard_normal((n, 4)), 40 * rng.random((n, 2))
    found = skipping.shares(q, k, w, coords, 1e-6)
    assert tuple(found) == skipping.SHARES
    assert 0 <= found["means"] <= found["order"] <= found["scores"] < 1
    assert 0 <= found["norms"] <= found["scores"]


@pytest.mark.parametrize("w", [-1.0, 1.0])
def test_products_and_distances_of_blocks_are_bounded(w):
    rng = np.random.default_rng(0)
    q, k, coords = rng.standard_normal((100, 4)) + 1, rng.standard_normal((100, 4)) - 2, rng.random((100, 2))
    starts = np.array([0, 30, 77])
    products = np.maximum.reduceat(np.maximum.reduceat(q @ k.T, starts), starts, axis=1)
    assert (skipping._product_by_means(q, k, starts) >= products - 1e-12).all()
    biases = w * np.linalg.norm(coords[:, None] - coords, axis=2)
    biases = np.maximum.reduceat(np.maximum.reduceat(biases, starts), starts, axis=1)
    assert (w * skipping._reach(coords, starts, nearest=w < 0) >= biases - 1e-12).all()


def test_far_keys_go_where_distance_outweighs_all_else():
    rng = np.random.default_rng(0)
    coords = np.stack([np.arange(6400.0), np.zeros(6400)], axis=1)[::8]
    q, k = 0.1 * rng.standard_normal((2, len(coords), 4))
    found = skipping.shares(q, k, -1.0, coords, 1e-6)
    assert min(found.values()) > 0.7
    assert max(skipping.shares(q, k, 0.0, coords, 1e-6).values()) == 0


def test_queries_and_keys_are_those_of_the_model(tiny_checkpoint):
    model = skipping.load_checkpoint(tiny_checkpoint)
    slide = skipping.Slide(200 * np.stack(np.divmod(np.arange(30), 6), 1), np.ones((30, model.config.n_features), "f4"))
    layers = skipping.queries_and_keys(model, slide)
    assert len(layers) == model.config.n_layers
    for q, k, weights, coords in layers:
        assert q.shape == k.shape == (30, model.config.n_heads, model.config.d_model // model.config.n_heads)
        assert (len(weights), coords.shape) == (model.config.n_heads, (30, 2))
