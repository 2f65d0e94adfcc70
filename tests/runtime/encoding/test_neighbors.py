"""Nearest spots against brute force, and blocks that hold all of them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stpath_runtime.encoding import neighbors
from stpath_runtime.encoding.neighbors import cut, nearest, plan_blocks, usual_distance
from stpath_runtime.encoding.sizes import BLOCK, PAD_KEYS


def hexagonal(n: int, step: int = 200) -> np.ndarray:
    width = int(np.ceil(np.sqrt(n)))
    row, column = np.divmod(np.arange(n), width)
    return np.stack([step * column + step // 2 * (row % 2), np.rint(step * np.sqrt(3) / 2 * row)], axis=1).astype(int)


@pytest.mark.parametrize("at_once", [1, 3])
def test_neighbours_are_the_same_by_any_number_of_threads(monkeypatch, at_once):
    coords = hexagonal(300)
    monkeypatch.setattr(neighbors, "cores", lambda: at_once)
    monkeypatch.setattr(neighbors, "QUERIED", 40)  # a few spots a part
    np.testing.assert_array_equal(nearest(coords, 12), brute_force(coords, 12))


def brute_force(coords: np.ndarray, k: int) -> np.ndarray:
    """By distance, ties by index; exact for integers."""
    coords = coords.astype(np.int64)
    squared = ((coords[:, None] - coords[None]) ** 2).sum(axis=-1)
    index = np.broadcast_to(np.arange(len(coords)), squared.shape)
    return np.lexsort((index, squared), axis=1)[:, :k]


SHAPES = {
    "one spot": np.array([[5, 5]]),
    "two at one place": np.array([[5, 5], [5, 5]]),
    "all at one place": np.full((150, 2), 7),
    "row": np.stack([np.arange(100) * 100, np.zeros(100, int)], axis=1),
    "column": np.stack([np.zeros(100, int), np.arange(100) * 100], axis=1),
    "hexagonal": hexagonal(300),
    "square": np.stack(np.divmod(np.arange(400), 20), axis=1) * 56,
    "clusters far apart": np.concatenate([hexagonal(70), hexagonal(90) + 10**6, hexagonal(5) - 10**6]),
    "duplicates": np.repeat(hexagonal(60), 3, axis=0),
}


@pytest.mark.parametrize("k", [1, 2, 7, 32, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_is_exact_and_breaks_ties_by_index(shape, k):
    coords = SHAPES[shape]
    np.testing.assert_array_equal(nearest(coords, k), brute_force(coords, k))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 120),
    k=st.integers(1, 130),
    spread=st.sampled_from([1, 3, 10, 1000, 100_000]),
    seed=st.integers(0, 2**16),
)
def test_nearest_equals_brute_force(n, k, spread, seed):
    coords = np.random.default_rng(seed).integers(0, spread, (n, 2))
    np.testing.assert_array_equal(nearest(coords, k), brute_force(coords, k))


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40),
    times=st.integers(1, 12),
    k=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_nearest_of_coincident_spots_equals_brute_force(places, times, k, seed):
    coords = np.random.default_rng(seed).permutation(np.repeat(np.array(places) * 100, times, axis=0))
    np.testing.assert_array_equal(nearest(coords, k), brute_force(coords, k))


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 200), k=st.integers(1, 40), seed=st.integers(0, 99), queried=st.sampled_from([1, 60, 1000]))
def test_how_many_are_looked_at_at_a_time_changes_nothing(n, k, seed, queried):
    coords = np.random.default_rng(seed).integers(0, 9, (n, 2))
    plan = plan_blocks([coords], k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbors, "QUERIED", queried)
        again = plan_blocks([coords], k)
    for field in ("spot", "row", "key_start", "key_row", "place"):
        np.testing.assert_array_equal(getattr(again, field), getattr(plan, field))


MANY_AT_ONE_PLACE = """
import numpy as np, scipy.spatial
from stpath_runtime.encoding import neighbors
from stpath_runtime.encoding.neighbors import plan_blocks
from stpath_runtime.machine import memory_of_process
before = memory_of_process()
plan_blocks([np.repeat([[5, 5], [9, 9]], [99_000, 1_000], axis=0)], 32)
print(memory_of_process() - before)
"""


def test_many_spots_at_one_place_take_no_square_of_memory():
    """100,000 spots took the square of their number once: 400 GB."""
    run = subprocess.run([sys.executable, "-c", MANY_AT_ONE_PLACE], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2**28


@settings(max_examples=30, deadline=None)
@given(angle=st.floats(0, 2 * np.pi), dx=st.floats(-1e5, 1e5), dy=st.floats(-1e5, 1e5), k=st.sampled_from([4, 19, 32]))
def test_turning_and_shifting_a_slide_leaves_its_neighbours(angle, dx, dy, k):
    coords = hexagonal(250)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    np.testing.assert_array_equal(nearest(coords @ turn.T + [dx, dy], k), nearest(coords, k))


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_even_and_cover_every_spot(shape):
    points = SHAPES[shape].astype(float)
    block = cut(points, 16)
    sizes = np.bincount(block)
    assert len(sizes) == -(-len(points) // 16)
    assert sizes.max() <= 16
    assert sizes.max() - sizes.min() <= 1


def test_blocks_are_compact():
    block = cut(hexagonal(6400).astype(float), BLOCK)
    spans = [np.ptp(hexagonal(6400)[block == b], axis=0).max() for b in range(block.max() + 1)]
    assert np.median(spans) <= 200 * 12  # 64 spots of a square of 8 x 8, with room


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4), k=st.integers(1, 40), seed=st.integers(0, 99),
    at_once=st.integers(1, 5),
)  # fmt: skip
def test_tiles_mask_all_but_the_neighbours(sizes, k, seed, at_once):
    rng = np.random.default_rng(seed)
    slides = [rng.integers(0, 2000, (n, 2)) for n in sizes]
    plan = plan_blocks(slides, k)
    first = np.cumsum([0, *sizes])
    expected = [set(row + first[i]) for i, coords in enumerate(slides) for row in nearest(coords, k)]

    seen = {}
    for start in range(0, plan.blocks, at_once):
        tile = plan.tile(slice(start, min(start + at_once, plan.blocks)))
        assert tile.key_index.shape[1] % PAD_KEYS == 0
        assert len(tile.rows) == len(set(tile.rows))
        for block, (index, mask) in enumerate(zip(tile.key_index, tile.mask, strict=True), start):
            for place, attends in enumerate(mask):
                spot = plan.spot[block * BLOCK + place]
                keys = plan.spot[tile.rows[index[attends]]]
                assert len(keys) == len(set(keys)) > 0
                if spot >= 0:
                    seen[spot] = set(keys)
    assert [seen[spot] for spot in range(sum(sizes))] == expected
    np.testing.assert_array_equal(plan.spot[plan.row], np.arange(sum(sizes)))
    slide_of_row = np.searchsorted(first[1:], plan.spot, side="right")
    for block in range(plan.blocks):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        assert len(set(slide_of_row[rows][plan.spot[rows] >= 0])) == 1


def test_the_usual_distance_of_a_large_slide_is_that_of_a_strip():
    row, column = np.divmod(np.arange(90_000), 300)
    coords = np.stack([column, row], axis=1) * 7.0
    shuffled = np.random.default_rng(0).permutation(coords)
    assert usual_distance(shuffled) == usual_distance(coords[:900]) == 7.0
    assert usual_distance(np.zeros((50_000, 2))) == 0
