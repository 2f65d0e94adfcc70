"""Which spots are within an outline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..errors import OptionError

MOST_CORNERS = 10_000


def spots_within(coords: npt.NDArray[np.floating], polygon: Sequence[Sequence[float]]) -> npt.NDArray[np.int64]:
    """The spots whose coordinates [N, 2] are within a polygon [P, 2], by the even-odd rule; it closes by itself.

    Raises
    ------
    InputError
        If the polygon has fewer than 3 corners or more than MOST_CORNERS, or one that is not two finite numbers.

    Examples
    --------
    >>> coords = np.array([[1.0, 1.0], [3.0, 1.0], [9.0, 9.0]])
    >>> spots_within(coords, [[0, 0], [4, 0], [4, 4], [0, 4]]).tolist()
    [0, 1]
    """
    corners = _corners(polygon)
    low, high = corners.min(axis=0), corners.max(axis=0)
    near = np.flatnonzero(((coords >= low) & (coords <= high)).all(axis=1))
    x, y = np.asarray(coords[near], np.float64).T
    inside = np.zeros(len(near), bool)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:  # a ray to the right crosses no edge that lies level
            crosses = (y0 > y) != (y1 > y)
            inside ^= crosses & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return near[inside]


def _corners(polygon: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    try:
        corners = np.asarray(polygon, np.float64)
    except (TypeError, ValueError):
        corners = np.empty(0)
    if corners.ndim != 2 or corners.shape[1] != 2 or not np.isfinite(corners).all():
        raise OptionError("polygon: give its corners as [[x, y], ...], finite numbers in pixels of level 0")
    if not 3 <= len(corners) <= MOST_CORNERS:
        raise OptionError(f"polygon: {len(corners):,} corners; give 3 to {MOST_CORNERS:,}")
    return corners
