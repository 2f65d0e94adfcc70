"""Opens a file by what is in it, whatever its name."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileError
from .checks import reading
from .hdf5 import open_hdf5
from .sources import Source
from .zarrs import ROOTS, open_zarr


@contextmanager
def opened(path: Path, what: str) -> Iterator[Source]:
    """Open a file by what is in it."""
    import h5py

    with reading(path):  # a folder around it may not be read
        folder, file, there = path.is_dir(), path.is_file(), path.exists()
        store = folder and any((path / name).is_file() for name in ROOTS)
    if folder:
        if not store:
            raise FileError(f"{path}: a folder, but not a zarr store; expected {what} in a file or a .zarr folder")
    elif not file:
        raise FileError(f"{path}: no such file; expected {what}" if not there else f"{path}: not a file")
    elif h5py.is_hdf5(path):
        with open_hdf5(path) as source:
            yield source
        return
    else:
        _require_zarr_archive(path, what)
    with open_zarr(path) as source:
        yield source


def _require_zarr_archive(path: Path, what: str) -> None:
    """Refuse a file that is neither HDF5 nor an archive of a zarr store; nothing of a PyTorch file is unpickled."""
    with reading(path), path.open("rb") as file:
        start = file.read(2)
    names: list[str] = []
    if zipfile.is_zipfile(path):
        with reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if start[:1] == b"\x80" or any(name.endswith("data.pkl") for name in names):  # a pickle; torch's archive of one
        raise FileError(
            f"{path}: a PyTorch file (.pt), which CLAM and TRIDENT fill with features alone; it holds no coordinates, "
            "and is not unpickled: give the .h5 of the slide"
        )
    if any(name in ROOTS for name in names):
        return
    nested = next((name for name in names if name.endswith(ROOTS) and name.count("/") == 1), None)
    if nested is not None:
        raise FileError(f"{path}: an archive of the folder {nested.split('/')[0]!r}; zip what is in it, not the folder")
    kind = "a zip archive without a zarr store" if names else "not an HDF5 file, zarr folder or .zarr.zip"
    raise FileError(f"{path}: {kind}; expected {what} in HDF5, h5ad or zarr")
