"""Files that would make us run code, read other files or fill the memory: refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile

import h5py
import numcodecs.pickles
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from anndata import AnnData
from readers_helpers import (
    BARCODES,
    COORDS,
    FEATURES,
    HDF5_FAULTS,
    HUGE,
    make_anndata,
    read_prediction,
    write_anndata,
    write_hdf5,
    write_spatialdata,
)

from stpath_runtime import InputError, read_slide
from stpath_runtime.readers import read_context, sources


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch):
    def fail(*_args, **_kwargs):
        raise AssertionError("unpickled")

    for module, name in ((pickle, "loads"), (pickle, "load"), (numcodecs.pickles.Pickle, "decode")):
        monkeypatch.setattr(module, name, fail)


def assert_refused(path, message, read=read_slide):
    with pytest.raises(InputError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("as_archive", [True, False])
def test_pytorch_files_are_not_unpickled(as_archive, tmp_path):
    for name in ("s.pt", "s.h5"):
        torch.save(torch.ones(5, 8), tmp_path / name, _use_new_zipfile_serialization=as_archive)
        assert_refused(tmp_path / name, "a PyTorch file .*holds no coordinates, and is not unpickled: give the .h5")


def edit(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("array", ["X", "obs/score", "layers/raw"])
@pytest.mark.parametrize("codec", ["pickle", "json2", "msgpack2", "categorize", "of another world"])
@pytest.mark.parametrize("where", ["filters", "compressor"])
def test_codecs_of_zarr_2(where, codec, array, tmp_path):
    """In arrays that are read, and in those that are not."""
    path = write_anndata(make_anndata(layers={"raw": FEATURES}), tmp_path / "s.v2.zarr")
    edit(path / array / ".zarray", {where: [{"id": codec}] if where == "filters" else {"id": codec}})
    assert_refused(path, f"'{array}/.zarray' names the codec '{codec}', which is not read")
    archive = shutil.make_archive(str(tmp_path / "s"), "zip", path)
    assert_refused(archive, f"names the codec '{codec}'")


@pytest.mark.parametrize(
    "codecs",
    [
        [{"name": "bytes"}, {"name": "numcodecs.pickle", "configuration": {}}],
        ["bytes", "pickle"],
        [{"id": "zstd", "name": "numcodecs.pickle"}],
        [
            {
                "name": "sharding_indexed",
                "configuration": {"chunk_shape": [5, 8], "codecs": [{"name": "numcodecs.json2"}]},
            }
        ],
        [{"name": "sharding_indexed", "configuration": {"index_codecs": ["msgpack2"]}}],
    ],
)
def test_codecs_of_zarr_3(codecs, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    edit(path / "obsm" / "uni" / "zarr.json", {"codecs": codecs})
    assert_refused(path, r"'obsm/uni/zarr.json' names the codec '(numcodecs\.)?(pickle|json2|msgpack2)'")


def test_codecs_in_consolidated_metadata(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v2.zarr")
    found = json.loads((path / ".zmetadata").read_text())
    found["metadata"]["X/.zarray"]["filters"] = [{"id": "pickle"}]
    (path / ".zmetadata").write_text(json.dumps(found))
    assert_refused(path, "'.zmetadata' names the codec 'pickle'")
    path = write_spatialdata(tmp_path / "s.zarr")
    found = json.loads((path / "zarr.json").read_text())
    found["consolidated_metadata"]["metadata"]["tables/gigapath_tiles/X"]["codecs"] = [{"name": "pickle"}]
    (path / "zarr.json").write_text(json.dumps(found))
    assert_refused(path, "'zarr.json' names the codec 'pickle'")


@pytest.mark.parametrize("dtype", ["|O", [["a", "<f4"], ["b", "|O"]], 7])
def test_objects_in_zarr(dtype, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v2.zarr")
    edit(path / "X" / ".zarray", {"dtype": dtype})
    assert_refused(path, "'X/.zarray' stores objects")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "9" * 5000, '{"codecs": 7}', '{"codecs": [[7]]}'])
def test_damaged_metadata(text, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    (path / "obsm" / "uni" / "zarr.json").write_text(text)
    assert_refused(path, "'obsm/uni/zarr.json' cannot be read; it is truncated or damaged")


def test_links_out_of_a_zarr_folder(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    chunk = path / "X" / "c" / "0" / "0"
    inside = chunk.rename(path / "X" / "chunk")
    chunk.symlink_to(inside)  # a link within the folder is fine
    np.testing.assert_array_equal(read_slide(path).features, FEATURES)
    chunk.unlink()
    chunk.symlink_to(inside.rename(tmp_path / "chunk"))
    with pytest.raises(InputError, match="X/c/0/0: a link out of the zarr folder"):
        read_slide(path)
    chunk.unlink()
    (tmp_path / "folder").mkdir()
    (path / "layers" / "away").symlink_to(tmp_path / "folder")
    with pytest.raises(InputError, match="layers/away: a link out of the zarr folder"):
        read_slide(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    os.mkfifo(path / "X" / "pipe")
    with pytest.raises(InputError, match="X/pipe: neither a file nor a folder"):
        read_slide(path)
    os.mkfifo(tmp_path / "s.h5")
    assert_refused(tmp_path / "s.h5", "not a file")


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "X/../../outside", "..\\outside"])
def test_archives_with_names_that_leave_them(name, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"1")
    assert_refused(path, "a name that leaves it")


def test_archives_that_are_bombs(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr.zip")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("X/c/9/9", bytes(100 * 2**20))
    assert_refused(path, r"the archive declares 104,\d+,\d+ bytes")


def test_archives_with_a_name_of_nothing(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr.zip")
    with zipfile.ZipFile(path, "a") as archive:
        entry = zipfile.ZipInfo("x")
        entry.filename = ""
        archive.writestr(entry, b"1")
    assert_refused(path, "the file cannot be read; it is truncated or damaged")


def test_archives_of_something_else(tmp_path):
    path = tmp_path / "s.zarr.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "text")
    assert_refused(path, "a zip archive without a zarr store")
    write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    nested = shutil.make_archive(str(tmp_path / "nested"), "zip", tmp_path, "s.v3.zarr")
    assert_refused(nested, "an archive of the folder 's.v3.zarr'; zip what is in it")


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [HUGE, 8]},
        {"shape": [2**24, 1], "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 1]}}},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [HUGE, 8]}}},
    ],
)
def test_arrays_of_zarr_that_declare_what_they_do_not_store(changes, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.v3.zarr")
    edit(path / "X" / "zarr.json", changes)
    assert_refused(path, "'X' declares .* bytes in .* chunks but stores")
    assert_refused(path, "'X' declares", read_context)
    assert len(read_slide(path, features_key="uni")) == 5  # what is not read does no harm


@pytest.mark.parametrize("codec", ["zstd", "sharding"])
def test_arrays_of_many_chunks_are_read(codec, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MANY_CHUNKS", 100)
    features = np.random.default_rng(0).standard_normal((300, 2), np.float32)
    adata = AnnData(features)
    adata.obsm["spatial"] = np.arange(600).reshape(-1, 2)
    path = write_anndata(adata, tmp_path / "s.v3.zarr")
    shards = {"chunks": (1, 2), "shards": (100, 2)} if codec == "sharding" else {"chunks": (1, 2)}
    array = zarr.open_group(path, mode="a", use_consolidated=False).create_array(
        "X", data=features, overwrite=True, attributes={"encoding-type": "array", "encoding-version": "0.2.0"}, **shards
    )
    assert array.chunks == (1, 2)
    np.testing.assert_array_equal(read_slide(path).features, features)


MESSAGES = {
    "external link": "is a link to another file",
    "soft link through an external one": "'away' is a link to another file",
    "external storage": "keeps its data in another file",
    "virtual": "keeps its data in another file",
    "huge, in chunks": r"declares [\d,]+ bytes in 1,073,741,824 chunks but stores 0",
    "huge": r"declares 2,147,483,648 bytes in 1 chunks but stores 0",
    "many chunks": "16,777,216 chunks",
    "huge chunks": "declares 3,758,096,384 bytes",
    "compound": "expected numbers or text",
    "opaque": "expected numbers or text",
    "ragged": "expected numbers or text",
    "references": "expected numbers or text",
    "circle": "as if its links form a circle|is a group; expected a dataset",
    "nowhere": "cannot be read",
}


def fault(path, key, name):
    """Put a fault in the place of an element."""
    with h5py.File(path, "a") as file:
        group, element = file[key.rpartition("/")[0] or "/"], key.rpartition("/")[2]
        if element in group:
            del group[element]
        HDF5_FAULTS[name](group, element)
    return MESSAGES[name]


@pytest.mark.parametrize("name", HDF5_FAULTS)
@pytest.mark.parametrize("key", ["features", "coords", "barcodes"])
def test_faults_in_files_of_features(key, name, tmp_path):
    path = write_hdf5(tmp_path / "s.h5", features=FEATURES, coords=COORDS, barcodes=BARCODES)
    assert_refused(path, fault(path, key, name))


@pytest.mark.parametrize("name", HDF5_FAULTS)
@pytest.mark.parametrize("key", ["X", "obsm/spatial", "obs/_index"])
def test_faults_in_h5ad(key, name, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.h5ad")
    assert_refused(path, fault(path, key, name))


@pytest.mark.parametrize("name", HDF5_FAULTS)
def test_faults_anywhere_in_a_prediction(name, tmp_path):
    adata = make_anndata(uns={"stpath": {"engine": "e"}})
    path = write_anndata(adata, tmp_path / "s.h5ad")
    assert_refused(path, fault(path, "uns/stpath/engine", name), read_prediction)


def test_faults_of_what_is_not_read_do_no_harm(tmp_path):
    for name in ("virtual", "external storage", "huge", "compound", "circle"):
        path = write_anndata(make_anndata(), tmp_path / "s.h5ad")
        fault(path, "obsm/uni", name)
        assert len(read_slide(path)) == 5


def test_files_of_endless_links(tmp_path):
    """A few groups that hold each other many times over."""
    path = write_anndata(make_anndata(uns={"stpath": {"engine": "e"}}), tmp_path / "s.h5ad")
    with h5py.File(path, "a") as file:
        group = file["uns/stpath"]
        for level in range(12):
            inner = group.require_group(f"level{level}")
            for i in range(10):
                group[f"link{i}"] = inner
            group = inner
    assert_refused(path, "has more than 2,000 elements or 32 levels", read_prediction)


@pytest.mark.parametrize("shape", [[10**12, 8], [5, 10**12], [-5, 8], [5], [5, 8, 2]])
@pytest.mark.parametrize("kind", ["s.h5ad", "s.v3.zarr"])
def test_sparse_matrices_that_declare_what_they_do_not_hold(shape, kind, tmp_path):
    from scipy.sparse import csr_matrix

    path = write_anndata(make_anndata(X=csr_matrix(FEATURES)), tmp_path / kind)
    file = h5py.File(path, "a") if kind == "s.h5ad" else zarr.open_group(path, mode="a", use_consolidated=False)
    file["X"].attrs["shape"] = shape
    if kind == "s.h5ad":
        file.close()
    assert_refused(path, r"'X' (has the shape|is sparse and 0.0% filled|cannot be read)")


@pytest.mark.parametrize("column", [10**9, -1])
def test_sparse_matrices_with_indices_outside(column, tmp_path):
    from scipy.sparse import csr_matrix

    path = write_anndata(make_anndata(X=csr_matrix(FEATURES)), tmp_path / "s.h5ad")
    with h5py.File(path, "a") as file:
        file["X/indices"][3] = column
    assert_refused(path, "'X' cannot be read")
    assert_refused(path, "'X' cannot be read", read_context)


@pytest.mark.parametrize("kind", ["s.v2.zarr", "s.v3.zarr"])
@pytest.mark.parametrize("key", ["X", "obsm/spatial"])
def test_zarr_that_lacks_a_chunk(key, kind, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / kind)
    (path / key / ("c/0/0" if "v3" in kind else "0.0")).unlink()
    assert_refused(path, f"'{key}' lacks 1 of its 1 chunks, which would be read as zeros")
    if key == "X":
        assert len(read_slide(path, features_key="uni")) == 5


@pytest.mark.parametrize("chunks", [(1, 8), None])
@pytest.mark.parametrize("key", ["features", "coords"])
def test_hdf5_of_a_writer_that_was_cut_off(key, chunks, tmp_path):
    whole = {"features": FEATURES, "coords": np.hstack([COORDS] * 4)} | {key: None}
    with h5py.File(tmp_path / "s.h5", "w") as file:
        for name, values in whole.items():
            dataset = file.create_dataset(name, (5, 8), "f4", chunks=chunks)
            if values is not None:
                dataset[:] = values
            elif chunks:
                dataset[:3] = 1
    lacks = "2 of its 5" if chunks else "1 of its 1"
    assert_refused(tmp_path / "s.h5", f"'{key}' lacks {lacks} chunks, which would be read as zeros")


def test_tables_of_tiles_that_are_bombs(tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr")
    tiles = path / "shapes" / "tiles" / "shapes.parquet"
    zeros = pa.array(np.zeros(5_000_000, np.int64))
    pq.write_table(pa.table({"tile_id": zeros, "x": zeros, "y": zeros}), tiles)
    assert tiles.stat().st_size < 100_000
    assert_refused(path, "'shapes/tiles/shapes.parquet' declares 120,000,000 bytes")


@pytest.mark.parametrize("length", [0, 8, 2**64 - 16])
def test_a_heap_of_texts_in_which_hdf5_would_walk_without_end(length, tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.h5ad")
    content = bytearray(path.read_bytes())
    at = content.find(b"GCOL") + 16
    while content[at : at + 2] != b"\0\0":  # up to the object that is what is free
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    content[at + 8 : at + 16] = length.to_bytes(8, "little")
    path.write_bytes(content)
    assert_refused(path, "damaged .an object of .* bytes in a heap of text")
