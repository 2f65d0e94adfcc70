"""Nearest spots, and the dense blocks in which attention to them runs.

Gathering k keys for each query moves N * k * d numbers. Instead the spots are cut into compact blocks of 64 rows, a
block takes the union of its queries' neighbours as keys, and the pairs that are not neighbours are masked: on a
hexagonal grid with k = 32 that is one dense 64 x ~190 product a block, and each key is gathered once a block.

N spots, k neighbours, R rows (spots in block order, padded), B rows a block, K keys of a block, U keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..machine import cores
from .sizes import BLOCK, PAD_KEYS
from .threads import each

if TYPE_CHECKING:
    from scipy.spatial import KDTree

Ints = npt.NDArray[np.int64]
STRIP = 20_000  # spots that tell the usual distance of a large slide
QUERIED = 1 << 17  # distances at a time in a thread, so that memory beyond the result does not grow with the spots


def nearest(coords: npt.NDArray[np.generic], k: int) -> Ints:
    """The k nearest spots of each spot, itself among them, [N, min(k, N)].

    Sorted by distance, ties by index, so that the result depends on neither the library nor the order of its tree.
    Distances that differ by no more than the rounding of the coordinates are ties: turning or shifting a slide leaves
    its neighbours as they are. Memory grows with N k, however many spots are at one place.

    Parameters
    ----------
    coords
        [N, 2], in pixels: normalised ones would bend a slide that is not square.

    Examples
    --------
    >>> nearest(np.array([[0, 0], [3, 0], [1, 0]]), 2).tolist()
    [[0, 2], [1, 2], [2, 0]]
    """
    from scipy.spatial import KDTree

    points = np.asarray(coords, np.float64)
    k, rounding = min(k, len(points)), rounding_of(points)
    if len(points) == 0:
        return np.empty((0, 0), np.int64)
    # Spots at one place have the same neighbours, which are found once: [M, 2] places, and the place of each spot.
    spots = np.lexsort(points.T)  # place after place, in each by index
    first = np.append(True, (points[spots[1:]] != points[spots[:-1]]).any(axis=1))  # of its place
    places, start = points[spots[first]], np.append(np.flatnonzero(first), len(points))
    place = np.empty(len(points), np.int64)
    place[spots] = np.cumsum(first) - 1
    tree, neighbors = KDTree(places), np.empty((len(places), k), np.int64)

    def find(part: Ints) -> None:
        waiting = [(part, k + PAD_KEYS)]  # rows, and how many places to look at
        while waiting:
            rows, ask = waiting.pop()
            ask = min(ask, len(places))
            if len(rows) > (most := max(1, QUERIED // ask)):
                waiting.append((rows[most:], ask))
            rows = rows[:most]
            complete = _nearest_of_some(tree, rows, k, ask, rounding, spots, start, neighbors)
            if not complete.all():
                waiting.append((rows[~complete], 2 * ask))

    size = max(1, QUERIED // (k + PAD_KEYS))
    parts = [np.arange(first, min(first + size, len(places))) for first in range(0, len(places), size)]
    for _ in each(find, parts, cores()):
        pass
    return neighbors[place]


def rounding_of(points: npt.NDArray[np.float64]) -> float:
    """By how much distances of points [N, 2] may differ that would be the same without rounding."""
    return float(64 * np.finfo(np.float64).eps * np.abs(points).max(initial=0))


def _nearest_of_some(
    tree: KDTree,
    rows: Ints,
    k: int,
    ask: int,
    rounding: float,
    spots: Ints,
    start: Ints,
    neighbors: Ints,
) -> npt.NDArray[np.bool_]:
    """Write the k nearest spots of some places to their rows of `neighbors` [M, k]; returns which rows are complete.

    Parameters
    ----------
    ask
        How many places to look at. A row is complete if places farther than those tied with its k-th spot were seen.
    spots, start
        The spots of all places, place after place, and where each place's begin.
    """
    counts = np.diff(start)
    distance, near = (np.asarray(part) for part in tree.query(tree.data[rows], k=np.arange(1, ask + 1)))  # [rows, ask]
    group = np.zeros(near.shape, np.int64)  # by distance; ties share one
    np.cumsum(np.diff(distance, axis=1) > rounding, axis=1, out=group[:, 1:])
    last = np.argmax(np.cumsum(counts[near], axis=1) >= k, axis=1)  # the place of the k-th spot
    last_group = np.take_along_axis(group, last[:, None], axis=1)  # [rows, 1]
    complete = (group[:, -1] > last_group[:, 0]) | (ask == tree.n)
    row, column = np.nonzero(complete[:, None] & (group <= last_group))
    place = near[row, column]
    key, spot = (row * ask + group[row, column]) * len(spots), start[place]
    if tree.n < len(spots):  # of a place, no more than the k first spots by index can be among the nearest
        of_place = np.minimum(counts[place], k)
        offset = np.arange(of_place.sum()) - np.repeat(np.cumsum(of_place) - of_place, of_place)
        key, spot = np.repeat(key, of_place), np.repeat(spot, of_place) + offset
    key += spots[spot]
    key.sort(kind="stable")  # by row, then by distance, then by index; nearly sorted, but for ties
    first = np.searchsorted(key, np.flatnonzero(complete) * ask * len(spots))  # of each row
    neighbors[rows[complete]] = key[first[:, None] + np.arange(k)] % len(spots)
    return complete


def usual_distance(coords: npt.NDArray[np.generic]) -> float:
    """The median distance of a spot to its nearest other, in the unit of the coordinates [N, 2]; 0 for one spot.

    Of a large slide, of those in a strip across its middle.
    """
    from scipy.spatial import KDTree

    if len(coords) > 2 * STRIP:
        first = (len(coords) - STRIP) // 2
        coords = coords[np.argpartition(coords[:, 0], [first, first + STRIP])[first : first + STRIP]]
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

    @property
    def planning_bytes(self) -> int:
        """Peak bytes of planning: neighbours, once by place and once by spot, and what is sorted."""
        n, k = len(self.row), int(self.place.shape[1])
        return n * (20 * k + 100) + 96 * min(cores() * QUERIED, n * (k + PAD_KEYS))

    def tile(self, blocks: slice) -> TileKeys:
        """The keys of successive blocks."""
        start, stop = self.key_start[blocks.start], self.key_start[blocks.stop]
        counts = np.diff(self.key_start[blocks.start : blocks.stop + 1])
        rows, key = np.unique(self.key_row[start:stop], return_inverse=True)
        width = -(-int(counts.max()) // PAD_KEYS) * PAD_KEYS
        index = np.zeros((len(counts), width), np.int64)
        index[np.arange(width) < counts[:, None]] = key
        place = self.place[blocks.start * BLOCK : blocks.stop * BLOCK]  # [T, k]
        mask = np.zeros((len(place), width), bool)
        np.put_along_axis(mask, place.astype(np.int64), True, axis=1)
        return TileKeys(rows, index, mask.reshape(len(counts), BLOCK, width))


@dataclass(frozen=True, eq=False)
class TileKeys:
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
    first = np.searchsorted(block[order], np.arange(n_blocks + 1))  # of each block, in `order`
    row = np.empty(n, np.int64)
    row[order] = block[order] * BLOCK + np.arange(n) - first[block[order]]
    rows = n_blocks * BLOCK
    spot = np.full(rows, -1, np.int64)
    spot[row] = np.arange(n)
    place = np.zeros((rows, k), np.int32)
    step = max(1, QUERIED // (k * BLOCK))

    def keys_of(low: int) -> tuple[Ints, Ints]:
        """Of a few blocks, to keep what is sorted small: how many keys each has, and their rows; writes `place`."""
        high = min(low + step, n_blocks)
        members = order[first[low] : first[high]]
        # Each block's distinct keys, sorted: pairs (block, key row) as one number.
        pairs = (block[members] - low)[:, None] * rows + row[neighbors[members]]  # [members, k]
        distinct, inverse = np.unique(pairs, return_inverse=True)
        start = np.searchsorted(distinct, np.arange(high - low + 1) * rows)
        place[row[members]] = inverse.reshape(-1, k) - start[block[members] - low][:, None]
        return np.diff(start), distinct % rows

    counts, key_rows = zip(*each(keys_of, range(0, n_blocks, step), cores()), strict=True)
    key_start = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return Plan(spot, row, key_start, np.concatenate(key_rows), place)
