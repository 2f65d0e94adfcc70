"""Expression from embeddings, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .backend import Backend
from .sizes import CHUNK, DECODED_ROWS, DTYPES, GENES_AT_ONCE
from .tiles import most_rows

Floats = npt.NDArray[Any]

ExpressionTile = tuple[slice, slice, npt.NDArray[np.float32]]  # spots, genes, values [spots, genes]


def decode(
    backend: Backend, precision: str, embedding: Floats, token_ids: npt.NDArray[np.int64]
) -> Iterator[ExpressionTile]:
    """Expression (log1p of raw counts) of the genes asked for, from an embedding [N, d], tile by tile.

    Yields
    ------
    Spots, genes (positions in `token_ids`), and their values [spots, genes]. Tiles start at multiples of CHUNK.
    """
    for start in range(0, len(token_ids), GENES_AT_ONCE):
        genes = slice(start, min(start + GENES_AT_ONCE, len(token_ids)))
        # Whole chunks of spots, as many as pay: a chunk of a file is written once.
        step = max(1, min(DECODED_ROWS, most_rows((genes.stop - start) * 4)) // CHUNK[0]) * CHUNK[0]
        for first in range(0, len(embedding), step):
            spots = slice(first, min(first + step, len(embedding)))
            tile = embedding[spots].astype(DTYPES[precision], copy=False)
            (values,) = backend.run("head", {"embedding": tile, "token_ids": token_ids[genes]})
            yield spots, genes, values.astype(np.float32, copy=False)
