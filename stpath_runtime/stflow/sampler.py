"""The stages of an STFlow engine, run over tiles of spots: features, neighbours and starts in, samples out.

    image    : features of a tile                                            -> tokens [T, D]; once for a slide
    edges_l  : frames of a tile [T, k, 3]                                    -> edges [T, k, E]; once, where they fit
    layer_1  : tokens and states of a tile and of its neighbours, edges, time -> h [T, B, D], y [T, B, G]
    layer_l  : h, y, edges, and the sum of the earlier y                     -> h, y, sum
    layer_L  : these, the state that the step began with, and its rate       -> the state that the next begins with

Spots are in the order of compact blocks, so that the neighbours of a tile are few. B samples share tokens and edges.
Only h and y of the whole slide are kept, twice, as a layer reads its neighbours' while it writes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import Array, Backend, Workspace
from ..encoding.encoder import most_rows, rounded_down, row_slices
from ..encoding.neighbors import cut
from ..encoding.sizes import DTYPES, SAMPLES_AT_ONCE
from ..encoding.threads import each
from ..errors import MemoryLimitError, SlideError
from ..manifest import FlowConfig
from ..progress import OnTile
from .geometry import Neighborhoods

Floats = npt.NDArray[Any]

FIRST_TIME = 0.01
# Spots of a tile, and of one of several samples: its numbers stay in a core's cache, and its neighbours are few.
TILE, TILE_OF_SAMPLES = 128, 64
COMPACT = 64  # spots of a block
LEAST = 32  # spots for which a second tile at once pays
KEPT_EDGES = 1 << 29  # bytes: those of 32,000 spots; computing them anew takes half as long again
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class _Tile:
    """The inputs of a tile that no step changes."""

    rows: slice
    keys: Array  # [U], the rows of its spots, and then of their neighbours
    neighbors: Array  # [T, k], into the keys
    frames: Floats  # [T, k, 3]


@dataclass(frozen=True)
class _Sizes:
    """What a run takes, in bytes and spots."""

    tile: int
    at_once: int  # tiles
    samples: int  # at once
    layers: int  # whose edges are kept


def sample(
    backend: Backend,
    config: FlowConfig,
    precision: str,
    features: Floats,
    around: Neighborhoods,
    coords: npt.NDArray[Any],
    start: Callable[[int], Floats],
    samples: int,
    steps: int,
    name: str,
    memory: int | None = None,
    tile: int | None = None,
    layers: int | None = None,
    on_tile: OnTile | None = None,
) -> Iterator[npt.NDArray[np.float32]]:
    """Samples of the expression, log1p of raw counts, [N, G] each.

    Parameters
    ----------
    features
        [N, F].
    around
        The neighbours of the spots, and their frames.
    coords
        [N, 2]; by them spots that are near are put into one tile.
    start
        Gives the state to begin with, [N, G], of the sample of a number.
    steps
        Points of the time grid, from 2.
    name
        What messages call the slide.
    memory
        Bytes that this may take beyond what it is given; None means half of what the device has available.
    tile
        Spots in a tile; None means as many as pay, within the memory.
    layers
        Of how many layers edges are kept, and not computed anew in each step; None means as the memory allows.
    on_tile
        Called after each tile with the work done and to do.

    Raises
    ------
    InputError
        If the memory is too small for one tile, or the model gives no numbers.
    """
    n, dtype = len(features), DTYPES[precision]
    sizes = _sizes(backend, config, around.neighbors.shape[1], n, samples, np.dtype(dtype).itemsize, memory, name)
    size, at_once = tile or sizes.tile, sizes.at_once
    order = np.argsort(cut(np.asarray(coords, np.float64), COMPACT), kind="stable")
    groups = list(row_slices(samples, sizes.samples, 1))
    done, total = 0, n * (1 + len(groups) * (steps - 1) * config.n_layers)

    def tick(rows: slice) -> None:
        nonlocal done
        done += rows.stop - rows.start
        if on_tile is not None:
            on_tile(done, total)

    with backend.workspace() as at:
        slide = _Slide(at, config, dtype, order)
        parts = list(row_slices(n, min(most_rows(config.n_features * 4), 8 * size), 1, at_once))
        for rows in each(partial(slide.embed, features), parts, at_once):
            tick(rows)
        tiles = slide.tiles(around, list(row_slices(n, size, 1, at_once)))
        slide.keep_edges(sizes.layers if layers is None else layers, tiles, at_once)
        for group in groups:
            slide.begin(list(each(start, range(group.start, group.stop), at_once)))
            for step, time in enumerate(times(steps)):
                for layer in range(1, config.n_layers + 1):
                    for rows in each(partial(slide.run, layer, time, 1 / (steps - 1 - step)), tiles, at_once):
                        tick(rows)
                    slide.turn(layer)
            found = slide.result()
            _require_finite(found, name, precision)
            yield from found


def _require_finite(found: npt.NDArray[np.float32], name: str, precision: str) -> None:
    finite = np.isfinite(found).all(axis=(0, 2))
    if not finite.all():
        raise SlideError(
            f"{name}: the model gives NaN or infinity at {int((~finite).sum()):,} spots, the first at spot "
            f"{int(np.argmin(finite))}; its features are too large, or too large for {precision}"
        )


class _Slide:
    """The arrays of a slide in the memory of the device, its rows in the order of compact blocks."""

    def __init__(self, at: Workspace, config: FlowConfig, dtype: npt.DTypeLike, order: npt.NDArray[np.int64]) -> None:
        self.at, self.config, self.dtype, self.order = at, config, dtype, order
        self.tokens = at.zeros("tokens", (len(order), config.d_model), dtype)
        self.edges: list[Array] = []  # of the first layers [N, k, E]; of others they are computed anew in each step

    def begin(self, starts: Sequence[Floats]) -> None:
        """Take the states of the samples that run together [N, G] each, and make room for what layers pass on."""
        n, samples, genes = len(self.order), len(starts), self.config.n_genes
        given = np.empty((n, samples, genes), self.dtype)
        for i, start in enumerate(starts):
            given[:, i] = start[self.order]
        self.state = self.at.zeros("state", given.shape, self.dtype)
        self.at.put(given, self.state)
        self.y, self.y_next, self.total = (
            self.at.zeros(name, given.shape, self.dtype) for name in ("y", "y_next", "total")
        )
        passed_on = (n if self.config.n_layers > 1 else 0, samples, self.config.d_model)
        self.h, self.h_next = (self.at.zeros(name, passed_on, self.dtype) for name in ("h", "h_next"))

    def result(self) -> npt.NDArray[np.float32]:
        """The states of the samples, [B, N, G], in the order of the spots."""
        state = self.at.fetch(self.state)  # [N, B, G]
        found = np.empty((state.shape[1], len(self.order), state.shape[2]), np.float32)
        found[:, self.order] = state.swapaxes(0, 1)
        return found

    def embed(self, features: Floats, rows: slice) -> slice:
        """Tokens of the features of these rows."""
        given = features[self.order[rows]].astype(self.dtype, copy=False)
        self.at.run("image", {"features": given}, {"tokens": self.tokens[rows]})
        return rows

    def tiles(self, around: Neighborhoods, parts: Sequence[slice]) -> list[_Tile]:
        """Tiles of these rows, with the neighbours of each."""
        row = np.empty(len(self.order), np.int64)
        row[self.order] = np.arange(len(self.order))
        tiles = []
        for i, rows in enumerate(parts):
            spots = self.order[rows]
            index = row[around.neighbors[spots]]
            others = np.setdiff1d(index, np.arange(rows.start, rows.stop))
            keys = np.concatenate([np.arange(rows.start, rows.stop), others])
            inside = (index >= rows.start) & (index < rows.stop)
            place = np.where(inside, index - rows.start, len(spots) + np.searchsorted(others, index))
            kept = self.at.keep(f"keys {i}", keys), self.at.keep(f"neighbors {i}", place)
            tiles.append(_Tile(rows, *kept, around.frames[spots]))
        return tiles

    def keep_edges(self, layers: int, tiles: Sequence[_Tile], at_once: int) -> None:
        """Compute the edges of so many layers."""
        for layer in range(1, layers + 1):
            self.edges.append(self._new_edges(len(self.order), tiles[0], f"edges {layer}"))
            for _ in each(partial(self._edges, layer, self.edges[-1]), tiles, at_once):
                pass

    def run(self, layer: int, time: float, rate: float, tile: _Tile) -> slice:
        """A layer, of a tile."""
        rows, first, last = tile.rows, layer == 1, layer == self.config.n_layers
        inputs = {"tokens": self.tokens, "y": self.state} if first else {"h": self.h, "y": self.y}
        if layer <= len(self.edges):
            edges = self.edges[layer - 1][rows]
        else:
            edges = self._new_edges(rows.stop - rows.start, tile, "edges of a tile")
            self._edges(layer, edges, replace(tile, rows=ALL))
        inputs |= {"keys": tile.keys, "neighbors": tile.neighbors, "edges": edges}
        if first:
            inputs["time"] = np.array([time], np.float32)
        else:
            inputs["total"] = (self.y if layer == 2 else self.total)[rows]
        if last:
            inputs |= {"state": self.state[rows], "rate": np.array([rate], np.float32)}
            outputs = {"state_next": self.y_next[rows]}
        else:
            outputs = {"h_next": self.h_next[rows], "y_next": self.y_next[rows]}
            outputs |= {} if first else {"total_next": self.total[rows]}
        self.at.run(f"layer_{layer}", inputs, outputs)
        return rows

    def turn(self, layer: int) -> None:
        """What all tiles of a layer wrote is what the next layer reads; after the last one, the next step."""
        if layer == self.config.n_layers:
            self.state, self.y_next = self.y_next, self.state
        else:
            self.h, self.h_next = self.h_next, self.h
            self.y, self.y_next = self.y_next, self.y

    def _new_edges(self, n: int, tile: _Tile, name: str) -> Array:
        return self.at.zeros(name, (n, tile.frames.shape[1], self.config.d_edge), self.dtype)

    def _edges(self, layer: int, edges: Array, tile: _Tile) -> None:
        """Compute the edges of a tile into its rows of an array."""
        self.at.run(f"edges_{layer}", {"frames": tile.frames}, {"edges": edges[tile.rows]})


def times(steps: int) -> list[float]:
    """The times of the evaluations: those of a grid of so many points from 0.01 to 1, but for its last.

    Examples
    --------
    >>> times(3)
    [0.01, 0.505]
    """
    return [FIRST_TIME + (1 - FIRST_TIME) * step / (steps - 1) for step in range(steps - 1)]


def _sizes(
    backend: Backend, config: FlowConfig, k: int, n: int, samples: int, itemsize: int, memory: int | None, name: str
) -> _Sizes:
    """Spots of a tile, tiles and samples at once, and whether edges are kept: as memory allows.

    Raises
    ------
    InputError
        If not even a tile of one spot fits; the message gives the least that works.
    """
    d, genes, edge = config.d_model, config.n_genes, config.d_edge
    kept_edges = KEPT_EDGES if memory is None else memory
    memory = memory if memory is not None else backend.available_memory() // 2
    graphs = 2 * config.n_layers if backend.keeps_tiles else 1

    def least(together: int) -> tuple[int, int]:
        """Bytes of the slide, and of a tile's row."""
        slide = n * (d + 2 * together * d * (config.n_layers > 1) + 4 * together * genes) * itemsize
        slide += n * (2 * k * 8 + 3 * k * 4)  # neighbours, as spots and as rows of a tile, and frames
        slide += 2 * n * together * genes * 4  # starts, and results
        # Of a pair: the sums of a score and their parts; of a spot and its neighbours: keys, values, states.
        pair = 4 * together * config.n_heads * d + 2 * config.n_heads * d + 8 * edge + together * 2 * d
        spot = 3 * together * (config.n_heads * d + 4 * d + genes) + together * 8 * d + config.n_features
        return slide, (k * pair + spot) * 4 * graphs

    together = min(samples, SAMPLES_AT_ONCE)
    while together > 1 and sum(least(together)) > memory:
        together -= 1
    slide, row = least(together)
    if memory < slide + row:
        raise MemoryLimitError(
            f"{name}: {rounded_down(memory)} of memory cannot hold one tile of {n:,} spots; the least that works is "
            f"{-(-(slide + row) // 2**20):,} MiB (--memory)"
        )
    at_once = max(1, min(backend.tiles_at_once, (memory - slide) // row, n // LEAST))
    wanted = TILE if together == 1 else TILE_OF_SAMPLES
    size = max(1, min(wanted if at_once > 1 else backend.most_rows // together, (memory - slide) // (row * at_once)))
    left = min(memory - slide - at_once * size * row, kept_edges)
    return _Sizes(size, at_once, together, max(0, min(config.n_layers, left // (n * k * edge * itemsize))))
