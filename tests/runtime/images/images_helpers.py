"""Slide images that the tests make."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

MPP = 0.5


def tissue_pixels(
    width: int = 1400, height: int = 1000, pieces=((100, 150, 620, 800), (800, 150, 1300, 700))
) -> np.ndarray:
    """RGB pixels of glass with pieces of tissue, each (left, top, right, bottom), noisy and stained."""
    rng = np.random.default_rng(0)
    pixels = np.full((height, width, 3), 242, np.float32) + rng.normal(0, 2, (height, width, 1))
    for left, top, right, bottom in pieces:
        shape = (bottom - top, right - left)
        stain = np.where(rng.random((*shape, 1)) < 0.3, [110, 70, 150], [220, 150, 190])
        pixels[top:bottom, left:right] = stain + rng.normal(0, 8, (*shape, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray | None = None) -> Path:
    Image.fromarray(tissue_pixels() if pixels is None else pixels).save(path)
    return path


def write_tiff(path: Path, pixels: np.ndarray, description: str = "", levels: int = 1, **more) -> Path:
    """A tiled TIFF of so many levels, each half the one before, without loss."""
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            reduced = {"subfiletype": 1} if level else {}
            file.write(
                pixels,
                tile=(256, 256),
                compression="deflate",
                metadata=None,
                description=description,
                **more,
                **reduced,
            )
            height, width = (side // 2 for side in pixels.shape[:2])
            cut = pixels[: 2 * height, : 2 * width].reshape(height, 2, width, 2, -1)
            pixels = ((cut.sum(axis=(1, 3), dtype=np.uint32) + 2) // 4).astype(np.uint8)
    return path


def write_svs(path: Path, pixels: np.ndarray, mpp: float | None = MPP, levels: int = 1) -> Path:
    """A TIFF that OpenSlide takes for one by Aperio."""
    height, width = pixels.shape[:2]
    scale = "" if mpp is None else f"|AppMag = 20|MPP = {mpp}"
    description = f"Aperio Image Library v11.2.1\r\n{width}x{height} [0,0 {width}x{height}] (256x256){scale}"
    return write_tiff(path, pixels, description, levels, photometric="rgb")
