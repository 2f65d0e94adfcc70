"""How many rows a tile has, and how the rows of a slide are cut into tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from ..errors import MemoryLimitError
from ..manifest import ModelConfig
from .keys import Keys
from .sizes import BLOCK, MOST_BYTES, MOST_ELEMENTS

Floats = npt.NDArray[Any]


def tile_rows(keys: Keys, model: ModelConfig, kept: int, memory: int, name: str, most_rows: int, graphs: int) -> int:
    """Rows of a tile: as many as help, within the memory that is left beside the bytes that are kept.

    Parameters
    ----------
    kept
        Bytes that are needed whatever the size of the tile.
    graphs
        How many graphs keep the memory of a tile at once.

    Raises
    ------
    InputError
        If not even the smallest tile fits; the message gives the least that works.
    """
    # Beside its keys, a row of a tile has activations: x, q, attention, mlp (twice), k, v; and its features.
    row_bytes = graphs * (keys.row_bytes + (6 * model.d_model + 2 * model.d_mlp + model.n_features) * 4)
    fit = (memory - kept) // row_bytes // keys.unit * keys.unit
    least = kept + keys.unit * row_bytes
    if memory < least:
        raise MemoryLimitError(
            f"{name}: {_rounded_down(memory)} of memory cannot hold one tile of {keys.rows:,} spots; the least that "
            f"works is {-(-least // 2**20):,} MiB (--memory)"
        )
    # The scores of a tile, and the keys of its blocks, are the largest tensors.
    most = MOST_ELEMENTS // (keys.keys_of_row * max(model.n_heads, model.d_model // BLOCK)) // keys.unit * keys.unit
    return min(fit, most_rows, max(most, keys.unit))


def row_slices(n: int, size: int, unit: int) -> Iterator[slice]:
    """Slices that cover n rows, nearly equal, none above `size`, each starting at a multiple of the unit.

    The larger ones come first: a smaller tile fits into the memory of a larger one, which avoids fragmentation.
    """
    units = -(-n // unit)
    count = -(-units // max(1, size // unit))
    least, larger = divmod(units, max(1, count))
    start = 0
    for i in range(count):
        stop = start + (least + (i < larger)) * unit
        yield slice(start, min(n, stop))
        start = stop


def most_rows(row_bytes: int) -> int:
    """Rows of a tile of a stage without keys; more would not be faster."""
    return max(1, MOST_BYTES // row_bytes)


def _rounded_down(size: int) -> str:
    """A size that is too small, rounded so that it never reads as one that is large enough."""
    return f"{size // 2**20:,} MiB" if size >= 2**20 else f"{size // 2**10:,} KiB"
