"""Tiles at one scale: the level that is taken, and the resampling, held to its formula."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import CROP
from images_helpers import tissue_pixels, write_svs
from stpath_runtime.errors import InputWarning
from stpath_runtime.images.reading import open_image
from stpath_runtime.images.tiles import TileReader, resampled


def by_formula(pixels: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, without antialiasing, pixel by pixel, in float64."""
    width = len(pixels)
    found = np.empty((size, size, 3))
    for i in range(size):
        for j in range(size):
            y, x = (min(max((k + 0.5) * width / size - 0.5, 0), width - 1) for k in (i, j))
            top, left = int(y), int(x)
            bottom, right = min(top + 1, width - 1), min(left + 1, width - 1)
            dy, dx = y - top, x - left
            upper = pixels[top, left] * (1 - dx) + pixels[top, right] * dx
            lower = pixels[bottom, left] * (1 - dx) + pixels[bottom, right] * dx
            found[i, j] = upper * (1 - dy) + lower * dy
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 99))
def test_resampling_follows_its_formula(width, size, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (width, width, 3), dtype=np.uint8)
    found, exact = resampled(pixels, size).astype(float), by_formula(pixels.astype(float), size)
    assert np.abs(found - exact).max() <= 0.5 + 1e-9


def test_twice_as_fine_is_the_mean_of_four():
    pixels = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    four = pixels.astype(float).reshape(224, 2, 224, 2, 3).mean(axis=(1, 3))
    np.testing.assert_array_equal(resampled(pixels, 224), np.floor(four + 0.5))


@pytest.mark.parametrize(
    ("mpp", "levels", "level", "cut", "side"),
    [
        (0.5, 1, 0, 224, 224),
        (0.508, 1, 0, 224, 220),  # within 2%: taken as it is
        (0.492, 2, 0, 224, 228),
        (0.25, 2, 1, 224, 448),  # the level that is as fine
        (0.25, 1, 0, 448, 448),
        (0.125, 2, 1, 448, 896),  # the coarsest that is fine enough
        (0.4, 2, 0, 280, 280),
    ],
)
def test_the_level_that_is_taken(mpp, levels, level, cut, side, tmp_path):
    path = write_svs(tmp_path / "a.svs", tissue_pixels(), mpp, levels)
    with open_image(path) as image:
        reader = TileReader.of(image, 112, 224)
        assert (reader.level, reader.cut, reader.side) == (level, cut, side)
        assert reader.read(100, 100).shape == (224, 224, 3)


def test_an_image_that_is_too_coarse_warns(tmp_path):
    path = write_svs(tmp_path / "a.svs", tissue_pixels(), 1.0)
    with open_image(path) as image, pytest.warns(InputWarning, match="coarser than the 0.5 that the encoder wants"):
        assert TileReader.of(image, 112, 224).cut == 112


def test_tiles_of_the_real_crop_are_those_by_hand():
    with open_image(CROP) as image, openslide.OpenSlide(CROP) as slide:
        reader = TileReader.of(image, 112, 224)
        for x, y in ((0, 0), (300, 500), (890, 1110)):
            by_hand = np.asarray(slide.read_region((x, y), 0, (224, 224)).convert("RGB"))
            np.testing.assert_array_equal(reader.read(x, y), by_hand)
