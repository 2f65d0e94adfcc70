"""Which spots are within an outline."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline

from stpath_runtime import InputError
from stpath_runtime.viewer.regions import MOST_CORNERS, spots_within


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), corners=st.integers(3, 12))
def test_it_is_what_matplotlib_finds(seed, corners):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.random(corners)) * 2 * np.pi  # an outline that does not cross itself: a star around the middle
    polygon = 50 + 40 * rng.random(corners)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    coords = 100 * rng.random((400, 2))
    if np.diff(angles, append=angles[0] + 2 * np.pi).max() > np.pi:
        return  # the middle is outside, and edges may cross
    expected = np.flatnonzero(Outline(np.vstack([polygon, polygon[:1]]), closed=True).contains_points(coords))
    assert spots_within(coords, polygon.tolist()).tolist() == expected.tolist()


def test_what_an_outline_crosses_twice_is_outside():
    ring = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0], [3, 3], [3, 7], [7, 7], [7, 3], [3, 3]]
    coords = np.array([[1.0, 5.0], [5.0, 5.0], [9.0, 5.0], [11.0, 5.0]])
    assert spots_within(coords, ring).tolist() == [0, 2]


@pytest.mark.parametrize(
    ("polygon", "told"),
    [
        ([[0, 0], [1, 1]], "2 corners; give 3 to"),
        ([[0, 0]] * (MOST_CORNERS + 1), "10,001 corners; give 3 to"),
        ([], "give its corners"),
        ([[0, 0], [1, 1], [2]], "give its corners"),
        ([[0, 0], [1, 1], [float("nan"), 0]], "finite numbers"),
        ([[0, 0], [1, 1], ["x", 0]], "give its corners"),
        ({"a": 1}, "give its corners"),
        (None, "give its corners"),
    ],
)
def test_what_is_no_outline_is_refused(polygon, told):
    with pytest.raises(InputError, match=told):
        spots_within(np.zeros((3, 2)), polygon)
