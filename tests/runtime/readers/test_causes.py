"""What reading can raise, sorted by its cause: each has its own fix, and whole files are not called damaged."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
from readers_helpers import COORDS, FEATURES, make_anndata, write_anndata, write_hdf5

from stpath_runtime import InputError, InputWarning, read_slide
from stpath_runtime.errors import FileError, MemoryLimitError
from stpath_runtime.readers.sources import reading


def test_a_file_that_another_process_writes(tmp_path):
    path = write_hdf5(tmp_path / "s.h5", features=FEATURES, coords=COORDS)
    code = "import h5py, sys; file = h5py.File(sys.argv[1], 'r+'); print('open', flush=True); sys.stdin.read()"
    writer = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with writer:
        assert writer.stdout.readline() == b"open\n"
        with pytest.raises(InputError, match="another process has the file open to write it") as refused:
            read_slide(path)
        writer.stdin.close()
    assert "damaged" not in str(refused.value)
    assert len(read_slide(path)) == len(COORDS)


def test_a_filter_that_is_not_here(tmp_path):
    if h5py.h5z.filter_avail(32001):
        pytest.skip("this HDF5 has Blosc")
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["coords"] = COORDS
        made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        made.set_chunk(FEATURES.shape)
        made.set_filter(32001, h5py.h5z.FLAG_OPTIONAL, ())  # Blosc
        space = h5py.h5s.create_simple(FEATURES.shape)
        data = h5py.Dataset(h5py.h5d.create(file.id, b"features", h5py.h5t.IEEE_F32LE, space, made))
        data.id.write_direct_chunk((0, 0), FEATURES.astype("<f4").tobytes())
    with pytest.raises(InputError, match=r"is compressed by the filter .*\(32001\), .*HDF5_PLUGIN_PATH"):
        read_slide(tmp_path / "s.h5")


def test_an_element_of_a_newer_anndata(tmp_path):
    path = write_anndata(make_anndata(), tmp_path / "s.h5ad")
    with h5py.File(path, "a") as file:
        file["X"].attrs["encoding-version"] = "9.1.0"
    with pytest.raises(InputError, match=r"'X' is written in a way that .* does not know \(array 9.1.0\)"):
        read_slide(path)


def test_tables_of_an_old_anndata(tmp_path):
    with h5py.File(tmp_path / "s.h5ad", "w") as file:
        file["X"], file["obs"] = FEATURES, np.array([(b"a",)] * 5, [("index", "S1")])
        file["var"] = np.array([(b"f",)] * 8, [("index", "S1")])
    with pytest.raises(InputError, match="'obs' is an array of records, as anndata wrote before 0.8"):
        read_slide(tmp_path / "s.h5ad")


@pytest.mark.parametrize(
    ("error", "words", "kind"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), "may not be read (permission denied)", FileError),
        (OSError("Unable to open file (errno = 13, error message = 'Permission denied')"), "permission", FileError),
        (OSError(errno.EIO, "Input/output error"), "the disk or network that 'X' is on fails", FileError),
        (OSError(errno.ESTALE, "Stale file handle"), "try again, or copy it to this machine", FileError),
        (TimeoutError("timed out"), "the disk or network", FileError),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n 4096", FileError),
        (FileNotFoundError(errno.ENOENT, "No such file"), "is not there any more", FileError),
        (MemoryError("Unable to allocate 9 GiB"), "does not fit in memory", MemoryLimitError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "does not fit in memory", MemoryLimitError),
        (KeyError("x" * 300), f"it is truncated or damaged ('{'x' * 300}')", FileError),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_each_cause_has_its_own_fix(error, words, kind, wrapped, tmp_path):
    """Also where a library has raised an error of its own from it."""
    raised = error
    if wrapped and not isinstance(error, KeyError):
        raised = ValueError("Error raised while reading key 'X'")
        raised.__cause__ = error
    with pytest.raises(kind) as refused, reading(tmp_path / "s.h5ad", "'X'"):
        raise raised
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["v2.zarr", "v3.zarr", "v2.zarr.zip", "v3.zarr.zip"])
def test_a_chunk_of_zeros_that_zarr_does_not_write(kind, tmp_path):
    features = FEATURES.copy()
    features[2:4] = 0
    adata, folder = make_anndata(X=features), tmp_path / kind.removesuffix(".zip")
    with anndata.settings.override(zarr_write_format=int(kind[1])):
        adata.write_zarr(folder, chunks=(2, 8))
    path = Path(shutil.make_archive(str(folder), "zip", folder)) if kind.endswith(".zip") else folder
    with pytest.warns(InputWarning, match="'X' stores 2 of its 3 chunks; the others are zeros"):
        np.testing.assert_array_equal(read_slide(path).features, features)
