"""How large the patches are, as TRIDENT and LazySlide write it beside the coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..slides.slide import Patch
from .checks import warn_ignored

PIXELS, SCALES = (1, 10**6), (0.01, 1000)  # what a side in pixels, and a magnification or microns a pixel, can be
TRIDENT = {
    "patch_size": PIXELS,
    "target_magnification": SCALES,
    "patch_size_level0": PIXELS,
    "level0_magnification": SCALES,
}
LAZYSLIDE = {"height": PIXELS, "width": PIXELS, "mpp": SCALES, "base_downsample": SCALES}


def patch_of_trident(attributes: Mapping[str, Any], path: Path) -> Patch | None:
    """The patch that the attributes of `coords` tell of, or None; those that cannot be are ignored with a warning."""
    found = _numbers(attributes, TRIDENT, "the attribute {} of 'coords'", path)
    if "patch_size" not in found or "target_magnification" not in found:
        return None
    level0_pixels = int(found["patch_size_level0"]) if "patch_size_level0" in found else None
    pixels, magnification = int(found["patch_size"]), found["target_magnification"]
    return Patch(pixels, magnification, level0_pixels, found.get("level0_magnification"))


def patch_of_lazyslide(tile_spec: object, element: str, path: Path) -> Patch | None:
    """The patch that an element's entry in the root attribute `tile_spec` tells of, or None, as for TRIDENT.

    wsidata writes height and width in pixels at mpp microns a pixel, and base_downsample: how many pixels of level 0
    make one of them.
    """
    entry = tile_spec.get(element) if isinstance(tile_spec, Mapping) else tile_spec
    if entry is not None and not isinstance(entry, Mapping):
        warn_ignored(path, f"tile_spec of {element!r} is {_short(entry)}, not a table of sizes")
    if not isinstance(entry, Mapping):
        return None
    found = _numbers(entry, LAZYSLIDE, f"{{}} in tile_spec of {element!r}", path)
    if not {"height", "width", "mpp"} <= set(found):
        return None
    if found["height"] != found["width"]:
        warn_ignored(
            path, f"tile_spec of {element!r} is of {found['width']:g} x {found['height']:g} pixels, not a square"
        )
        return None
    pixels, magnification, downsample = int(found["width"]), 10 / found["mpp"], found.get("base_downsample")
    if downsample is None:
        return Patch(pixels, magnification)
    return Patch(pixels, magnification, int(pixels * downsample), magnification * downsample)


def _numbers(
    attributes: Mapping[str, Any], wanted: Mapping[str, tuple[float, float]], where: str, path: Path
) -> dict[str, float]:
    """The wanted attributes that are there and within their range; a warning for each that is not."""
    found = {}
    for name, (low, high) in wanted.items():
        value = attributes.get(name)
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.item()
        if value is None:
            continue
        number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        if number and low <= value <= high and (wanted[name] != PIXELS or value == int(value)):
            found[name] = float(value)
        else:
            warn_ignored(path, f"{where.format(name)} is {_short(value)}")
    return found


def _short(value: object) -> str:
    return " ".join(repr(value).split())[:60]
