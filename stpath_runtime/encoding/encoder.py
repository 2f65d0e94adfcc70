"""The row of stages, run over tiles of spots: features in, embedding out, embedding in, expression out.

Only x, k and v of the whole slide are kept (and the next layer's k and v while it is computed), in the memory of the
device, and which keys each tile takes: what a tile needs beyond them does not grow with the square of the spots.

    tokens      : values [R, P], token ids [P]                           -> gene rows [R, d]
    embed       : features, organ, technology of a tile, its gene rows   -> x, k, v for block 1
    block_l     : x and coordinates of a tile; k, v, coordinates of all  -> x, and k, v for block l + 1 (not the last)
    knn_block_l : the same with the k, v, coordinates of the tile's neighbours, the keys of its blocks, and their mask
    head        : embedding of a tile, token ids [G]                     -> expression [T, G]

Both ways to attend are this row. They differ in the order of the rows, and in how a tile gets its keys: `AllSpots` and
`NearestSpots`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .backends import ENOUGH_ROWS, Array, Backend, Workspace
from .context import ContextRows
from .errors import MemoryLimitError, SlideError
from .manifest import ModelConfig
from .neighbors import BLOCK, PAD_KEYS, Plan
from .output import CHUNK
from .progress import OnTile
from .slide import Slide
from .vocabulary import MASK_TOKEN

Floats = npt.NDArray[Any]

# What passes between the stages, by precision. In bf16 x stays in float32, and k and v are bfloat16, which NumPy does
# not have: their bits.
DTYPES: dict[str, type[np.floating[Any]]] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.float32}
KV_DTYPES = {**DTYPES, "bf16": np.uint16}
# What a tile takes, in parts of what ONNX Runtime takes for it; measured, global attention of 5,000 spots.
TILE_MEMORY = {("openvino", "fp32"): 1.4}
MOST_ELEMENTS = 2**31 - 1  # of a tensor: kernels of GPUs count in 32 bits
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


@dataclass(frozen=True, eq=False)
class Tile:
    """What a tile of rows takes beside its x: the same in every layer."""

    rows: slice
    inputs: Mapping[str, Array]  # of the block graphs, but for x, k and v
    keys: npt.NDArray[np.int64] | None  # the rows of k and v that the tile is handed; None means all


class Keys(Protocol):
    """How the rows of x stand for spots, and how a tile of rows gets its keys."""

    graph: str  # the block graphs are named f"{graph}_{layer}"
    rows: int  # R, of x
    keys: int  # of k and v: R, and rows that pad
    unit: int  # a tile is a multiple of so many rows
    keys_of_row: int  # that a row of a tile attends to, masked ones among them
    kept_bytes: int  # of all tiles' inputs
    row_bytes: int  # what one row of a tile adds to the memory of a block

    def spots(self, rows: slice) -> slice | npt.NDArray[np.int64]:
        """The spots that some rows stand for."""
        ...

    def of_spots(self, x: Floats) -> Floats:
        """The rows of x [R, d] in the order of the spots, [N, d]."""
        ...

    def tiles(self, rows: Sequence[slice], at: Workspace) -> list[Tile]:
        """The tiles of some rows, their inputs where the workspace wants them."""
        ...


class AllSpots:
    """Global attention within one slide: rows are spots, and every tile takes all of them as keys.

    Keys are padded to a multiple of 8, which GPU kernels want, and the padding is masked.
    """

    graph = "block"
    unit = PAD_KEYS  # so that a tile's rows begin where memory is aligned

    def __init__(self, spots: Spots, model: ModelConfig, precision: str) -> None:
        self.rows = len(spots)
        self.keys = self.keys_of_row = -(-self.rows // PAD_KEYS) * PAD_KEYS
        self.kept_bytes = self.rows * (2 + 3) * 4  # coordinates, as queries and as keys, and their bias
        # In float32: scores, bias and their sum for each head, distances and their parts.
        self.row_bytes = self.keys * (3 * model.n_heads + 4) * 4
        self._coords = spots.coords
        self._key_bias = np.zeros(self.keys, np.float32)
        # Half of the lowest number: a score added to it does not overflow.
        self._key_bias[self.rows :] = float(np.finfo(DTYPES[precision]).min) / 2

    def spots(self, rows: slice) -> slice:
        """The same: rows are spots."""
        return rows

    def of_spots(self, x: Floats) -> Floats:
        """The same: rows are spots."""
        return x

    def tiles(self, rows: Sequence[slice], at: Workspace) -> list[Tile]:
        """All keys for any tile."""
        key_coords = np.pad(self._coords, ((0, self.keys - self.rows), (0, 0)))
        shared = {"key_coords": at.keep("key_coords", key_coords), "key_bias": at.keep("key_bias", self._key_bias)}
        coords = [at.keep(f"coords {i}", self._coords[some]) for i, some in enumerate(rows)]
        return [Tile(some, {"coords": own, **shared}, None) for some, own in zip(rows, coords, strict=True)]


class NearestSpots:
    """KNN attention: rows are spots in block order, and a tile takes the rows that its blocks name."""

    graph, unit = "knn_block", BLOCK

    def __init__(self, spots: Spots, model: ModelConfig, plan: Plan) -> None:
        self.rows = self.keys = len(plan.spot)
        self.keys_of_row = -(-int(np.diff(plan.key_start).max()) // PAD_KEYS) * PAD_KEYS
        # A bit of the mask for each key, and of a block's keys: which rows they are, of the slide and of the tile.
        self.kept_bytes = self.rows * (self.keys_of_row * (1 + 8 / BLOCK) + (2 + 3) * 8).__ceil__()
        # In float32: scores, bias and their sum, distances and their parts, and a block's keys shared by its rows.
        self.row_bytes = self.keys_of_row * ((3 * model.n_heads + 4) * 4 + 1 + 3 * model.d_model * 4 // BLOCK)
        self._plan = plan
        self._coords = spots.coords[plan.spot]

    def spots(self, rows: slice) -> npt.NDArray[np.int64]:
        """The spot of each row; a row that pads a block takes the last spot, and is no key of any."""
        return self._plan.spot[rows]

    def of_spots(self, x: Floats) -> Floats:
        """Rows back in the order of the spots."""
        return x[self._plan.row]

    def tiles(self, rows: Sequence[slice], at: Workspace) -> list[Tile]:
        """Only the rows of k and v that the tile's blocks name, and which of them each block takes.

        In a workspace whose graphs take all keys at no cost, those name rows of all.
        """
        coords, tiles = at.keep("coords", self._coords), []
        for i, some in enumerate(rows):
            tile = self._plan.tile(slice(some.start // BLOCK, some.stop // BLOCK))
            keys = None if at.takes_all_keys else tile.rows
            index = tile.rows[tile.key_index] if keys is None else tile.key_index
            inputs = {
                "coords": coords[some],
                "key_coords": coords if keys is None else self._coords[keys],
                "key_index": at.keep(f"key_index {i}", index),
                "mask": at.keep(f"mask {i}", tile.mask),
            }
            tiles.append(Tile(some, inputs, keys))
        return tiles

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
    kept = n * d * np.dtype(dtype).itemsize + 4 * keys.keys * d * np.dtype(kv_dtype).itemsize + keys.kept_bytes
    share = TILE_MEMORY.get((backend.name, precision), 1.0)
    size = tile or tile_rows(keys, model, kept, memory, spots.name, backend.enough_rows, share)
    done, total = 0, n * (1 + model.n_layers)

    def tick(rows: slice) -> None:
        nonlocal done
        done += rows.stop - rows.start
        if on_tile is not None:
            on_tile(done, total)

    genes = gene_rows(backend, dtype, spots)
    with backend.workspace() as at:
        x = at.zeros("x", (n, d), dtype)
        k, v, k_next, v_next = (at.zeros(name, (keys.keys, d), kv_dtype) for name in ("k", "v", "k_next", "v_next"))
        for rows in _tiles(n, min(size, _enough(model.n_features * 4)), keys.unit):
            inputs = _embed_inputs(spots, keys.spots(rows), *genes)
            at.run("embed", inputs, {"x": x[rows], "k": k[rows], "v": v[rows]})
            tick(rows)
        tiles = keys.tiles(list(_tiles(n, size, keys.unit)), at)
        for layer in range(1, model.n_layers + 1):
            for tile_ in tiles:
                rows = tile_.rows
                taken = {"k": k, "v": v} if tile_.keys is None else {"k": k[tile_.keys], "v": v[tile_.keys]}
                outputs = {"x_next": x[rows]}
                if layer < model.n_layers:
                    outputs |= {"k_next": k_next[rows], "v_next": v_next[rows]}
                at.run(f"{keys.graph}_{layer}", {"x": x[rows], **taken, **tile_.inputs}, outputs)
                tick(rows)
            (k, k_next), (v, v_next) = (k_next, k), (v_next, v)
        del k, v, k_next, v_next, tiles  # the copy below may take their place
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


def tile_rows(keys: Keys, model: ModelConfig, kept: int, memory: int, name: str, enough: int, share: float) -> int:
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
    # The scores of a tile, and the keys of its blocks, are the largest tensors.
    most = MOST_ELEMENTS // (keys.keys_of_row * max(model.n_heads, model.d_model // BLOCK)) // keys.unit * keys.unit
    return min(fit, enough, max(most, keys.unit))


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


def _embed_inputs(
    spots: Spots, some: slice | npt.NDArray[np.int64], gene_rows: Floats, row_of_spot: npt.NDArray[np.int64]
) -> dict[str, Floats]:
    used, gene_row = np.unique(row_of_spot[some], return_inverse=True)  # most spots share the mask's row
    return {
        "features": spots.features[some].astype(gene_rows.dtype, copy=False),
        "organ": spots.organ[some],
        "technology": spots.technology[some],
        "gene_rows": gene_rows[used],
        "gene_row": gene_row,
    }


def _enough(row_bytes: int) -> int:
    return max(1, ENOUGH_BYTES // row_bytes)


def _tiles(n: int, size: int, unit: int) -> Iterator[slice]:
    """Slices that cover n, of nearly the same size, none above `size`, each from a multiple of the unit."""
    units = -(-n // unit)
    count = -(-units // max(1, size // unit))
    for i in range(count):
        yield slice(i * units // count * unit, min(n, (i + 1) * units // count * unit))


def _mebibytes(size: int) -> str:
    return f"{-(-size // 2**20):,} MiB"
