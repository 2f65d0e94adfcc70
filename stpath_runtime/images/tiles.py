"""Tiles: squares of tissue at one scale, whatever the scale of the image.

A tile of 112 um at 224 pixels wants 0.5 um a pixel. A level within 2% of that is taken as it is; else the tile is cut
from the coarsest level that is at least as fine, and resampled as HEST does: bilinear, without antialiasing, the
centres of pixels as the positions (for exactly twice as fine: the mean of 2 x 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import warn
from .reading import NEAR, Pixels, SlideImage


@dataclass(frozen=True)
class TileReader:
    """Reads tiles of an image; make one with `TileReader.of`."""

    image: SlideImage
    size: int  #: pixels of a tile's side, as it is given out
    side: int  #: pixels of level 0 that it spans
    level: int  #: from which it is cut
    cut: int  #: pixels of that level that it spans

    @classmethod
    def of(cls, image: SlideImage, microns: float, size: int) -> TileReader:
        """Choose the level for tiles of so many um and pixels; a level that is coarser than they want warns."""
        scales = [image.microns_a_pixel * level.downsample for level in image.levels]
        wanted, side = microns / size, round(microns / image.microns_a_pixel)
        near = [i for i, scale in enumerate(scales) if abs(scale / wanted - 1) <= NEAR]
        if near:
            level = min(near, key=lambda i: abs(scales[i] - wanted))
            return cls(image, size, side, level, size)
        finer = [i for i, scale in enumerate(scales) if scale < wanted]
        if not finer:
            warn(
                f"{image.path}: its finest level is {scales[0]:g} um a pixel, coarser than the {wanted:g} that the "
                "encoder wants; tiles are enlarged"
            )
        level = max(finer, key=lambda i: scales[i]) if finer else 0
        return cls(image, size, side, level, max(1, round(microns / scales[level])))

    def read(self, x: int, y: int) -> Pixels:
        """The tile [size, size, 3] whose top left corner is at (x, y) of level 0."""
        return resampled(self.image.read(self.level, x, y, self.cut, self.cut), self.size)


def resampled(pixels: Pixels, size: int) -> Pixels:
    """A square [w, w, 3] at another size, bilinear without antialiasing.

    Pixel i of the result is at (i + 1/2) w / size - 1/2 of the square, between its two nearest pixels; at the edges
    there is one. Source of the formula: what HEST-1k cuts patches by (https://github.com/mahmoodlab/HEST).

    Examples
    --------
    >>> resampled(np.array([[[0], [2]], [[4], [6]]], np.uint8).repeat(3, axis=2), 1)[0, 0].tolist()
    [3, 3, 3]
    """
    width = len(pixels)
    if width == size:
        return pixels
    if width == 2 * size:  # the same, in whole numbers
        four = pixels.reshape(size, 2, size, 2, 3).sum(axis=(1, 3), dtype=np.uint16)
        mean: Pixels = ((four + 2) >> 2).astype(np.uint8)
        return mean
    low, high, share = _positions(width, size)
    rows = pixels[low] * (1 - share)[:, None, None] + pixels[high] * share[:, None, None]  # [size, w, 3]
    both = rows[:, low] * (1 - share)[:, None] + rows[:, high] * share[:, None]
    found: Pixels = np.floor(both + 0.5).astype(np.uint8)
    return found


def _positions(width: int, size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """For each pixel of the result: its two nearest of the square, and the share of the second."""
    at = np.clip((np.arange(size) + 0.5) * (width / size) - 0.5, 0, width - 1)
    low = np.floor(at).astype(np.int64)
    return low, np.minimum(low + 1, width - 1), at - low
