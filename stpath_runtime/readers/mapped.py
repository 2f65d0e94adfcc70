"""An array of a file as memory that the system reads when it is touched: a million embeddings are two gigabytes."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileError
from .sources import Source, reading

COPIED = 32 << 20  # bytes at a time


def map_array(source: Source, key: str) -> npt.NDArray[Any]:
    """An array [N, ...] of numbers, mapped: from the file itself where it lies there in one piece, else from a copy.

    The copy, of an array in chunks, is a temporary file without a name, which goes with the last use of it.

    Raises
    ------
    InputError
        If there is no such array, or it is damaged or incomplete.
    """
    import h5py

    array = source.lazy(key)
    if array is None or array.dtype.kind not in "fiu":
        raise FileError(f"{source.path}: {key!r} is not an array of numbers")
    if isinstance(array, h5py.Dataset):
        with reading(source.path, repr(key)):
            offset = array.id.get_offset()
        if array.chunks is None and offset is not None and array.dtype.isnative:
            return np.memmap(source.path, array.dtype, "r", offset, array.shape)
    source.require_whole(key)
    return _copied(source, key, array)


def _copied(source: Source, key: str, array: Any) -> npt.NDArray[Any]:
    dtype, rows = array.dtype.newbyteorder("="), array.chunks[0] if array.chunks else 1
    row_bytes = max(1, int(np.prod(array.shape[1:])) * dtype.itemsize)
    step = max(1, COPIED // row_bytes // rows) * rows
    with tempfile.TemporaryFile() as file, reading(source.path, repr(key)):
        for start in range(0, array.shape[0], step):
            file.write(np.ascontiguousarray(array[start : start + step], dtype).data)
        file.flush()
        return np.memmap(file, dtype, "r", 0, tuple(array.shape))
