"""What STFlow takes of where the spots are: the nearest others of each, and where they are in its frame.

N spots, k neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.neighbors import nearest, rounding_of
from ..errors import SlideError

Ints = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]

DEGENERATE = 1e-6  # a relative gap between the axes below which rounding may choose them
AT_ONCE = 1 << 15  # spots whose frames are computed together


@dataclass(frozen=True, eq=False)
class Neighborhoods:
    """The neighbours of every spot, and where they are.

    Parameters
    ----------
    neighbors
        [N, min(k, N)].
    frames
        [N, min(k, N), 3], float32: along the smaller and the larger axis, and the distance.
    degenerate
        Spots whose axes are equal but for rounding, so that a turned slide may give others.
    tied
        Spots of which a further one is as far as the last neighbour: the one of lower index was taken.
    """

    neighbors: Ints
    frames: npt.NDArray[np.float32]
    degenerate: int
    tied: int

    @classmethod
    def of(cls, coords: npt.NDArray[Any], k: int, neighbor_index: npt.NDArray[Any] | None = None) -> Neighborhoods:
        """Find them, or take the neighbours that are given.

        Raises
        ------
        InputError
            If the given ones are of another shape or outside the slide.
        """
        points, tied = np.asarray(coords, np.float64), 0
        if neighbor_index is None:
            neighbors, tied = nearest_others(points, k)
        else:
            neighbors = checked_neighbors(neighbor_index, len(points), k)
        frames = np.empty((*neighbors.shape, 3), np.float32)
        degenerate = 0
        for part, axes, gap in frames_of(points, neighbors):
            frames[part] = axes
            degenerate += int((gap < DEGENERATE).sum())
        return cls(neighbors, frames, degenerate, tied)


def neighbors_of(coords: npt.NDArray[Any], k: int) -> Ints:
    """The k nearest other spots of each, [N, min(k, N)]; of a slide of k or fewer all, and last the spot itself.

    Sorted by distance, ties by index.

    Examples
    --------
    >>> neighbors_of(np.array([[0, 0], [3, 0], [1, 0]]), 1).tolist()
    [[2], [2], [0]]
    >>> neighbors_of(np.array([[0, 0], [3, 0]]), 8).tolist()
    [[1, 0], [0, 1]]
    """
    return nearest_others(coords, k)[0]


def nearest_others(coords: npt.NDArray[Any], k: int) -> tuple[Ints, int]:
    """What `neighbors_of` gives, and of how many spots the next one is as far as the last neighbour."""
    points = np.asarray(coords, np.float64)
    n = len(points)
    near = nearest(points, k + 2)  # itself, and one more than are wanted
    itself = near == np.arange(n)[:, None]  # among spots at one place it may not be there
    near = np.take_along_axis(near, np.argsort(itself, axis=1, kind="stable"), axis=1)
    if n <= k:
        return near, 0
    tied = 0
    if n > k + 1:
        far = np.hypot(*(points[near[:, k - 1 : k + 1]] - points[:, None]).transpose(2, 0, 1))  # [N, 2]
        tied = int((far[:, 1] - far[:, 0] <= rounding_of(points)).sum())
    return near[:, :k], tied


def checked_neighbors(neighbor_index: npt.NDArray[Any], n: int, k: int) -> Ints:
    """Neighbours that a user gives, as they are.

    Raises
    ------
    InputError
        If they are of another shape, no whole numbers, or outside the slide.
    """
    given = np.asarray(neighbor_index)
    if given.shape != (n, min(k, n)) or given.dtype.kind not in "iu":
        raise SlideError(
            f"neighbor_index: {given.dtype} of shape {list(given.shape)}; expected whole numbers [{n}, {min(k, n)}], "
            "the neighbours of each spot"
        )
    if given.size and (given.min() < 0 or given.max() >= n):
        spot = int(np.flatnonzero(((given < 0) | (given >= n)).any(axis=1))[0])
        raise SlideError(
            f"neighbor_index: spot {spot} has the neighbours {given[spot].tolist()}; a slide of {n:,} spots has "
            f"0 to {n - 1}"
        )
    return given.astype(np.int64)


def frames_of(coords: Doubles, neighbors: Ints) -> Iterator[tuple[slice, Doubles, Doubles]]:
    """Where neighbours are, in a frame of their spot that turns with the slide, of some spots at a time.

    The axes are those of the covariance [[p, q], [q, s]] of the neighbours' places, in closed form, and their signs are
    free. Source: STFlow (Huang et al., ICML 2025), which takes them from an eigendecomposition.

    Parameters
    ----------
    coords
        [N, 2].
    neighbors
        [N, k].

    Yields
    ------
    Which spots; their frames [n, k, 3]: coordinates along the smaller axis, along the larger one, and the distance; and
    the relative gap of the axes [n], the difference of their squared lengths over the sum, 0 where both are 0.

    Examples
    --------
    >>> ((part, frames, gap),) = frames_of(np.array([[0.0, 0], [3, 0]]), np.array([[1, 0], [0, 1]]))
    >>> np.abs(frames[0]).tolist(), gap.tolist()
    ([[0.0, 1.5, 3.0], [0.0, 1.5, 0.0]], [1.0, 1.0])
    """
    for start in range(0, len(neighbors), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, len(neighbors)))
        dx, dy = (coords[neighbors[part]] - coords[part, None]).transpose(2, 0, 1)  # [n, k] each
        r = np.sqrt(dx * dx + dy * dy)
        k = dx.shape[1]
        x, y = dx - (_sum(dx) * (1 / k))[:, None], dy - (_sum(dy) * (1 / k))[:, None]
        p, s, q = _sum(x * x), _sum(y * y), _sum(x * y)  # [n], of the covariance [[p, q], [q, s]]
        d = (p - s) / 2
        h = np.sqrt(d * d + q * q)
        c = h + np.abs(d)
        length = np.sqrt(c * c + q * q)
        known = length > 0
        first, second = (value / np.where(known, length, 1) for value in (c, q))
        larger_x = np.where(known, np.where(d >= 0, first, second), 0.0)[:, None]
        larger_y = np.where(known, np.where(d >= 0, second, first), 1.0)[:, None]
        frames = np.stack([x * larger_y - y * larger_x, x * larger_x + y * larger_y, r], axis=-1)
        both = (p + s) / 2
        yield part, frames, h / np.where(both > 0, both, 1)


def _sum(values: Doubles) -> Doubles:
    """The sum over the last axis, in its order, which no version of a library changes."""
    return sum((values[..., i] for i in range(1, values.shape[-1])), values[..., 0])
