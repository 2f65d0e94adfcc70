"""Files of features in HDF5, as HEST, STPath, TRIDENT and CLAM write them, and files with faults."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_helpers import BARCODES, COORDS, FEATURES, TRIDENT_COORDS, write_hdf5, write_trident

from stpath_runtime import InputError, InputWarning, read_slide
from stpath_runtime.slides.slide import Patch

LAYOUTS = {
    "hest": {"embeddings": FEATURES, "coords": COORDS, "barcodes": np.array([[b.encode()] for b in BARCODES])},
    "trident": {"features": FEATURES.astype(np.float16), "coords": COORDS},
    "trident, batch axis": {"features": FEATURES[None].astype(np.float16), "coords": COORDS},
    "clam": {"features": FEATURES, "coords": COORDS.astype(np.int32)},
    "flat barcodes": {"features": FEATURES, "coords": COORDS, "barcode": np.array([b.encode() for b in BARCODES])},
    "text barcodes": {"features": FEATURES, "coords": COORDS, "barcodes": BARCODES},
    "text barcodes [N, 1]": {"features": FEATURES, "coords": COORDS, "barcodes": [[b] for b in BARCODES]},
    "soft link": {"data": FEATURES, "features": h5py.SoftLink("/data"), "coords": COORDS},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    slide = read_slide(write_hdf5(tmp_path / "s.h5", **LAYOUTS[layout]), organ="kidney", technology="Visium")
    np.testing.assert_array_equal(slide.coords, COORDS)
    np.testing.assert_allclose(slide.features, FEATURES, atol=2e-3)
    assert list(slide.barcodes) == (BARCODES if "barcode" in str(LAYOUTS[layout]) else list("01234"))
    assert (slide.organ, slide.technology, slide.patch) == ("Kidney", "Visium", None)


def test_the_name_of_a_file_tells_nothing(tmp_path):
    path = write_hdf5(tmp_path / "features.zarr", **LAYOUTS["hest"])
    assert read_slide(path).obs_names == BARCODES
    (tmp_path / "s.h5").write_text("spots")
    with pytest.raises(InputError, match="not an HDF5 file"):
        read_slide(tmp_path / "s.h5")


def test_the_patches_of_trident(tmp_path):
    slide = read_slide(write_trident(tmp_path / "s.h5"))
    assert slide.patch == Patch(256, 20, 512, 40)
    np.testing.assert_array_equal(slide.coords, COORDS)
    attributes = {name: value for name, value in TRIDENT_COORDS.items() if "level0" not in name}
    assert read_slide(write_trident(tmp_path / "t.h5", attributes=attributes)).patch == Patch(256, 20)
    assert read_slide(write_trident(tmp_path / "u.h5", attributes={"patch_size": 256})).patch is None


def test_patches_far_from_the_published_size_warn(tmp_path):
    path = write_trident(tmp_path / "s.h5", attributes=TRIDENT_COORDS | {"patch_size": 512})
    with pytest.warns(InputWarning, match=r"s.h5: its patches are 256 um wide"):
        assert read_slide(path).patch == Patch(512, 20, 512, 40)


CROPPED = TRIDENT_COORDS | {"patch_size": 224, "patch_size_level0": 448}


@pytest.mark.parametrize(
    ("folder", "encoder", "savetodir"),
    [
        (".", "gigapath", "out"),
        (".", "prov-GigaPath", "out"),
        (".", None, "out/20x_224px_0px_overlap/features_gigapath"),
        ("features_gigapath", None, "out"),
        (".", None, "out"),  # by the width of 1,536 alone
    ],
)
def test_patches_that_trident_cropped_for_gigapath_warn(folder, encoder, savetodir, tmp_path):
    (tmp_path / folder).mkdir(exist_ok=True)
    wide = np.zeros((5, 1536 if encoder is None else 8), np.float32)
    attributes = CROPPED | {"savetodir": savetodir}
    path = write_trident(tmp_path / folder / "s.h5", wide, attributes=attributes, encoder=encoder)
    with pytest.warns(InputWarning, match=r"s.h5: patches of 224 pixels by TRIDENT.* saw 98 um, not 112"):
        read_slide(path)


@pytest.mark.parametrize("encoder", ["uni_v1", "hoptimus1"])
def test_patches_for_other_encoders_are_whole(encoder, tmp_path):
    by_name = write_trident(tmp_path / "s.h5", np.zeros((5, 1536), np.float32), attributes=CROPPED, encoder=encoder)
    assert read_slide(by_name).patch == Patch(224, 20, 448, 40)
    (tmp_path / f"features_{encoder}").mkdir()
    by_folder = tmp_path / f"features_{encoder}" / "s.h5"
    write_trident(by_folder, np.zeros((5, 1536), np.float32), attributes=CROPPED, encoder=None)
    assert read_slide(by_folder).patch == Patch(224, 20, 448, 40)


def test_what_a_file_says_of_the_encoders_input_counts(tmp_path):
    path = write_trident(tmp_path / "s.h5", attributes=CROPPED | {"patch_encoder_img_size": 224})
    assert read_slide(path).patch == Patch(224, 20, 448, 40)
    path = write_trident(tmp_path / "t.h5", attributes=TRIDENT_COORDS | {"patch_encoder_img_size": 224})
    with pytest.warns(InputWarning, match=r"t.h5: its patches of 256 pixels were resized to 224 .* saw 0.57 um"):
        read_slide(path)


def test_features_of_our_own_tell_of_no_tool(tmp_path):
    path = write_trident(tmp_path / "s.h5", np.zeros((5, 1536), np.float32), attributes=CROPPED)
    with h5py.File(path, "r+") as file:
        file.attrs["preprocessing"] = "{}"
    assert read_slide(path).patch == Patch(224, 20, 448, 40)


def test_features_without_a_width_are_refused_in_one_line(tmp_path):
    path = write_trident(tmp_path / "s.h5", FEATURES[:, 0].copy(), attributes=CROPPED)
    with pytest.raises(InputError, match=r"s.h5: features have the shape \[5\]; expected \[N, F\]$"):
        read_slide(path)
    path = write_hdf5(tmp_path / "t.h5", attributes=CROPPED, features=np.float32(1), coords=COORDS)
    with pytest.raises(InputError, match=r"t.h5: features have the shape \[\]; expected \[N, F\]$"):
        read_slide(path)


NONSENSE = [0, -1, np.nan, np.inf, "None", "twenty", b"\xff", np.array([256, 256]), True, 1e300, np.uint64(2**63)]


@pytest.mark.parametrize("value", [*NONSENSE, h5py.Empty("f"), 256.5], ids=str)
def test_nonsense_of_trident_is_ignored_with_a_warning(value, tmp_path):
    path = write_trident(tmp_path / "s.h5", attributes=TRIDENT_COORDS | {"patch_size": value})
    with pytest.warns(InputWarning, match=r"s.h5: the attribute patch_size of 'coords' is .*; it is ignored$"):
        assert read_slide(path).patch is None


@pytest.mark.parametrize("value", NONSENSE, ids=str)
def test_nonsense_of_level_0_leaves_the_rest(value, tmp_path):
    path = write_trident(tmp_path / "s.h5", attributes=TRIDENT_COORDS | {"level0_magnification": value})
    with pytest.warns(InputWarning, match="level0_magnification"):
        assert read_slide(path).patch == Patch(256, 20, 512)


def test_attributes_in_arrays_of_one(tmp_path):
    attributes = {name: np.array([value]) for name, value in TRIDENT_COORDS.items() if isinstance(value, int)}
    assert read_slide(write_trident(tmp_path / "s.h5", attributes=attributes)).patch == Patch(256, 20, 512, 40)


def test_features_key_names_the_dataset(tmp_path):
    path = write_hdf5(tmp_path / "s.h5", embeddings=FEATURES, features=FEATURES * 2, uni=FEATURES * 3, coords=COORDS)
    with pytest.raises(InputError, match=r"coords \[5, 2\], embeddings \[5, 8\], .*say which are the features"):
        read_slide(path)
    np.testing.assert_array_equal(read_slide(path, features_key="features").features, FEATURES * 2)
    np.testing.assert_array_equal(read_slide(path, features_key="uni").features, FEATURES * 3)
    with pytest.raises(InputError, match=r"no dataset 'unni' \(did you mean uni\?\); it holds: coords \[5, 2\], "):
        read_slide(path, features_key="unni")


@settings(max_examples=30, deadline=None)
@given(
    spots=st.integers(1, 20),
    width=st.integers(1, 9),
    batch=st.booleans(),
    dtype=st.sampled_from(["<f2", "<f4", "<f8", ">f4"]),
    coords_dtype=st.sampled_from(["<i4", "<i8", "<u2", "<f4", "<f8"]),
    compression=st.sampled_from([None, "gzip", "lzf"]),
    data=st.data(),
)
def test_whatever_the_shapes_and_types(spots, width, batch, dtype, coords_dtype, compression, data, tmp_path_factory):
    names = data.draw(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
                               , min_size=spots, max_size=spots, unique=True))  # fmt: skip
    features = np.arange(spots * width).reshape(spots, width).astype(dtype)
    coords = np.arange(spots * 2).reshape(spots, 2).astype(coords_dtype)
    barcodes = np.array([name.encode() for name in names], object)
    if data.draw(st.booleans()):
        barcodes = barcodes[:, None]
    path = tmp_path_factory.mktemp("h5") / "s.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("features", data=features[None] if batch else features, compression=compression)
        file.create_dataset("coords", data=coords, compression=compression)
        file.create_dataset("barcodes", data=barcodes, dtype=h5py.string_dtype())
    slide = read_slide(path)
    np.testing.assert_array_equal(slide.features, features)
    np.testing.assert_array_equal(slide.coords, coords)
    assert slide.obs_names == names


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"features": FEATURES}, r"no coordinates; expected a dataset 'coords' \[N, 2\], found: features \[5, 8\]"),
        ({"coords": COORDS}, r"no features; expected a dataset 'embeddings' or 'features', found: coords \[5, 2\]"),
        ({}, "found: nothing"),
        ({"features": FEATURES, "coords": COORDS[:3]}, "5 rows of features but 3 of coordinates"),
        ({"features": FEATURES[None, None], "coords": COORDS}, r"features have the shape \[1, 1, 5, 8\]"),
        ({"features": FEATURES, "coords": COORDS, "barcodes": [b"\xff\xfe"] * 5}, "not text"),
        ({"features": FEATURES, "coords": COORDS, "barcodes": np.zeros(5)}, "barcodes are of type float64"),
        ({"features": FEATURES, "coords": h5py.SoftLink("/nowhere")}, "'coords' cannot be read"),
        ({"features/inner": FEATURES, "coords": COORDS}, "'features' is a group"),
        (
            {"img": np.zeros((5, 4, 4, 3), np.uint8), "coords": COORDS},
            r"image patches \('img' \[5, 4, 4, 3\]\).*stpath f",
        ),
    ],
)
def test_a_file_with_a_fault_is_refused_by_name(datasets, message, tmp_path):
    path = write_hdf5(tmp_path / "s.h5", **datasets)
    with pytest.raises(InputError, match=message):
        read_slide(path)
    with pytest.raises(InputError, match=r"^\S*s.h5: "):
        read_slide(path)


def test_names_of_several_lines_make_one(tmp_path):
    path = write_hdf5(tmp_path / "s.h5", **{"two\nlines": FEATURES})
    with pytest.raises(InputError, match=r"found: two lines \[5, 8\]$"):
        read_slide(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"missing.h5: no such file; expected features"):
        read_slide(tmp_path / "missing.h5")
    with pytest.raises(InputError, match="a folder, but not a zarr store"):
        read_slide(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match=r"not an HDF5 file, zarr folder or \.zarr\.zip; expected features in HDF5"):
        read_slide(tmp_path / "empty")


@pytest.mark.parametrize("kept", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused(kept, tmp_path):
    path = write_hdf5(tmp_path / "s.h5", **LAYOUTS["hest"])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(InputError, match="s.h5: the file cannot be read; it is truncated or damaged"):
        read_slide(path)
