"""Pictures of a slide image: its tissue and tiles as they were taken, and its tissue as scanpy and squidpy draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import written_whole
from .sources import View
from .tissue import Overview, shrunk

HIRES, LOWRES = 2_000, 600  # pixels of the longer side, at most, as Space Ranger's
OUTSIDE = 0.45  # how much of a picture's white is mixed into what is no tissue
TILE, EDGE = (34, 94, 168), (227, 26, 28)  # colours of a tile's frame, and of the tissue's edge


def draw_tiles(view: View, path: Path) -> None:
    """Write a PNG of an image with the tissue's edge in red, and the tiles that were taken in blue.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    from PIL import Image, ImageDraw

    overview, grid = view.overview, view.grid
    height, width, _ = overview.pixels.shape
    taken = np.zeros((height, width), bool)
    boxes = np.concatenate([grid.corners, grid.corners + grid.side], axis=1) / overview.scale
    for left, top, right, bottom in boxes.round().astype(int).clip(0).tolist():
        taken[top : bottom + 1, left : right + 1] = True
    pixels = overview.pixels.copy()
    pixels[~taken] = (255 - (255 - np.arange(256)) * (1 - OUTSIDE)).astype(np.uint8)[pixels[~taken]]
    if view.tissue is not None:
        pixels[_edge(view, height, width)] = EDGE
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for left, top, right, bottom in boxes.tolist():
        draw.rectangle((left, top, right, bottom), outline=TILE)
    with written_whole(path) as partial:
        picture.save(partial, format="PNG", compress_level=3)


def spatial_of(overview: Overview, side: float, microns_a_pixel: float) -> dict[str, Any]:
    """What scanpy and squidpy look for in `uns["spatial"][library]`: pictures of the tissue, and how they scale.

    Parameters
    ----------
    side
        Pixels of level 0 that a tile spans: spots are drawn so wide.

    Source: https://scanpy.readthedocs.io/en/stable/generated/scanpy.read_visium.html.
    """
    images, scales = {}, {}
    for name, longest in (("hires", HIRES), ("lowres", LOWRES)):
        times = -(-max(overview.pixels.shape[:2]) // longest)
        images[name] = shrunk(overview.pixels, times)
        scales[f"tissue_{name}_scalef"] = 1 / (overview.scale * times)
    return {
        "images": images,
        "scalefactors": {**scales, "spot_diameter_fullres": side, "fiducial_diameter_fullres": side},
        "metadata": {"microns_a_pixel": microns_a_pixel},
    }


def _edge(view: View, height: int, width: int) -> npt.NDArray[np.bool_]:
    """Pixels of the picture that are tissue, next to one that is not."""
    from scipy import ndimage

    assert view.tissue is not None
    scale = view.overview.scale / view.tissue.scale
    mask = view.tissue.pieces > 0
    rows, columns = (
        np.minimum(((np.arange(n) + 0.5) * scale).astype(int), m - 1)
        for n, m in zip((height, width), mask.shape, strict=True)
    )
    large = mask[rows][:, columns]
    edge: npt.NDArray[np.bool_] = large & ~ndimage.binary_erosion(large, iterations=2, border_value=1)
    return edge
