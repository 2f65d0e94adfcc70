"""What a slide takes, refuses and hands to the model."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from stpath_runtime import InputError, InputWarning, Slide, read_slide
from stpath_runtime.slides.slide import Patch


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


@pytest.mark.filterwarnings("ignore:.*at one place")
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


TYPES = ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8", "<i4", ">i4", "|u1", ">u2"]
HANDED_OVER = {
    "as it is": lambda array: array,
    "in Fortran's order": np.asfortranarray,
    "a part of another": lambda array: np.concatenate([array, array], axis=1)[:, : array.shape[1]],
    "a table": pd.DataFrame,
    "a matrix": np.asmatrix,
    "sparse": sparse.csc_array,
}


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(np.int64, st.tuples(st.integers(1, 9), st.integers(2, 5)), elements=st.integers(0, 200)),
    dtype=st.sampled_from(TYPES),
    way=st.sampled_from(list(HANDED_OVER)),
    writeable=st.booleans(),
)
def test_arrays_as_libraries_hand_them_are_made_native_and_own(values, dtype, way, writeable):
    given_array = values.astype(dtype)
    if way == "sparse" and (dtype == "<f2" or not given_array.dtype.isnative):
        way = "as it is"  # scipy makes none of these
    handed = HANDED_OVER[way](given_array)
    if isinstance(handed, np.ndarray):
        handed.flags.writeable = writeable
    found = Slide(coords=values[:, :2].astype(dtype), features=handed)
    for array in (found.coords, found.features):
        assert array.dtype.isnative
        assert array.flags.c_contiguous
        assert not array.flags.writeable
    np.testing.assert_array_equal(found.features, values)
    np.testing.assert_array_equal(found.coords, values[:, :2])
    np.testing.assert_array_equal(given_array, values)
    if isinstance(handed, np.ndarray):
        assert handed.flags.writeable == writeable
        if writeable:
            handed[...] = 0
            np.testing.assert_array_equal(found.features, values)  # a later change is not the slide's


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ma.masked_equal([[1.0, 9.0], [9.0, 2.0]], 9), "features are not an array of numbers .2 entries are masked"),
        (torch.ones(2, 2, requires_grad=True), "detach"),
        (torch.ones(2, 2, dtype=torch.bfloat16), "BFloat16"),
        ([[1, 2], [3]], "not an array of numbers"),
        (pd.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]}), "type object"),
    ],
)
def test_features_that_are_none(features, message):
    with pytest.raises(InputError, match=message):
        Slide([[0, 0], [1, 1]], features)


def test_masked_arrays_without_a_masked_entry_and_nullable_tables_are_arrays():
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    for features in (np.ma.array(values), pd.DataFrame(values).astype("Float32"), torch.tensor(values)):
        np.testing.assert_array_equal(Slide(np.ma.array(values), features).features, values)


def test_a_path_is_no_anndata():
    with pytest.raises(InputError, match="expected an AnnData, got str; read_slide reads files"):
        Slide.from_anndata("s.h5ad")


def test_an_array_that_nobody_writes_to_is_not_copied():
    features = np.ones((4, 3), np.float32)
    features.flags.writeable = False
    assert slide(features=features).features is features
    again = dataclasses.replace(slide(features=features), organ="Brain")
    assert again.features is features


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("key", [None, "uni"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_an_anndata_in_memory_is_what_its_file_is(backed, key, form, tmp_path):
    rng = np.random.default_rng(0)
    features, coords = rng.standard_normal((12, 7)).astype(np.float32), rng.integers(0, 999, (12, 2))
    obsm = {"spatial": coords, "uni": features[:, :3].astype(np.float64)}
    adata = AnnData(form(features), obs=pd.DataFrame(index=[f"s{i}" for i in range(12)]), obsm=obsm)[2:]
    adata.copy().write_h5ad(tmp_path / "s.h5ad")
    read = read_slide(tmp_path / "s.h5ad", features_key=key, organ="kidney")
    held = anndata.read_h5ad(tmp_path / "s.h5ad", backed="r") if backed else adata
    made = Slide.from_anndata(held, features_key=key, organ="kidney")
    np.testing.assert_array_equal(made.features, read.features)
    np.testing.assert_array_equal(made.coords, read.coords)
    assert (made.barcodes, made.organ, made.features.dtype) == (read.barcodes, "Kidney", read.features.dtype)


@pytest.mark.parametrize(
    ("changed", "key", "message"),
    [
        ({"obsm": {}}, None, r"no coordinates; expected obsm\['spatial'\]"),
        ({}, "unii", r"no obsm\['unii'\] .did you mean uni"),
        ({"X": None}, None, r"no X; say which of obsm .* uni \[12, 3\]"),
        ({"X": sparse.random(12, 99, 0.02, "csr", "f4")}, None, "2.0% filled, as counts are.*uni"),
    ],
)
def test_an_anndata_that_is_no_slide(changed, key, message):
    parts = {"X": np.ones((12, 4), np.float32), "obsm": {"spatial": np.eye(12, 2), "uni": np.ones((12, 3))}}
    with pytest.raises(InputError, match=message):
        Slide.from_anndata(AnnData(**(parts | changed)), features_key=key)


def test_slides_that_are_hardly_meant_warn_once():
    features, coords = np.ones((20, 3), np.float32), np.arange(40).reshape(20, 2)
    features[10:] = 0
    with pytest.warns(InputWarning, match="the features of 10 of its 20 spots are all zero") as caught:
        slide(20, features=features, coords=coords)
    assert len(caught) == 1
    with pytest.warns(InputWarning, match=r"all 20 spots are at one place \(7, 8\)") as caught:
        slide(20, features=np.ones((20, 3)), coords=np.full((20, 2), [7, 8]))
    assert len(caught) == 1


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
        ({"features": np.array([[0.0], [-np.inf], [1], [2]])}, "1 value of the features is NaN or infinite .* spot 1"),
        ({"coords": np.full((4, 2), 1e300)}, "NaN or infinite .in float32"),
        ({"barcodes": ["a", "b", "c", "d\0"]}, "not a name"),
        ({"barcodes": ["a", "b"]}, "2 barcodes for 4 spots"),
        ({"barcodes": ["a", "b", "c", "b"]}, "'b' appears twice"),
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
