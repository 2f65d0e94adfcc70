"""The row of stages, run over tiles of spots: features in, embedding out, embedding in, expression out.

Only x, k and v of the whole slide are kept (and the next layer's k and v while it is computed): what a tile needs
beyond them does not grow with the square of the spots.

    tokens  : values [R, P], token ids [P]                          -> gene rows [R, d]
    embed   : features, organ, technology, gene row of a tile       -> x, k, v for block 1
    block_l : x and coordinates of a tile; k, v, coordinates of all -> x, and k, v for block l + 1 (not the last)
    head    : embedding of a tile, token ids [G]                    -> expression [T, G]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .backends import Backend
from .context import ContextRows
from .manifest import ModelConfig
from .progress import OnTile
from .slide import Slide
from .vocabulary import MASK_TOKEN

Floats = npt.NDArray[Any]

DTYPES = {"fp32": np.float32, "fp16": np.float16}  # what passes between the stages, by precision
TILE_BYTES = 64 << 20  # a tile's scores: enough to keep the matrix products busy, little beside the slide itself
GENES_AT_ONCE = 8_192


def encode(
    backend: Backend,
    model: ModelConfig,
    precision: str,
    slide: Slide,
    context: ContextRows | None = None,
    tile: int | None = None,
    on_tile: OnTile | None = None,
) -> npt.NDArray[np.float32]:
    """Embedding of every spot, [N, d]: the last block's output, before the head.

    Parameters
    ----------
    tile
        Spots in a tile of a block; None means as many as TILE_BYTES of scores allow.
    on_tile
        Called after each tile with the spots done and the spots to do, over all stages.
    """
    dtype, n, d = DTYPES[precision], len(slide), model.d_model
    coords = slide.normalized_coords().astype(np.float32)
    x, k, v = (np.empty((n, d), dtype) for _ in range(3))
    done, total = 0, n * (1 + model.n_layers)

    def tick(spots: slice) -> None:
        nonlocal done
        done += spots.stop - spots.start
        if on_tile is not None:
            on_tile(done, total)

    rows, row_of_spot = gene_rows(backend, model, dtype, n, context)
    for spots in _tiles(n, tile or _rows_that_fit(model.n_features * np.dtype(dtype).itemsize)):
        x[spots], k[spots], v[spots] = backend.run("embed", _embed_inputs(slide, spots, rows[row_of_spot[spots]]))
        tick(spots)

    k_next, v_next = np.empty_like(k), np.empty_like(v)
    for layer in range(1, model.n_layers + 1):
        # A tile's scores are [heads, T, N] in float32, with the bias beside them.
        for spots in _tiles(n, tile or _rows_that_fit(model.n_heads * n * 4)):
            inputs = {"x": x[spots], "coords": coords[spots], "k": k, "v": v, "key_coords": coords}
            x[spots], *kv_next = backend.run(f"block_{layer}", inputs)
            if kv_next:
                k_next[spots], v_next[spots] = kv_next
            tick(spots)
        (k, k_next), (v, v_next) = (k_next, k), (v_next, v)
    return x.astype(np.float32, copy=False)


def run_fused(
    backend: Backend,
    model: ModelConfig,
    precision: str,
    slide: Slide,
    context: ContextRows | None,
    token_ids: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embedding [N, d] and expression [N, G] by the one graph of all stages, which holds all N * N scores at once."""
    rows, row_of_spot = gene_rows(backend, model, DTYPES[precision], len(slide), context)
    inputs = _embed_inputs(slide, slice(0, len(slide)), rows[row_of_spot])
    coords = slide.normalized_coords().astype(np.float32)
    embedding, expression = backend.run("fused", {**inputs, "coords": coords, "token_ids": token_ids})
    return embedding.astype(np.float32, copy=False), expression.astype(np.float32, copy=False)


def gene_rows(
    backend: Backend, model: ModelConfig, dtype: npt.DTypeLike, n_spots: int, context: ContextRows | None
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Embedded gene rows [1 + C, d], the mask's first, and which of them each spot takes [N]."""
    row_of_spot = np.zeros(n_spots, np.int64)
    one = np.ones((1, 1), dtype)
    (mask_row,) = backend.run("tokens", {"values": one, "token_ids": np.array([MASK_TOKEN])})
    if context is None or len(context.spots) == 0:
        return mask_row, row_of_spot
    row_of_spot[context.spots] = np.arange(1, 1 + len(context.spots))
    rows = [mask_row]
    itemsize = np.dtype(dtype).itemsize
    for some in _tiles(len(context.spots), _rows_that_fit(max(1, len(context.tokens)) * itemsize)):
        values = context.log_counts[some].toarray().astype(dtype, copy=False)
        rows += backend.run("tokens", {"values": values, "token_ids": context.tokens})
    return np.concatenate(rows), row_of_spot


def decode(
    backend: Backend,
    precision: str,
    embedding: Floats,
    token_ids: npt.NDArray[np.int64],
    on_tile: OnTile | None = None,
) -> npt.NDArray[np.float32]:
    """Expression (log1p of raw counts) of the genes asked for, [N, G], from an embedding [N, d]."""
    expression = np.empty((len(embedding), len(token_ids)), np.float32)
    for genes in _tiles(len(token_ids), GENES_AT_ONCE):
        width = genes.stop - genes.start
        for spots in _tiles(len(embedding), _rows_that_fit(width * 4)):
            tile = embedding[spots].astype(DTYPES[precision], copy=False)
            (expression[spots, genes],) = backend.run("head", {"embedding": tile, "token_ids": token_ids[genes]})
            if on_tile is not None:
                on_tile(genes.start * len(embedding) + width * spots.stop, expression.size)
    return expression


def _embed_inputs(slide: Slide, spots: slice, gene_row: Floats) -> dict[str, Floats]:
    size = spots.stop - spots.start
    return {
        "features": slide.features[spots].astype(gene_row.dtype, copy=False),
        "organ": np.full(size, slide.organ_token, np.int64),
        "technology": np.full(size, slide.technology_token, np.int64),
        "gene_row": gene_row,
    }


def _rows_that_fit(row_bytes: int) -> int:
    return max(16, TILE_BYTES // row_bytes)


def _tiles(n: int, size: int) -> Iterator[slice]:
    """Slices that cover n, of nearly the same size, none above `size`."""
    count = -(-n // size)
    for i in range(count):
        yield slice(i * n // count, (i + 1) * n // count)
