"""Neighbours and frames of STFlow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpath_runtime.errors import InputError
from stpath_runtime.stflow.geometry import Neighborhoods, frames_of, nearest_others, neighbors_of


def by_brute_force(coords, k):
    """The nearest others by (distance, index); the spot itself comes last."""
    coords = np.asarray(coords, float)
    distance = np.hypot(*(coords[:, None] - coords[None]).transpose(2, 0, 1))
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, : min(k, len(coords))]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6), st.sampled_from([4, 12, 10**6]))
def test_neighbours_are_the_nearest_others_and_ties_go_by_index(n, k, seed, wide):
    coords = np.random.default_rng(seed).integers(0, wide, (n, 2))  # narrow ones have ties and spots at one place
    assert neighbors_of(coords, k).tolist() == by_brute_force(coords, k).tolist()


@pytest.mark.parametrize("k", [1, 3, 8])
def test_ties_of_the_last_neighbour_are_counted(k):
    row, column = np.divmod(np.arange(25), 5)
    square = np.stack([column, row], axis=1)
    distance = np.sort(((square[:, None] - square[None]) ** 2).sum(axis=2), axis=1)[:, 1:]  # whole numbers
    assert nearest_others(square * 100.0, k)[1] == (distance[:, k - 1] == distance[:, k]).sum() > 0
    assert nearest_others(np.random.default_rng(0).random((25, 2)), k)[1] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.integers(0, 10**6))
def test_frames_are_those_of_an_eigendecomposition(k, seed):
    rng = np.random.default_rng(seed)
    coords = rng.random((12, 2)) * 500
    ((_, frames, gap),) = frames_of(coords, neighbors_of(coords, k))
    d = coords[neighbors_of(coords, k)] - coords[:, None]
    x = d - d.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(x.swapaxes(1, 2) @ x)  # the smaller one first
    assert np.allclose(np.abs(frames[..., :2]), np.abs(x @ vectors), atol=1e-6 * np.abs(x).max())
    assert np.allclose(frames[..., 2], np.linalg.norm(d, axis=2))
    assert np.allclose(gap, (values[:, 1] - values[:, 0]) / values.sum(axis=1), atol=1e-9)


def test_degenerate_frames_are_counted():
    row, column = np.divmod(np.arange(36), 6)
    square = np.stack([column, row], axis=1) * 100.0
    turned = square @ np.array([[0.8, -0.6], [0.6, 0.8]])
    assert [Neighborhoods.of(each, 8).degenerate for each in (square, turned)] == [16, 16]  # the inner ones
    assert Neighborhoods.of(np.zeros((10, 2)), 8).degenerate == 10
    assert Neighborhoods.of(np.random.default_rng(0).random((50, 2)), 8).degenerate == 0


def test_many_spots_are_taken_in_parts(monkeypatch):
    coords = np.random.default_rng(0).random((50, 2))
    whole = Neighborhoods.of(coords, 8)
    monkeypatch.setattr("stpath_runtime.stflow.geometry.AT_ONCE", 7)
    assert (Neighborhoods.of(coords, 8).frames == whole.frames).all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((5, 3), int), "shape"),
        (np.zeros((5, 2)), "whole numbers"),
        (np.full((5, 2), 5), "spot 0 has the neighbours"),
        (np.array([[0, 1]] * 4 + [[-1, 2]]), "spot 4 has the neighbours"),
    ],
)
def test_neighbours_that_cannot_be_are_refused(given, said):
    with pytest.raises(InputError, match=said):
        Neighborhoods.of(np.random.default_rng(0).random((5, 2)), 2, given)
