"""Features files as users have them, and files that are none."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
from anndata import AnnData

from stpath_runtime import InputError, read_slide
from stpath_runtime.readers import read_context

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((5, 8)).astype(np.float32)
COORDS = np.arange(10).reshape(5, 2) * 100


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
    return path


LAYOUTS = {
    "hest": {"embeddings": FEATURES, "coords": COORDS, "barcodes": np.array([[f"b{i}".encode()] for i in range(5)])},
    "trident": {"features": FEATURES.astype(np.float16), "coords": COORDS},
    "trident, batch axis": {"features": FEATURES[None].astype(np.float16), "coords": COORDS},
    "clam": {"features": FEATURES, "coords": COORDS.astype(np.int32)},
    "flat barcodes": {
        "features": FEATURES,
        "coords": COORDS,
        "barcode": np.array([f"b{i}".encode() for i in range(5)]),
    },
    "text barcodes": {"features": FEATURES, "coords": COORDS, "barcodes": [f"b{i}" for i in range(5)]},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    slide = read_slide(write(tmp_path / "s.h5", **LAYOUTS[layout]), organ="kidney", technology="Visium")
    np.testing.assert_array_equal(slide.coords, COORDS)
    np.testing.assert_allclose(slide.features, FEATURES, atol=2e-3)
    assert list(slide.barcodes) == ([f"b{i}" for i in range(5)] if "barcode" in str(LAYOUTS[layout]) else list("01234"))
    assert (slide.organ, slide.technology) == ("Kidney", "Visium")


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"features": FEATURES}, "no coordinates; expected a dataset 'coords'"),
        ({"coords": COORDS}, "no features; expected a dataset 'embeddings' or 'features', found: coords"),
        ({}, "found: nothing"),
        ({"features": FEATURES, "coords": COORDS[:3]}, "5 rows of features but 3 of coordinates"),
        ({"features": FEATURES, "coords": COORDS, "barcodes": [b"\xff\xfe"] * 5}, "not text"),
        ({"features": FEATURES, "coords": COORDS, "barcodes": np.zeros(5, [("a", int)])}, "expected text"),
        ({"features": FEATURES, "coords": h5py.SoftLink("/nowhere")}, "truncated or damaged"),
        ({"features/inner": FEATURES, "coords": COORDS}, "'features' is a group"),
        ({"features": FEATURES, "coords": h5py.ExternalLink("other.h5", "/coords")}, "link to another file"),
    ],
)
def test_a_file_with_a_fault_is_refused_by_name(datasets, message, tmp_path):
    path = write(tmp_path / "s.h5", **datasets)
    with pytest.raises(InputError, match=message):
        read_slide(path)
    with pytest.raises(InputError, match="s.h5"):
        read_slide(path)


def test_files_that_are_no_hdf5(tmp_path):
    with pytest.raises(InputError, match=r"missing.h5: no such file"):
        read_slide(tmp_path / "missing.h5")
    with pytest.raises(InputError, match="a folder"):
        read_slide(tmp_path)
    text = tmp_path / "s.h5"
    text.write_text("spots")
    with pytest.raises(InputError, match="not an HDF5 file"):
        read_slide(text)
    tensor = tmp_path / "s.pt"
    tensor.write_bytes(b"PK")
    with pytest.raises(InputError, match="holds no coordinates"):
        read_slide(tensor)


def test_a_truncated_file_is_refused(tmp_path):
    path = write(tmp_path / "s.h5", **LAYOUTS["hest"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"truncated|not an HDF5"):
        read_slide(path)


def test_context_files(tmp_path):
    AnnData(np.ones((2, 3), np.float32)).write_h5ad(tmp_path / "c.h5ad")
    context = read_context(tmp_path / "c.h5ad")
    assert (list(context.ids), list(context.genes)) == (["0", "1"], ["0", "1", "2"])
    with pytest.raises(InputError, match="no such file"):
        read_context(tmp_path / "missing.h5ad")
    (tmp_path / "bad.h5ad").write_text("counts")
    with pytest.raises(InputError, match=r"bad.h5ad: cannot be read as h5ad"):
        read_context(tmp_path / "bad.h5ad")
