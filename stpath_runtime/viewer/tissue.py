"""The tissue below the spots: a slide image, or the picture of it that a prediction keeps, in tiles of a pyramid."""

from __future__ import annotations

import io
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..images.reading import SlideImage

TILE = 256  # pixels of a tile's side
QUALITY = 80  # of JPEG
Pixels = npt.NDArray[np.uint8]  # [height, width, 3]


class Picture(Protocol):
    """What is below the spots."""

    size: tuple[int, int]  # pixels of level 0, width and height

    def square(self, left: int, top: int, span: int) -> Pixels:
        """A square of level 0 that spans so many pixels, as [TILE, TILE, 3]; what is outside is white."""
        ...


class OfSlide:
    """A slide image."""

    def __init__(self, image: SlideImage) -> None:
        self.image, self.size = image, image.levels[0].size

    def square(self, left: int, top: int, span: int) -> Pixels:
        """As `Picture.square`, from the coarsest level that is fine enough."""
        from PIL import Image

        levels = self.image.levels
        finer = [i for i, level in enumerate(levels) if level.downsample <= span / TILE * 1.01]
        best = max(finer, key=lambda i: levels[i].downsample)
        side = max(1, round(span / levels[best].downsample))
        pixels = self.image.read(best, left, top, side, side)
        if side == TILE:
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BOX))


class OfPrediction:
    """The picture [height, width, 3] in `uns["spatial"]`, each of whose pixels spans `scale` of level 0."""

    def __init__(self, pixels: Pixels, scale: float) -> None:
        self.pixels, self.scale = pixels, scale
        self.size = round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)

    def square(self, left: int, top: int, span: int) -> Pixels:
        """As `Picture.square`."""
        from PIL import Image

        box = np.array([left, top, left + span, top + span]) / self.scale  # of the picture, in fractions of its pixels
        (x0, y0), (x1, y1) = np.floor(box[:2]).astype(int).tolist(), np.ceil(box[2:]).astype(int).tolist()
        part = np.full((y1 - y0, x1 - x0, 3), 255, np.uint8)
        found = self.pixels[y0:y1, x0:x1]
        part[: found.shape[0], : found.shape[1]] = found
        x, y, right, bottom = (box - [x0, y0, x0, y0]).tolist()
        square = Image.fromarray(part).resize((TILE, TILE), Image.Resampling.BILINEAR, box=(x, y, right, bottom))
        return np.asarray(square)


class Tissue:
    """Tiles of TILE x TILE pixels. A pixel of level L spans 2**L of the slide's level 0; tile (0, 0) begins there."""

    def __init__(self, picture: Picture) -> None:
        self.picture = picture

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of level 0, width and height."""
        return self.picture.size

    @cached_property
    def levels(self) -> int:
        """Of the pyramid; the last is one tile."""
        return max(1, int(np.ceil(np.log2(max(self.size) / TILE))) + 1)

    def tile(self, level: int, x: int, y: int) -> bytes:
        """A tile as JPEG.

        Raises
        ------
        OptionError
            If there is no such tile.
        """
        from PIL import Image

        width, height = self.size
        if not 0 <= level < self.levels or not (0 <= x * TILE << level < width and 0 <= y * TILE << level < height):
            raise OptionError(f"tile {level}/{x}/{y}: the tissue has none such")
        span = TILE << level
        written = io.BytesIO()
        Image.fromarray(self.picture.square(x * span, y * span, span)).save(written, "JPEG", quality=QUALITY)
        return written.getvalue()
