"""Nearest spots, and the dense blocks in which attention to them runs.

Gathering k keys for each query moves N * k * d numbers. Instead the spots are cut into compact blocks of 64 rows, a
block takes the union of its queries' neighbours as keys, and the pairs that are not neighbours are masked: on a
hexagonal grid with k = 32 that is one dense 64 x ~190 product a block, and each key is gathered once a block.

N spots, k neighbours, R rows (spots in block order, padded), B rows a block, K keys of a block, U keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

BLOCK = 64  # rows of a block; fixed in the exported graphs
PAD_KEYS = 8  # GPU kernels want the number of keys to be a multiple of 8


def nearest(coords: npt.NDArray[np.generic], k: int) -> Ints:
    """The k nearest spots of each spot, itself among them, [N, min(k, N)].

    Sorted by distance, ties by index, so that the result depends on neither the library nor the order of its tree.
    Distances that differ by no more than the rounding of the coordinates are ties: turning or shifting a slide leaves
    its neighbours as they are.

    Parameters
    ----------
    coords
        [N, 2], in pixels: normalised ones would bend a slide that is not square.
    """
    from scipy.spatial import KDTree

    points = np.asarray(coords, np.float64)
    n, k = len(points), min(k, len(points))
    rounding = 64 * np.finfo(np.float64).eps * np.abs(points).max(initial=0)
    tree = KDTree(points)
    found = np.empty((n, k), np.int64)
    left, ask = np.arange(n), k + PAD_KEYS
    while len(left):
        ask = min(ask, n)
        distance, index = tree.query(points[left], k=np.arange(1, ask + 1))  # [left, ask], sorted
        group = np.zeros(index.shape, np.int64)
        np.cumsum(np.diff(distance, axis=1) > rounding, axis=1, out=group[:, 1:])
        index = np.sort(group * n + index, axis=1) % n  # by distance, then by index
        # Complete when a farther group than the k-th spot's was seen: no tie of it is missing.
        done = (group[:, -1] > group[:, k - 1]) | (ask == n)
        found[left[done]] = index[done, :k]
        left, ask = left[~done], 2 * ask
    return found


def usual_distance(coords: npt.NDArray[np.generic]) -> float:
    """The median distance of a spot to its nearest, in the unit of the coordinates [N, 2]; 0 where there is but one."""
    from scipy.spatial import KDTree

    distinct = np.unique(coords, axis=0)
    if len(distinct) < 2:
        return 0.0
    distance, _ = KDTree(distinct).query(distinct[:: max(1, len(distinct) // 2000)], k=2)
    return float(np.median(np.asarray(distance)[:, 1]))


@dataclass(frozen=True, eq=False)
class Plan:
    """Blocks of one or more slides, and the keys of each."""

    spot: Ints  #: [R], the spot of each row; -1 in rows that pad a block
    row: Ints  #: [N], the row of each spot
    key_start: Ints  #: [blocks + 1], where a block's keys begin in key_row
    key_row: Ints  #: the rows that are a block's keys, block after block, each sorted
    place: npt.NDArray[np.int32]  #: [R, k], where in its block's keys a row's neighbours are; rows that pad: 0

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return len(self.key_start) - 1

    def tile(self, blocks: slice) -> Tile:
        """The keys of some successive blocks."""
        start, stop = self.key_start[blocks.start], self.key_start[blocks.stop]
        counts = np.diff(self.key_start[blocks.start : blocks.stop + 1])
        rows, key = np.unique(self.key_row[start:stop], return_inverse=True)
        width = -(-int(counts.max()) // PAD_KEYS) * PAD_KEYS
        index = np.zeros((len(counts), width), np.int64)
        index[np.arange(width) < counts[:, None]] = key
        place = self.place[blocks.start * BLOCK : blocks.stop * BLOCK]  # [T, k]
        mask = np.zeros((len(place), width), bool)
        np.put_along_axis(mask, place.astype(np.int64), True, axis=1)
        return Tile(rows, index, mask.reshape(len(counts), BLOCK, width))


@dataclass(frozen=True, eq=False)
class Tile:
    """The keys of a tile of blocks: only the rows that they name."""

    rows: Ints  # [U], rows of the plan
    key_index: Ints  # [blocks, K], positions in `rows`; 0 where padded
    mask: npt.NDArray[np.bool_]  # [blocks, B, K], which pairs are neighbours


def plan_blocks(slides: Sequence[npt.NDArray[np.generic]], k: int) -> Plan:
    """Blocks and keys of slides, given the pixel coordinates of each; no block or neighbour crosses slides."""
    neighbors, blocks = [], []
    spots = n_blocks = 0
    for coords in slides:
        n = len(coords)
        near = (nearest(coords, k) if k < n else np.tile(np.arange(n), (n, 1))) + spots
        # A slide of fewer than k spots has fewer neighbours: the last is repeated, which masks nothing more.
        neighbors.append(np.pad(near, ((0, 0), (0, k - near.shape[1])), mode="edge") if len(slides) > 1 else near)
        block = cut(np.asarray(coords, np.float64), BLOCK)
        blocks.append(block + n_blocks)
        spots, n_blocks = spots + n, n_blocks + int(block.max()) + 1
    return _assemble(np.concatenate(neighbors), np.concatenate(blocks), n_blocks)


def cut(points: npt.NDArray[np.float64], size: int) -> Ints:
    """The block of each point, [N]: recursive median cuts across the longer side, until none is above `size`.

    Blocks are numbered in the order of the tree, so that those of near numbers are near, and their sizes differ by
    at most one.
    """
    n = len(points)
    n_blocks = -(-n // size)
    order = np.arange(n)
    # Nodes of one level of the tree: where their points start, and the blocks that they hold.
    start, leaves = np.array([0, n]), np.array([n_blocks])
    while leaves.max() > 1:
        node = np.repeat(np.arange(len(leaves)), np.diff(start))
        low = np.minimum.reduceat(points[order], start[:-1], axis=0)
        high = np.maximum.reduceat(points[order], start[:-1], axis=0)
        axis = np.argmax(high - low, axis=1)
        value = points[order, axis[node]]
        order = order[np.lexsort((order, value, node))]
        left = (leaves + 1) // 2
        middle = start[:-1] + np.diff(start) * left // leaves
        start = np.append(np.column_stack([start[:-1], middle]).ravel(), n)
        leaves = np.column_stack([left, leaves - left]).ravel()
        kept = leaves > 0  # a node of one block has an empty right half
        start, leaves = np.append(start[:-1][kept], n), leaves[kept]
    block = np.empty(n, np.int64)
    block[order] = np.repeat(np.arange(len(leaves)), np.diff(start))
    return block


def _assemble(neighbors: Ints, block: Ints, n_blocks: int) -> Plan:
    n, k = neighbors.shape
    order = np.argsort(block, kind="stable")
    first = np.searchsorted(block[order], np.arange(n_blocks))
    row = np.empty(n, np.int64)
    row[order] = block[order] * BLOCK + np.arange(n) - first[block[order]]
    spot = np.full(n_blocks * BLOCK, -1, np.int64)
    spot[row] = np.arange(n)
    # Each block's distinct keys, sorted: pairs (block, key row) as one number.
    rows = n_blocks * BLOCK
    pairs = block[:, None] * rows + row[neighbors]  # [N, k]
    distinct, inverse = np.unique(pairs, return_inverse=True)
    key_start = np.searchsorted(distinct, np.arange(n_blocks + 1) * rows)
    place = np.zeros((rows, k), np.int32)
    place[row] = inverse.reshape(n, k) - key_start[block][:, None]
    return Plan(spot, row, key_start, distinct % rows, place)
