"""What a slide takes, refuses and hands to the model."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stpath_runtime import InputError, InputWarning, Slide
from stpath_runtime.slide import Patch


def slide(n: int = 4, **changes) -> Slide:
    given = {"coords": np.arange(2 * n).reshape(n, 2), "features": np.ones((n, 3), np.float32)}
    return Slide(**{**given, **changes})


def test_coordinates_are_normalised_each_axis_on_its_own():
    coords = np.array([[1000, 1000], [1400, 1000], [1300, 1173], [1500, 1346]])
    expected = [[0, 0], [80, 0], [60, 50], [100, 100]]
    np.testing.assert_allclose(slide(coords=coords).normalized_coords(), expected, atol=1e-12)


def test_the_golden_coordinates_are_the_published_ones(golden):
    for spots, found, _ in golden.slides():
        published = golden.arrays["normalized_coords"][spots]
        np.testing.assert_allclose(found.normalized_coords(), published, atol=1e-5)  # published in float32


@given(
    hnp.arrays(
        st.sampled_from([np.int32, np.int64, np.uint16, np.float16, np.float32, np.float64]),
        st.tuples(st.integers(1, 30), st.just(2)),
        elements=st.integers(0, 2000),
    )
)
def test_any_coordinates_normalise_to_0_100_and_are_left_as_they_are(coords):
    before = coords.copy()
    found = slide(len(coords), coords=coords).normalized_coords()
    assert np.isfinite(found).all()
    for axis in range(2):
        assert found[:, axis].min() == 0
        assert found[:, axis].max() == (100 if np.ptp(coords[:, axis].astype(float)) > 0 else 0)
    np.testing.assert_array_equal(coords, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_features_of_any_float_type(dtype):
    assert slide(features=np.ones((4, 3), dtype)).features.dtype == dtype


@pytest.mark.parametrize(
    "barcodes", [list("abcd"), [b"a", b"b", b"c", b"d"], np.array([[b"a"], [b"b"], [b"c"], [b"d"]])]
)
def test_barcodes_of_text_or_bytes(barcodes):
    assert slide(barcodes=barcodes).obs_names == list("abcd")


def test_names_take_their_usual_spelling():
    found = slide(organ="kidney", technology="visium-hd")
    assert (found.organ, found.technology, found.barcodes) == ("Kidney", "Visium HD", ["0", "1", "2", "3"])
    assert slide().organ == "Others"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.ones((3, 3), np.float32)}, "3 rows of features but 4 of coordinates"),
        ({"coords": np.ones((4, 3))}, r"\[4, 3\]"),
        ({"coords": np.ones(4)}, r"shape \[4\]"),
        ({"coords": np.array([["a", "b"]] * 4)}, "expected numbers"),
        ({"features": np.full((4, 3), np.nan)}, "12 values of the features are NaN or infinite .* the first at spot 0"),
        ({"coords": np.array([[0, 1], [1, 2], [np.inf, 2], [3, 3]])}, "1 value of the coordinates is .* spot 2"),
        ({"features": np.full((4, 3), 1e300)}, "NaN or infinite .in float32"),
        ({"coords": np.full((4, 2), 1e300)}, "NaN or infinite .in float32"),
        ({"barcodes": ["a", "b", "c", "d\0"]}, "not a name"),
        ({"barcodes": ["a", "b"]}, "2 barcodes for 4 spots"),
        ({"barcodes": ["a", "b", "c", "b"]}, "'b' stands twice"),
        ({"organ": "Kidny"}, "did you mean Kidney"),
        ({"technology": "Visum"}, "did you mean Visium"),
        ({"coords": np.ones((0, 2)), "features": np.ones((0, 3))}, "no spots"),
    ],
)
def test_a_faulty_slide_is_refused_with_what_and_where(changes, message):
    with pytest.raises(InputError, match=message):
        slide(name="s1", **changes)
    with pytest.raises(InputError, match="s1"):
        slide(name="s1", **changes)


@pytest.mark.parametrize(
    ("pixels", "magnification", "warns"),
    [(224, 20, False), (256, 20, False), (512, 20, True), (112, 20, True), (448, 40, False)],
)
def test_a_patch_scale_far_from_the_published_one_warns(pixels, magnification, warns):
    patch = Patch(pixels, magnification)
    with pytest.warns(InputWarning, match=rf"patches are {patch.microns:.0f} um wide") if warns else nullcontext():
        found = slide(patch=patch)
    assert found.patch.microns == pixels * 10 / magnification
