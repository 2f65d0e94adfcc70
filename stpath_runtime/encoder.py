"""The row of stages, run over tiles of spots: features in, embedding out, embedding in, expression out.

Only x, k and v of the whole slide are kept (and the next layer's k and v while it is computed): what a tile needs
beyond them does not grow with the square of the spots.

    tokens      : values [R, P], token ids [P]                           -> gene rows [R, d]
    embed       : features, organ, technology, gene row of a tile        -> x, k, v for block 1
    block_l     : x and coordinates of a tile; k, v, coordinates of all  -> x, and k, v for block l + 1 (not the last)
    knn_block_l : the same with the k, v, coordinates of the tile's neighbours, the keys of its blocks, and their mask
    head        : embedding of a tile, token ids [G]                     -> expression [T, G]

Both ways to attend are this row. They differ in the order of the rows, and in how a tile gets its keys: `AllSpots` and
`NearestSpots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .backends import Backend
from .context import ContextRows
from .errors import MemoryLimitError, SlideError
from .manifest import ModelConfig
from .neighbors import BLOCK, Plan
from .output import CHUNK
from .progress import OnTile
from .slide import Slide
from .vocabulary import MASK_TOKEN

Floats = npt.NDArray[Any]

# What passes between the stages, by precision. In bf16 x stays in float32, and k and v are bfloat16, which NumPy does
# not have: their bits.
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": np.float32}
KV_DTYPES = {**DTYPES, "bf16": np.uint16}
# What a tile takes, in parts of what ONNX Runtime takes for it; measured, global attention of 5,000 spots.
TILE_MEMORY = {("openvino", "fp32"): 1.4}
# A tile reads all its keys once for its queries: 1,024 queries make hundreds of operations of each number read, more
# than any processor needs to be kept busy. Larger tiles cost memory and win nothing.
ENOUGH_ROWS = 1024
ENOUGH_BYTES = 64 << 20  # of a tile of the embed and head stages, which have no keys
GENES_AT_ONCE = 32 * CHUNK[1]
DECODED_ROWS = 16 * CHUNK[0]  # of a tile of the head stage, at most


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots of a slide, or of several one after the other, as the stages take them."""

    name: str  # what messages call them
    features: Floats  # [N, F]
    coords: npt.NDArray[np.float32]  # [N, 2], normalised for each slide on its own
    organ: npt.NDArray[np.int64]  # [N], tokens
    technology: npt.NDArray[np.int64]  # [N], tokens
    context: list[ContextRows]  # positions among all N spots

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, slides: Sequence[Slide], contexts: Sequence[ContextRows | None]) -> Spots:
        """Put slides, and the context of each, one after the other; the features of a single one are not copied."""
        counts = [len(slide) for slide in slides]
        starts = np.cumsum([0, *counts[:-1]])
        return cls(
            name=slides[0].name if len(slides) == 1 else f"{slides[0].name} and {len(slides) - 1} more",
            features=slides[0].features if len(slides) == 1 else np.concatenate([slide.features for slide in slides]),
            coords=np.concatenate([slide.normalized_coords() for slide in slides]).astype(np.float32),
            organ=np.repeat([slide.organ_token for slide in slides], counts),
            technology=np.repeat([slide.technology_token for slide in slides], counts),
            context=[
                ContextRows(rows.spots + start, rows.tokens, rows.log_counts)
                for rows, start in zip(contexts, starts, strict=True)
                if rows is not None and len(rows.spots)
            ],
        )


class Keys(Protocol):
    """How the rows of x stand for spots, and how a tile of rows gets its keys."""

    graph: str  # the block graphs are named f"{graph}_{layer}"
    rows: int  # R
    unit: int  # a tile is a multiple of so many rows
    row_bytes: int  # what one row of a tile adds to the memory of a block

    def spots(self, rows: slice) -> slice | npt.NDArray[np.int64]:
        """The spots that some rows stand for."""
        ...

    def of_spots(self, x: Floats) -> Floats:
        """The rows of x [R, d] in the order of the spots, [N, d]."""
        ...

    def inputs(self, rows: slice, k: Floats, v: Floats) -> dict[str, Floats]:
        """Coordinates and keys of a tile of rows."""
        ...


class AllSpots:
    """Global attention within one slide: rows are spots, and every tile takes all of them as keys."""

    graph, unit = "block", 1

    def __init__(self, spots: Spots, model: ModelConfig) -> None:
        self.rows = len(spots)
        # In float32: scores, bias and their sum for each head, distances and their parts.
        self.row_bytes = self.rows * (3 * model.n_heads + 4) * 4
        self._coords = spots.coords

    def spots(self, rows: slice) -> slice:
        """The same: rows are spots."""
        return rows

    def of_spots(self, x: Floats) -> Floats:
        """The same: rows are spots."""
        return x

    def inputs(self, rows: slice, k: Floats, v: Floats) -> dict[str, Floats]:
        """All keys for any tile."""
        return {"coords": self._coords[rows], "k": k, "v": v, "key_coords": self._coords}


class NearestSpots:
    """KNN attention: rows are spots in block order, and a tile takes the rows that its blocks name."""

    graph, unit = "knn_block", BLOCK

    def __init__(self, spots: Spots, model: ModelConfig, plan: Plan) -> None:
        self.rows = len(plan.spot)
        keys = int(np.diff(plan.key_start).max())
        # In float32: scores, bias and their sum, distances and their parts, and a block's keys shared by its rows.
        self.row_bytes = keys * ((3 * model.n_heads + 4) * 4 + 1) + 3 * keys * model.d_model * 4 // BLOCK
        self._plan = plan
        self._coords = spots.coords[plan.spot]

    def spots(self, rows: slice) -> npt.NDArray[np.int64]:
        """The spot of each row; a row that pads a block takes the last spot, and is no key of any."""
        return self._plan.spot[rows]

    def of_spots(self, x: Floats) -> Floats:
        """Rows back in the order of the spots."""
        return x[self._plan.row]

    def inputs(self, rows: slice, k: Floats, v: Floats) -> dict[str, Floats]:
        """Only the rows of k and v that the tile's blocks name, and which of them each block takes."""
        tile = self._plan.tile(slice(rows.start // BLOCK, rows.stop // BLOCK))
        keys = {"k": k[tile.rows], "v": v[tile.rows], "key_coords": self._coords[tile.rows]}
        return {"coords": self._coords[rows], **keys, "key_index": tile.key_index, "mask": tile.mask}

    def whole(self) -> dict[str, Floats]:
        """Coordinates and keys of all rows, for the fused graph."""
        blocks = self._plan.tile(slice(0, self._plan.blocks))
        return {"coords": self._coords, "key_index": blocks.rows[blocks.key_index], "mask": blocks.mask}


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
    kept = n * d * (np.dtype(dtype).itemsize + 4 * np.dtype(kv_dtype).itemsize)  # x, k, v, and the next k and v
    share = TILE_MEMORY.get((backend.name, precision), 1.0)
    size = tile or tile_rows(keys, model, kept, memory, spots.name, share)
    x, k, v = (np.empty((n, d), kind) for kind in (dtype, kv_dtype, kv_dtype))
    done, total = 0, n * (1 + model.n_layers)

    def tick(rows: slice) -> None:
        nonlocal done
        done += rows.stop - rows.start
        if on_tile is not None:
            on_tile(done, total)

    embedded, row_of_spot = gene_rows(backend, dtype, spots)
    for rows in _tiles(n, min(size, _enough(model.n_features * 4)), 1):
        some = keys.spots(rows)
        x[rows], k[rows], v[rows] = backend.run("embed", _embed_inputs(spots, some, embedded[row_of_spot[some]]))
        tick(rows)

    k_next, v_next = np.empty_like(k), np.empty_like(v)
    for layer in range(1, model.n_layers + 1):
        for rows in _tiles(n, size, keys.unit):
            x[rows], *kv_next = backend.run(f"{keys.graph}_{layer}", {"x": x[rows], **keys.inputs(rows, k, v)})
            if kv_next:
                k_next[rows], v_next[rows] = kv_next
            tick(rows)
        (k, k_next), (v, v_next) = (k_next, k), (v_next, v)
    del k, v, k_next, v_next  # the copy below may take their place
    embedding: npt.NDArray[np.float32] = keys.of_spots(x).astype(np.float32, copy=False)
    finite = np.isfinite(embedding).all(axis=1)
    if not finite.all():
        raise SlideError(
            f"{spots.name}: the model gives NaN or infinity at {int((~finite).sum()):,} spots, the first at spot "
            f"{int(np.argmin(finite))}; its features are too large, or too "
            f"large for {precision}"
        )
    return embedding


def tile_rows(keys: Keys, model: ModelConfig, kept: int, memory: int, name: str, share: float = 1.0) -> int:
    """Rows of a tile: as many as pay, if the bytes that are kept and the tile fit the memory.

    Raises
    ------
    InputError
        If not even the smallest tile fits; the message gives the least that works.
    """
    # Beside its keys, a row of a tile has activations: x, q, attention, mlp (twice), k, v; and its features.
    row_bytes = int(share * (keys.row_bytes + (6 * model.d_model + 2 * model.d_mlp + model.n_features) * 4))
    fit = (memory - kept) // row_bytes // keys.unit * keys.unit
    if fit < keys.unit:
        least = kept + keys.unit * row_bytes
        raise MemoryLimitError(
            f"{name}: {_mebibytes(memory)} of memory do not hold one tile of {keys.rows:,} spots; the least that works "
            f"is {_mebibytes(least)} (--memory)"
        )
    return min(fit, ENOUGH_ROWS)


def run_fused(
    backend: Backend, precision: str, spots: Spots, keys: AllSpots | NearestSpots, token_ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Embedding [N, d] and expression [N, G] by the one graph of all stages, which holds all scores at once."""
    embedded, row_of_spot = gene_rows(backend, DTYPES[precision], spots)
    some = keys.spots(slice(0, keys.rows))
    inputs = _embed_inputs(spots, some, embedded[row_of_spot[some]])
    if isinstance(keys, NearestSpots):
        outputs = backend.run("fused_knn", {**inputs, **keys.whole(), "token_ids": token_ids})
    else:
        outputs = backend.run("fused", {**inputs, "coords": spots.coords, "token_ids": token_ids})
    embedding, expression = (keys.of_spots(rows).astype(np.float32, copy=False) for rows in outputs)
    return embedding, expression


def gene_rows(backend: Backend, dtype: npt.DTypeLike, spots: Spots) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Embedded gene rows [1 + C, d], the mask's first, and which of them each spot takes [N]."""
    row_of_spot = np.zeros(len(spots), np.int64)
    rows = backend.run("tokens", {"values": np.ones((1, 1), dtype), "token_ids": np.array([MASK_TOKEN])})
    first, itemsize = 1, np.dtype(dtype).itemsize
    for context in spots.context:
        row_of_spot[context.spots] = np.arange(first, first + len(context.spots))
        first += len(context.spots)
        size = min(ENOUGH_ROWS, _enough(max(1, len(context.tokens)) * itemsize))
        for some in _tiles(len(context.spots), size, 1):
            values = context.log_counts[some].toarray().astype(dtype, copy=False)
            rows += backend.run("tokens", {"values": values, "token_ids": context.tokens})
    return np.concatenate(rows), row_of_spot


def decode(
    backend: Backend, precision: str, embedding: Floats, token_ids: npt.NDArray[np.int64]
) -> Iterator[tuple[slice, slice, npt.NDArray[np.float32]]]:
    """Expression (log1p of raw counts) of the genes asked for, from an embedding [N, d], tile by tile.

    Yields
    ------
    Spots, genes (positions in `token_ids`), and their values [spots, genes]. Tiles start at multiples of CHUNK.
    """
    for start in range(0, len(token_ids), GENES_AT_ONCE):
        genes = slice(start, min(start + GENES_AT_ONCE, len(token_ids)))
        # Whole chunks of spots, as many as pay: a chunk of a file is written once.
        step = max(1, min(DECODED_ROWS, _enough((genes.stop - start) * 4)) // CHUNK[0]) * CHUNK[0]
        for first in range(0, len(embedding), step):
            spots = slice(first, min(first + step, len(embedding)))
            tile = embedding[spots].astype(DTYPES[precision], copy=False)
            (values,) = backend.run("head", {"embedding": tile, "token_ids": token_ids[genes]})
            yield spots, genes, values.astype(np.float32, copy=False)


def _embed_inputs(spots: Spots, some: slice | npt.NDArray[np.int64], gene_row: Floats) -> dict[str, Floats]:
    return {
        "features": spots.features[some].astype(gene_row.dtype, copy=False),
        "organ": spots.organ[some],
        "technology": spots.technology[some],
        "gene_row": gene_row,
    }


def _enough(row_bytes: int) -> int:
    return max(1, ENOUGH_BYTES // row_bytes)


def _tiles(n: int, size: int, unit: int) -> Iterator[slice]:
    """Slices that cover n, of nearly the same size, multiples of the unit, none above `size`."""
    units = n // unit
    count = -(-units // max(1, size // unit))
    for i in range(count):
        yield slice(i * units // count * unit, (i + 1) * units // count * unit)


def _mebibytes(size: int) -> str:
    return f"{-(-size // 2**20):,} MiB"
