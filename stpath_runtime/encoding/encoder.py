"""The stages of an engine, run over tiles of spots: features in, embedding out; embedding in, expression out.

Only x, k and v of the whole slide are kept in the memory of the device (and the next layer's k and v while they are
computed), and which keys each tile needs. What a tile takes beyond that does not grow with the square of the spots.

    tokens      : values [R, P], token ids [P]                           -> gene rows [R, d]
    embed       : features, organ, technology of a tile, its gene rows   -> x, k, v for block 1
    block_l     : x and coordinates of a tile; k, v, coordinates of all  -> x, and k, v for block l + 1 (not the last)
    knn_block_l : the same with the k, v, coordinates of the tile's neighbours, the keys of its blocks, and their mask
    head        : embedding of a tile, token ids [G]                     -> expression [T, G]

Global and kNN attention run the same stages. They differ in the order of the rows and in how a tile gets its keys:
`AllSpots` and `NearestSpots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MemoryLimitError, SlideError
from ..manifest import ModelConfig
from ..progress import OnTile
from ..slides.vocabulary import MASK_TOKEN
from .attention import AllSpots, Keys, NearestSpots, Spots, Tile
from .backend import Array, Backend
from .sizes import (
    BLOCK,
    CHUNK,
    DECODED_ROWS,
    DTYPES,
    GENES_AT_ONCE,
    KV_DTYPES,
    LEAST_ROWS,
    MOST_BYTES,
    MOST_ELEMENTS,
    MOST_ROWS,
    ROWS_AT_ONCE,
)
from .threads import each

Floats = npt.NDArray[Any]
ExpressionTile = tuple[slice, slice, npt.NDArray[np.float32]]  # spots, genes, values [spots, genes]


def encode(
    backend: Backend,
    model: ModelConfig,
    precision: str,
    spots: Spots,
    keys: Keys,
    memory: int | None = None,
    tile: int | None = None,
    on_tile: OnTile | None = None,
) -> npt.NDArray[np.float32]:
    """Embedding of every spot, [N, d]: the last block's output, before the head.

    Parameters
    ----------
    keys
        How to attend.
    memory
        Bytes that this may take beyond the features; None means half of what the device has available.
    tile
        Rows in a tile of a block; None means as many as pay, within the memory.
    on_tile
        Called after each tile with the rows done and the rows to do, over all stages.

    Raises
    ------
    InputError
        If the memory is too small for one tile.
    """
    dtype, kv_dtype, n, d = DTYPES[precision], KV_DTYPES[precision], keys.rows, model.d_model
    memory = memory if memory is not None else backend.available_memory() // 2
    itemsize, context_spots = np.dtype(dtype).itemsize, sum(len(context.spots) for context in spots.context)
    kept = (
        (n + 2 * (1 + context_spots)) * d * itemsize  # x, and the gene rows, in parts and concatenated
        + 4 * keys.keys * d * np.dtype(kv_dtype).itemsize
        + keys.kept_bytes
        + keys.planning_bytes
        + spots.copied_bytes
    )
    graphs = model.n_layers if backend.keeps_tiles else 1
    if keys.keys_of_tile and backend.keeps_tiles:  # each graph keeps k and v as given, and transposed
        kept += 4 * keys.keys_of_tile * d * 4 * graphs
        graphs = 1  # the rest of a tile is small beside it
    size, at_once = tile_rows(keys, model, kept, memory, spots.name, backend, graphs)
    size = tile or size
    done, total = 0, n * (1 + model.n_layers)

    def tick(rows: slice) -> None:
        nonlocal done
        done += rows.stop - rows.start
        if on_tile is not None:
            on_tile(done, total)

    genes = gene_rows(backend, dtype, spots)
    with backend.workspace() as at:
        x = at.zeros("x", (n, d), dtype)
        kv = [at.zeros(name, (keys.keys, d), kv_dtype) for name in ("k", "v")]
        kv_next = [at.zeros(name, (keys.keys, d), kv_dtype) for name in ("k_next", "v_next")]

        def embed(kv: Sequence[Array], rows: slice) -> slice:
            inputs = _embed_inputs(spots, keys.spots(rows), *genes)
            at.run("embed", inputs, {"x": x[rows], "k": kv[0][rows], "v": kv[1][rows]})
            return rows

        def block(layer: int, kv: Sequence[Array], kv_next: Sequence[Array], tile: Tile) -> slice:
            rows = tile.rows
            taken = kv if tile.keys is None else [whole[tile.keys] for whole in kv]
            outputs = {"x_next": x[rows]}
            if layer < model.n_layers:
                outputs |= {"k_next": kv_next[0][rows], "v_next": kv_next[1][rows]}
            given = {"x": x[rows], "k": taken[0], "v": taken[1], **tile.inputs}
            at.run(f"{keys.graph}_{layer}", given, outputs)
            return rows

        parts = list(row_slices(n, min(size, most_rows(model.n_features * 4)), keys.unit, at_once))
        for rows in each(partial(embed, kv), parts, at_once):
            tick(rows)
        tiles = keys.tiles(list(row_slices(n, size, keys.unit, at_once)), at)
        for layer in range(1, model.n_layers + 1):
            for rows in each(partial(block, layer, kv, kv_next), tiles, at_once):
                tick(rows)
            kv, kv_next = kv_next, kv
        del kv, kv_next, tiles  # so that the copy below can use their memory
        embedding: npt.NDArray[np.float32] = keys.of_spots(at.fetch(x)).astype(np.float32, copy=False)
    _require_finite(embedding, spots.name, precision)
    return embedding


def _require_finite(embedding: npt.NDArray[np.float32], name: str, precision: str) -> None:
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        raise SlideError(
            f"{name}: the model gives NaN or infinity at {int((~finite).sum()):,} spots, the first at spot "
            f"{int(np.argmin(finite))}; its features are too large, or too large for {precision}"
        )


def run_fused(
    backend: Backend, precision: str, spots: Spots, keys: AllSpots | NearestSpots, token_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embedding [N, d] and expression [N, G] by the one graph of all stages, which holds all scores at once."""
    inputs = _embed_inputs(spots, keys.spots(slice(0, keys.rows)), *gene_rows(backend, DTYPES[precision], spots))
    if isinstance(keys, NearestSpots):
        outputs = backend.run("fused_knn", {**inputs, **keys.whole(), "token_ids": token_ids})
    else:
        outputs = backend.run("fused", {**inputs, "coords": spots.coords, "token_ids": token_ids})
    embedding, expression = (keys.of_spots(rows).astype(np.float32, copy=False) for rows in outputs)
    return embedding, expression


def gene_rows(backend: Backend, dtype: npt.DTypeLike, spots: Spots) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Embedded gene rows [1 + C, d], the mask's first, and the row that each spot takes [N]."""
    row_of_spot = np.zeros(len(spots), np.int64)
    rows = backend.run("tokens", {"values": np.ones((1, 1), dtype), "token_ids": np.array([MASK_TOKEN])})
    first, itemsize = 1, np.dtype(dtype).itemsize
    for context in spots.context:
        row_of_spot[context.spots] = np.arange(first, first + len(context.spots))
        first += len(context.spots)
        size = min(MOST_ROWS, most_rows(max(1, len(context.tokens)) * itemsize))
        for part in row_slices(len(context.spots), size, 1):
            values = context.log_counts[part].toarray().astype(dtype, copy=False)
            rows += backend.run("tokens", {"values": values, "token_ids": context.tokens})
    return np.concatenate(rows), row_of_spot


def _embed_inputs(
    spots: Spots, rows: slice | npt.NDArray[np.int64], gene_rows: Floats, row_of_spot: npt.NDArray[np.int64]
) -> dict[str, Floats]:
    used, gene_row = np.unique(row_of_spot[rows], return_inverse=True)  # most spots share the mask's row
    return {
        "features": spots.features[rows].astype(gene_rows.dtype, copy=False),
        "organ": spots.organ[rows],
        "technology": spots.technology[rows],
        "gene_rows": gene_rows[used],
        "gene_row": gene_row,
    }


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


def tile_rows(
    keys: Keys, model: ModelConfig, kept: int, memory: int, name: str, backend: Backend, graphs: int
) -> tuple[int, int]:
    """Rows of a tile, and tiles at once: as many as help, within the memory left beside the bytes that are kept.

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
    if backend.keeps_tiles:  # with AVX-512, OpenVINO's kernels pack what they multiply
        row_bytes += row_bytes // 8
    fit = (memory - kept) // row_bytes // keys.unit  # units
    least = kept + keys.unit * row_bytes
    if memory < least:
        raise MemoryLimitError(
            f"{name}: {rounded_down(memory)} of memory cannot hold one tile of {keys.rows:,} spots; the least that "
            f"works is {-(-least // 2**20):,} MiB (--memory)"
        )
    # The scores of a tile, and the keys of its blocks, are the largest tensors.
    most = MOST_ELEMENTS // (keys.keys_of_row * max(model.n_heads, model.d_model // BLOCK)) // keys.unit * keys.unit
    at_once = max(1, min(backend.tiles_at_once, fit, keys.rows // LEAST_ROWS))
    useful = backend.most_rows if at_once == 1 else max(ROWS_AT_ONCE, backend.most_rows // at_once)
    return min(fit // at_once * keys.unit, useful, max(most, keys.unit)), at_once


def row_slices(n: int, size: int, unit: int, at_once: int = 1) -> Iterator[slice]:
    """Slices that cover n rows, nearly equal, none above `size`, each starting at a multiple of the unit.

    Where rows suffice there are a multiple of `at_once`, so that no thread waits for the last of them.
    The larger ones come first: a smaller tile fits into the memory of a larger one, which avoids fragmentation.
    """
    units = -(-n // unit)
    count = -(-units // max(1, size // unit))
    count = min(units, -(-count // at_once) * at_once)
    least, larger = divmod(units, max(1, count))
    start = 0
    for i in range(count):
        stop = start + (least + (i < larger)) * unit
        yield slice(start, min(n, stop))
        start = stop


def most_rows(row_bytes: int) -> int:
    """Rows of a tile of a stage without keys; more would not be faster."""
    return max(1, MOST_BYTES // row_bytes)


def rounded_down(size: int) -> str:
    """A size that is too small, rounded so that it never reads as one that is large enough."""
    return f"{size // 2**20:,} MiB" if size >= 2**20 else f"{size // 2**10:,} KiB"
