"""Writing results: whole under their name, or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError

if TYPE_CHECKING:
    from anndata import AnnData


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it to `path` when the block ends well, delete it when it does not.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        # HDF5 puts the system's words in the middle of its own.
        inner = re.search(r"error message = '([^']+)'", str(error))
        why = inner[1] if inner else error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({why}); free some space or choose another place") from error
    finally:
        if partial.exists():
            partial.unlink()


def require_writable(path: Path) -> None:
    """Check, before the work, that a file or folder can be made at `path`.

    Raises
    ------
    InputError
        If it cannot.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({folder}: {error.strerror}); choose another place") from error


def is_prediction(path: Path) -> bool:
    """Whether a file is an h5ad that stpath wrote."""
    import h5py

    if not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            return "uns/stpath" in file
    except OSError:
        return False


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write an AnnData; the file appears under its name only when it is whole."""
    with written_whole(path) as partial:
        adata.write_h5ad(partial)
