"""Tissue, by our mask or the user's, and the tiles over it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers import CROP
from images_helpers import tissue_pixels, write_svs
from stpath_runtime.errors import InputError
from stpath_runtime.images.grid import grid_over
from stpath_runtime.images.reading import open_image
from stpath_runtime.images.tissue import Tissue, find_tissue, otsu, overview_of, read_tissue, saturation, shrunk

PIECES = ((100, 150, 620, 800), (800, 150, 1300, 700))


def overview(path, mpp=None):
    with open_image(path, mpp) as image:
        return overview_of(image)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    return write_svs(tmp_path_factory.mktemp("slide") / "a.svs", tissue_pixels(pieces=PIECES), 0.5)


def test_the_mask_finds_the_pieces(slide):
    tissue = find_tissue(overview(slide), 0.5)
    assert (tissue.count, tissue.scale) == (2, 16)
    for piece, box in enumerate(PIECES, 1):
        rows, columns = np.nonzero(tissue.pieces == piece)
        found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) * tissue.scale
        np.testing.assert_allclose(found, box, atol=4 * tissue.scale)


def test_glass_alone_is_no_tissue(tmp_path):
    path = write_svs(tmp_path / "a.svs", tissue_pixels(pieces=()), 0.5)
    assert find_tissue(overview(path), 0.5).count == 0


def test_black_borders_and_specks_are_no_tissue(tmp_path):
    pixels = tissue_pixels(pieces=PIECES[:1])
    pixels[:, 1200:] = np.random.default_rng(0).integers(0, 12, (1000, 200, 3))  # a scanner's black, with noise
    pixels[900:930, 900:930] = (220, 120, 180)
    tissue = find_tissue(overview(write_svs(tmp_path / "a.svs", pixels, 0.5)), 0.5)
    assert tissue.count == 1
    assert np.nonzero(tissue.pieces)[1].max() * tissue.scale < 700


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 60), st.integers(70, 250), st.integers(10, 300), st.integers(10, 300))
def test_otsu_parts_two_groups(low, high, n_low, n_high):
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(low, 1.5, n_low), rng.normal(high, 1.5, n_high)])
    assert low + 4 < otsu(values) < high - 3


def test_saturation_is_that_of_hsv():
    pixels = np.random.default_rng(0).integers(20, 256, (9, 9, 3), dtype=np.uint8)
    by_pillow = np.asarray(Image.fromarray(pixels).convert("HSV"))[..., 1]
    np.testing.assert_allclose(saturation(pixels), by_pillow, atol=1)


def test_an_overview_read_in_parts_is_that_read_at_once(tmp_path, monkeypatch):
    pixels = tissue_pixels()
    path = write_svs(tmp_path / "a.svs", pixels, 0.5)
    monkeypatch.setattr("stpath_runtime.images.tissue.OVERVIEW_PIXELS", 300)
    monkeypatch.setattr("stpath_runtime.images.tissue.STRIP", 256)
    found = overview(path)
    assert found.scale == 5
    np.testing.assert_array_equal(found.pixels[:200, :280], shrunk(pixels, 5))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tiles_of_the_grid_are_covered_and_within(data):
    """Against a count of pixels, tile by tile."""
    height, width = data.draw(st.integers(10, 40)), data.draw(st.integers(10, 40))
    scale, side = data.draw(st.sampled_from([1.0, 4.0, 16.0])), data.draw(st.sampled_from([16, 48, 64]))
    pitch, least = data.draw(st.sampled_from([16.0, 40.0, 64.0])), data.draw(st.sampled_from([0.0, 0.15, 0.7, 1.0]))
    pieces = np.zeros((height, width), np.int32)
    pieces[2 : height // 2, 3 : width // 2] = 1
    pieces[height // 2 + 1 :, width // 2 + 1 :] = 2
    size = (int(width * scale), int(height * scale))
    grid = grid_over(Tissue(pieces, scale), side, pitch, least, size, sections=True)
    large = np.kron(pieces, np.ones((int(scale), int(scale)), np.int32))
    assert (grid.corners >= 0).all()
    assert (grid.corners + side <= size).all()
    for (x, y), section in zip(grid.corners, grid.sections or [], strict=True):
        tile = large[y : y + side, x : x + side]
        share = (tile > 0).mean()
        assert share >= least - 2 * scale / side
        counts = [(tile == piece).sum() for piece in (1, 2)]
        if abs(counts[0] - counts[1]) > 2 * scale * side:
            assert section == f"section {np.argmax(counts) + 1}"


def test_the_grid_begins_at_the_corner_of_the_tissue():
    pieces = np.zeros((100, 100), np.int32)
    pieces[10:60, 20:80] = 1
    grid = grid_over(Tissue(pieces, 16.0), 224, 224.0, 0.15, (1600, 1600), sections=False)
    assert grid.corners[0].tolist() == [320, 160]
    assert set(np.diff(np.unique(grid.corners[:, 0]))) == {224}
    assert grid.centres[0].tolist() == [432, 272]


def polygon(*corners):
    return {"type": "Polygon", "coordinates": [[*map(list, corners), list(corners[0])]]}


BOX = polygon((100, 150), (620, 150), (620, 800), (100, 800))
HOLE = {
    "type": "Polygon",
    "coordinates": [BOX["coordinates"][0], polygon((200, 250), (500, 250), (500, 600), (200, 600))["coordinates"][0]],
}


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": BOX, "properties": {}}]},  # TRIDENT
        [{"type": "Feature", "id": "a", "geometry": BOX, "properties": {"objectType": "annotation"}}],  # QuPath
        {"type": "Feature", "geometry": {"type": "MultiPolygon", "coordinates": [BOX["coordinates"]]}},
        {"type": "GeometryCollection", "geometries": [BOX, {"type": "Point", "coordinates": [1, 2]}]},
        BOX,
    ],
)
def test_outlines_of_geojson(content, slide, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(content))
    tissue = read_tissue(tmp_path / "a.geojson", overview(slide), 0.5)
    assert tissue.count == 1
    assert (tissue.pieces > 0).sum() * tissue.scale**2 == pytest.approx(520 * 650, rel=0.03)


def test_holes_of_outlines_are_no_tissue(slide, tmp_path):
    (tmp_path / "a.geojson").write_text(json.dumps(HOLE))
    tissue = read_tissue(tmp_path / "a.geojson", overview(slide), 0.5)
    assert tissue.pieces[int(425 / 16), int(350 / 16)] == 0
    assert (tissue.pieces > 0).sum() * tissue.scale**2 == pytest.approx(520 * 650 - 300 * 350, rel=0.05)


def test_thousands_of_outlines(slide, tmp_path):
    """As of cells: a few pixels each."""
    boxes = [
        polygon((x, y), (x + 30, y), (x + 30, y + 30), (x, y + 30)) for x in range(0, 1360, 8) for y in range(0, 960, 8)
    ]
    (tmp_path / "a.geojson").write_text(json.dumps(boxes))
    found = overview(slide)
    tissue = read_tissue(tmp_path / "a.geojson", found, 0.5)
    grid = grid_over(tissue, 224, 224.0, 0.15, found.size, sections=True)
    assert set(grid.sections) == {"section 1"}  # they overlap


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not GeoJSON of outlines"),
        ('{"a": 1}', "not GeoJSON of outlines"),
        ('{"type": "FeatureCollection", "features": []}', "holds no area"),
        (json.dumps({"type": "Point", "coordinates": [1, 2]}), "holds no area"),
        (json.dumps(polygon((10, 10), (20, 10), (10, 10))), "holds no area"),
        (json.dumps(polygon((0, 0), (90_000, 0), (90_000, 50_000))), "it is of another image"),
        (json.dumps(polygon((-900, -900), (-5, -900), (-5, -5))), "it is of another image"),
        (json.dumps(polygon((0, 0), (float("nan"), 0), (3, 3))), "it is of another image|not GeoJSON"),
    ],
)
def test_faults_of_geojson_are_named(content, message, slide, tmp_path):
    (tmp_path / "a.geojson").write_text(content)
    with pytest.raises(InputError, match=f"--tissue .*{message}"):
        read_tissue(tmp_path / "a.geojson", overview(slide), 0.5)


def test_a_mask_image(slide, tmp_path):
    mask = np.zeros((250, 350), np.uint8)
    mask[50:150, 30:130] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    tissue = read_tissue(tmp_path / "mask.png", overview(slide), 0.5)
    rows, columns = np.nonzero(tissue.pieces)
    np.testing.assert_allclose([columns.min() * 16, rows.min() * 16], [120, 200], atol=16)
    Image.fromarray(mask.T).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="a mask of another image"):
        read_tissue(tmp_path / "mask.png", overview(slide), 0.5)
    Image.fromarray(mask * 0).save(tmp_path / "mask.png")
    with pytest.raises(InputError, match="holds no area"):
        read_tissue(tmp_path / "mask.png", overview(slide), 0.5)
    with pytest.raises(InputError, match="no such file"):
        read_tissue(tmp_path / "none.png", overview(slide), 0.5)


def test_the_real_crop_is_tissue_but_for_its_glass():
    found = overview(CROP)
    tissue = find_tissue(found, 0.499)
    assert 0.6 < (tissue.pieces > 0).mean() < 0.95
