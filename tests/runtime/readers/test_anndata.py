"""AnnData as h5ad and zarr: slides, contexts and predictions."""

from __future__ import annotations

import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_helpers import BARCODES, COORDS, FEATURES, make_anndata, read_prediction, write_anndata, write_hdf5
from scipy.sparse import csc_matrix, csr_matrix

from stpath_runtime import InputError, read_slide
from stpath_runtime.readers import read_context
from stpath_runtime.slides.vocabulary import GeneVocabulary

GENES = GeneVocabulary(["ENSG01", "ENSG02"], ["A", "B"], [[], []])

KINDS = ("s.h5ad", "s.v2.zarr", "s.v3.zarr", "s.v2.zarr.zip", "s.v3.zarr.zip")


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def test_features_in_x_or_in_obsm(kind, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / kind)
    slide = read_slide(path, organ="Breast")
    np.testing.assert_array_equal(slide.features, FEATURES)
    np.testing.assert_array_equal(slide.coords, COORDS)
    assert (slide.obs_names, slide.organ, slide.patch) == (BARCODES, "Breast", None)
    np.testing.assert_array_equal(read_slide(path, features_key="gigapath").features, FEATURES * 2)
    with pytest.raises(
        InputError, match=r"no obsm\['gigpath'\] \(did you mean gigapath\?\); obsm holds: gigapath \[5, 8\]"
    ):
        read_slide(path, features_key="gigpath")


def test_the_name_of_a_store_tells_nothing(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr.zip")
    assert read_slide(shutil.copy(path, tmp_path / "s.h5")).obs_names == BARCODES
    folder = write_anndata(make_anndata(), tmp_path / "s.v2.zarr")
    assert read_slide(folder.rename(tmp_path / "s.h5ad")).obs_names == BARCODES


def test_only_what_is_needed_is_read(kind, tmp_path):
    """Elements that anndata cannot read, beside those that are needed."""
    path = write_anndata(make_anndata(), tmp_path / kind.removesuffix(".zip"))
    group = h5py.File(path, "a") if kind == "s.h5ad" else zarr.open_group(path, mode="a", use_consolidated=False)
    for name in ("uns", "layers", "obs/score", "obsm/uni"):
        group[name].attrs["encoding-type"] = "of another world"
    if kind == "s.h5ad":
        group.close()
    assert read_slide(path).obs_names == BARCODES


@pytest.mark.parametrize("spots", [COORDS.astype(np.int32), pd.DataFrame(COORDS, BARCODES, ["x", "y"])])
def test_coordinates_as_integers_or_a_table(spots, kind, tmp_path):
    adata = make_anndata()
    adata.obsm["spatial"] = spots
    np.testing.assert_array_equal(read_slide(write_anndata(adata, tmp_path / kind)).coords, COORDS)


def test_one_spot_at_the_origin(kind, tmp_path):
    """zarr writes no chunk of zeros."""
    adata = make_anndata()[:1].copy()
    adata.obsm["spatial"] = np.zeros((1, 2))
    np.testing.assert_array_equal(read_slide(write_anndata(adata, tmp_path / kind)).coords, [[0, 0]])


def test_without_coordinates(kind, tmp_path):
    adata = make_anndata()
    del adata.obsm["spatial"]
    with pytest.raises(
        InputError, match=r"no coordinates; expected obsm\['spatial'\] \[N, 2\], found in obsm: gigapath"
    ):
        read_slide(write_anndata(adata, tmp_path / kind))


def test_without_x(kind, tmp_path):
    adata = AnnData(obs=pd.DataFrame(index=BARCODES), obsm=dict(make_anndata().obsm))
    path = write_anndata(adata, tmp_path / kind)
    with pytest.raises(InputError, match=r"no X; say which of obsm are the features.*gigapath \[5, 8\]"):
        read_slide(path)
    assert read_slide(path, features_key="uni").features.shape == (5, 3)


@pytest.mark.parametrize("sparse", [csr_matrix, csc_matrix])
def test_sparse_features(sparse, kind, tmp_path):
    filled, counts = FEATURES * (FEATURES > 0), np.eye(5, 100, dtype=np.float32)
    adata = AnnData(sparse(counts), obs=pd.DataFrame(index=BARCODES), obsm=dict(make_anndata().obsm))
    adata.obsm["filled"] = sparse(filled)
    path = write_anndata(adata, tmp_path / kind)
    np.testing.assert_array_equal(read_slide(path, features_key="filled").features, filled)
    with pytest.raises(InputError, match=r"'X' is sparse and 1.0% filled, as counts are.*gigapath \[5, 8\]"):
        read_slide(path)


def test_context(kind, tmp_path):
    for counts in (np.arange(6).reshape(2, 3).astype(np.float32), csr_matrix(np.eye(2, 3, dtype=np.float32))):
        adata = AnnData(counts, obs=pd.DataFrame(index=["a", "b"]), var=pd.DataFrame(index=["G1", "G2", "G3"]))
        path = write_anndata(adata, tmp_path / kind)
        context = read_context(path)
        assert (list(context.ids), list(context.genes)) == (["a", "b"], ["G1", "G2", "G3"])
        np.testing.assert_array_equal(csr_matrix(context.counts).toarray(), csr_matrix(counts).toarray())
        shutil.rmtree(path) if path.is_dir() else path.unlink()


NUMBERS = st.integers(-(2**62), 2**62)
INDEXES = {
    "numbers": st.lists(NUMBERS, min_size=5, max_size=5, unique=True),
    "floats": st.lists(st.integers(-99, 99).map(lambda n: n / 4), min_size=5, max_size=5, unique=True),
    "text": st.lists(
        st.sampled_from(["0", "1", "2", "3", "NA", "nan", "None", "", "été", "é", "a b", "1.0", "True"]),
        min_size=5,
        max_size=5,
        unique=True,
    ),
}


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(["h5ad", "v2.zarr", "v3.zarr"]), index=st.one_of(*INDEXES.values()), data=st.data())
def test_a_name_of_a_file_is_never_a_position(kind, index, data, tmp_path_factory):
    """Names of slide and context as text, whatever anndata writes them as, and each spot's own counts."""
    folder = tmp_path_factory.mktemp("names")
    adata = make_anndata()
    adata.obs.index = index
    slide = read_slide(write_anndata(adata, folder / f"slide.{kind}"))
    assert slide.obs_names == [str(name) for name in index]
    rows = data.draw(st.lists(st.integers(0, 4), min_size=1, unique=True))
    counts = AnnData(np.array(rows, "f4")[:, None] + 1, var=pd.DataFrame(index=["A"]))
    counts.obs.index = [index[row] for row in rows]
    context = read_context(write_anndata(counts, folder / f"context.{kind}"))
    resolved = context.resolve(slide, GENES)
    assert resolved.spots.tolist() == rows
    np.testing.assert_allclose(resolved.log_counts.toarray()[:, 0], np.log1p(np.array(rows) + 1), rtol=1e-6)


def test_prediction(kind, tmp_path):
    adata = AnnData(FEATURES, obs=pd.DataFrame(index=BARCODES), uns={"stpath": {"engine": "e", "neighbors": 8}})
    adata.obsm["spatial"] = COORDS
    found = read_prediction(write_anndata(adata, tmp_path / kind))
    np.testing.assert_array_equal(found.X, FEATURES)
    assert dict(found.uns["stpath"]) == {"engine": "e", "neighbors": 8}
    assert list(found.obs_names) == BARCODES


@pytest.mark.parametrize(
    ("uns", "spatial", "message"),
    [
        ({}, None, "not a prediction by stpath predict"),
        ({"stpath": {}}, None, "not a prediction by stpath predict"),
        ({"stpath": "text"}, COORDS, "not a prediction by stpath predict"),
    ],
)
def test_files_that_are_no_prediction(uns, spatial, message, kind, tmp_path):
    adata = AnnData(FEATURES, obs=pd.DataFrame(index=BARCODES), uns=uns)
    if spatial is not None:
        adata.obsm["spatial"] = spatial
    with pytest.raises(InputError, match=message):
        read_prediction(write_anndata(adata, tmp_path / kind))


def test_files_that_are_no_context(tmp_path):
    for read, what in ((read_context, "context counts"), (read_prediction, "a prediction")):
        with pytest.raises(InputError, match=f"missing.h5ad: no such file; expected {what}"):
            read(tmp_path / "missing.h5ad")
        (tmp_path / "bad.h5ad").write_text("counts")
        with pytest.raises(InputError, match=rf"bad.h5ad: not an HDF5 file.*expected {what}"):
            read(tmp_path / "bad.h5ad")
    path = write_hdf5(tmp_path / "s.h5", features=FEATURES, coords=COORDS)
    with pytest.raises(
        InputError, match=r"s.h5: not an AnnData; expected context counts in h5ad or zarr, found: coords"
    ):
        read_context(path)
    with pytest.raises(InputError, match="s.h5: not a prediction by stpath predict"):
        read_prediction(path)
    path = write_anndata(AnnData(obs=pd.DataFrame(index=["a"])), tmp_path / "no_x.h5ad")
    with pytest.raises(InputError, match="holds no X"):
        read_context(path)


def test_a_damaged_index(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.h5ad")
    with h5py.File(path, "a") as file:
        del file["obs"].attrs["_index"]
        del file["var/_index"]
        file["var/_index"] = "one"
    with pytest.raises(InputError, match="'obs' is not a table with an index"):
        read_slide(path)
    with pytest.raises(InputError, match="'obs' is not a table with an index"):
        read_context(path)
    with h5py.File(path, "a") as file:
        file["obs"].attrs["_index"] = "_index"
    with pytest.raises(InputError, match="'var' is not a table with an index"):
        read_context(path)
