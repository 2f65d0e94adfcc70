"""Where the tissue is: our mask, or one that the user brings, and its pieces.

Our mask, at 8 um a pixel: the saturation of the colours, smoothed over 7 x 7 pixels, above Otsu's threshold (at least
8 of 255), closed over gaps of 40 um, and pieces smaller than four tiles taken away. Glass is grey, stained tissue is
not. Sources: the masks of CLAM (https://github.com/mahmoodlab/CLAM); Otsu, IEEE Trans. SMC 9 (1979), 62.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileError, ImageError, first_line
from .reading import Pixels, SlideImage

MASK_MICRONS = 8.0  # a pixel of a mask, or less
OVERVIEW_PIXELS = 2_000  # of the longer side of the picture that people look at, about
MOST_PIXELS = 3_200  # of it, whatever the scale: 25.6 mm at 8 um
STRIP = 512  # pixels of a side of the parts in which an overview is read
SMOOTH, LEAST_SATURATION, DARK = 7, 8, 20
CLOSE = 5  # pixels
LEAST_MICRONS = 4 * 112.0**2  # square um of a piece
BINS = 256
BEYOND = 1.01  # times an image's size that outlines may reach

Mask = npt.NDArray[np.bool_]  # [height, width]


@dataclass(frozen=True, eq=False)
class Overview:
    """A whole image, small."""

    pixels: Pixels  #: [height, width, 3]
    scale: float  #: pixels of level 0 that one of its pixels spans
    size: tuple[int, int]  #: of level 0, width and height


@dataclass(frozen=True, eq=False)
class Tissue:
    """The pieces of tissue of an image."""

    pieces: npt.NDArray[np.integer[Any]]  #: [height, width]: 0 is no tissue, from 1 on pieces, from left to right
    scale: float  #: pixels of level 0 that one of its pixels spans

    @property
    def count(self) -> int:
        """The number of pieces."""
        return int(self.pieces.max(initial=0))


def overview_of(image: SlideImage, threads: int = 2) -> Overview:
    """Read an image small: at 8 um a pixel or a little finer, or 2,000 pixels long, whichever is finer.

    It is read in parts and has a largest size, so that what it takes does not grow with the image.

    Raises
    ------
    InputError
        If a part cannot be read.
    """
    longest = max(image.levels[0].size)
    wanted = min(MASK_MICRONS / image.microns_a_pixel, float(-(-longest // OVERVIEW_PIXELS)))
    wanted = max(1.0, wanted, longest / MOST_PIXELS)
    fitting = [i for i, level in enumerate(image.levels) if level.downsample <= wanted * 1.001]
    at = max(fitting, key=lambda i: image.levels[i].downsample, default=0)
    level = image.levels[at]
    shrink = max(1, int(wanted / level.downsample + 0.001))
    width, height = (max(1, -(-pixels // shrink)) for pixels in level.size)
    pixels = np.full((height, width, 3), 255, np.uint8)
    step = max(1, STRIP // shrink)

    def fill(part: tuple[int, int]) -> None:
        top, left = part
        rows, columns = min(step, height - top), min(step, width - left)
        corner = (round(left * shrink * level.downsample), round(top * shrink * level.downsample))
        found = image.read(at, *corner, columns * shrink, rows * shrink)
        boxes = found.reshape(rows, shrink, columns, shrink, 3)
        mean = boxes.mean(axis=(1, 3), dtype=np.float32) if shrink > 1 else boxes[:, 0, :, 0]
        pixels[top : top + rows, left : left + columns] = np.floor(mean + 0.5)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, ((top, left) for top in range(0, height, step) for left in range(0, width, step))))
    return Overview(pixels, shrink * level.downsample, image.levels[0].size)


def find_tissue(overview: Overview, microns_a_pixel: float) -> Tissue:
    """The tissue of an H&E image, by our mask.

    Parameters
    ----------
    microns_a_pixel
        Of level 0.
    """
    from scipy import ndimage

    shrink = max(1, int(MASK_MICRONS / (microns_a_pixel * overview.scale) + 0.001))
    pixels = shrunk(overview.pixels, shrink)
    scale = overview.scale * shrink
    smooth = ndimage.uniform_filter(saturation(pixels), SMOOTH, mode="nearest")
    mask = smooth > max(otsu(smooth), LEAST_SATURATION)
    disk = np.hypot(*np.mgrid[-2:3, -2:3]) < CLOSE / 2
    padded = np.pad(mask, CLOSE, mode="edge")  # tissue that is cut by the edge stays so
    mask = ndimage.binary_closing(padded, disk)[CLOSE:-CLOSE, CLOSE:-CLOSE]
    return Tissue(_pieces(mask, LEAST_MICRONS / (microns_a_pixel * scale) ** 2), scale)


def read_tissue(path: str | Path, overview: Overview, microns_a_pixel: float) -> Tissue:
    """The tissue that a user brings: GeoJSON of outlines in pixels of level 0 (QuPath, TRIDENT), or a mask image.

    Raises
    ------
    InputError
        If the file is missing or damaged, holds no area, or is of another image.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"--tissue {path}: no such file; expected GeoJSON or a mask image")
    shrink = max(1, int(MASK_MICRONS / (microns_a_pixel * overview.scale) + 0.001))
    scale = overview.scale * shrink
    height, width = (-(-pixels // shrink) for pixels in overview.pixels.shape[:2])
    if path.suffix.lower() in (".json", ".geojson"):
        mask = _outlined(path, (height, width), scale, overview.size)
    else:
        mask = _mask_image(path, (height, width), overview.size)
    if not mask.any():
        raise ImageError(f"--tissue {path}: holds no area; draw at least one outline of an area")
    return Tissue(_pieces(mask, 1), scale)


def saturation(pixels: Pixels) -> npt.NDArray[np.float32]:
    """Saturation [h, w] of HSV, from 0 to 255; of what is nearly black, 0: there it is noise."""
    most = pixels.max(axis=2)
    found: npt.NDArray[np.float32] = (most - pixels.min(axis=2)).astype(np.float32)
    found *= 255
    found /= np.maximum(most, 1)
    found[most < DARK] = 0
    return found


def otsu(values: npt.NDArray[np.floating[Any]]) -> float:
    """Otsu's threshold: the one between two classes of values whose means lie farthest apart, by their sizes.

    Examples
    --------
    >>> 2 < otsu(np.array([1.0, 2.0, 1.0, 90.0, 91.0])) < 90
    True
    """
    counts, edges = np.histogram(values, BINS)
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    sums = np.cumsum(counts * middles)
    above = below[-1] - below
    between = np.zeros(BINS)
    both = (below > 0) & (above > 0)
    means = sums[both] / below[both], (sums[-1] - sums[both]) / above[both]
    between[both] = below[both] * above[both] * (means[0] - means[1]) ** 2
    best = np.flatnonzero(between == between.max())
    return float(edges[1:][best].mean())


def shrunk(pixels: Pixels, times: int) -> Pixels:
    """A picture made smaller by a whole number: the mean of each box, those at the edges of what there is."""
    if times == 1:
        return pixels
    height, width = pixels.shape[:2]
    more = [(0, -height % times), (0, -width % times), (0, 0)]
    padded = np.pad(pixels, more, mode="edge")
    boxes = padded.reshape(padded.shape[0] // times, times, padded.shape[1] // times, times, 3)
    found: Pixels = np.floor(boxes.mean(axis=(1, 3), dtype=np.float32) + 0.5).astype(np.uint8)
    return found


def _pieces(mask: Mask, least: float) -> npt.NDArray[np.integer[Any]]:
    """Number the pieces of a mask from left to right; those of fewer pixels are taken away."""
    from scipy import ndimage

    labels, count = ndimage.label(mask, np.ones((3, 3)))
    areas = np.zeros(count + 1, np.int64)
    for row in labels:  # of the whole at once it would take eight bytes a pixel
        areas += np.bincount(row, minlength=count + 1)
    lefts = [where[1].start for where in ndimage.find_objects(labels)]
    kept = [label for label in range(1, count + 1) if areas[label] >= least]
    numbers: npt.NDArray[Any] = np.zeros(count + 1, np.int16 if len(kept) < 2**15 else np.int32)
    numbers[sorted(kept, key=lambda label: (lefts[label - 1], label))] = np.arange(1, len(kept) + 1)
    found: npt.NDArray[np.integer[Any]] = numbers[labels]
    return found


def _outlined(path: Path, shape: tuple[int, int], scale: float, size: tuple[int, int]) -> Mask:
    """The areas of a GeoJSON file; their holes are no tissue."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        areas = list(_areas(content))
        corners = np.array([corner for rings in areas for corner in rings[0]], float).reshape(-1, 2)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError, OSError) as error:
        raise ImageError(
            f"--tissue {path}: not GeoJSON of outlines ({first_line(error)}); export them again, as Polygon or "
            "MultiPolygon"
        ) from error
    if not areas:
        raise ImageError(f"--tissue {path}: holds no area (Polygon or MultiPolygon); draw one, and export it again")
    if not np.isfinite(corners).all() or (corners.max(axis=0) > np.multiply(size, BEYOND)).any() or corners.max() <= 0:
        low, high = corners.min(axis=0), corners.max(axis=0)
        raise ImageError(
            f"--tissue {path}: its outlines span ({low[0]:,.0f}, {low[1]:,.0f}) to ({high[0]:,.0f}, {high[1]:,.0f}), "
            f"and the image has {size[0]:,} x {size[1]:,} pixels; it is of another image, or not in pixels of level 0"
        )
    mask = np.zeros(shape, bool)
    for rings in areas:
        fill([np.asarray(ring, float)[:, :2] / scale for ring in rings], mask)
    return mask


def fill(rings: Sequence[npt.NDArray[np.float64]], mask: Mask) -> None:
    """Add to a mask [h, w] the pixels whose centres are inside of an area: rings [N, 2] (x, y), outline and holes.

    A centre is inside if a line to its left crosses the rings an odd number of times.

    Examples
    --------
    >>> mask = np.zeros((2, 3), bool)
    >>> fill([np.array([[0, 0], [2, 0], [2, 1], [0, 1]])], mask)
    >>> mask.astype(int).tolist()
    [[1, 1, 0], [0, 0, 0]]
    """
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    for row in range(max(0, int(low.min() - 0.5)), min(len(mask), int(high.max() + 1))):
        y = row + 0.5
        crossed = (low <= y) & (y < high)
        (x0, y0), (x1, y1) = start[crossed].T, end[crossed].T
        ends = np.sort(x0 + (y - y0) / (y1 - y0) * (x1 - x0))
        columns = np.clip(np.ceil(ends - 0.5), 0, mask.shape[1]).astype(int)
        for left, right in zip(columns[::2], columns[1::2], strict=True):  # between an odd and an even crossing
            mask[row, left:right] = True


def _areas(content: Any) -> Iterator[list[list[list[float]]]]:
    """The polygons of GeoJSON, each a list of rings: of a collection or list of features, a feature or a geometry."""
    if isinstance(content, list):
        for part in content:
            yield from _areas(part)
        return
    kind = content["type"]
    if kind in ("FeatureCollection", "GeometryCollection"):
        yield from _areas(content["features" if kind == "FeatureCollection" else "geometries"])
    elif kind == "Feature":
        if content["geometry"] is not None:
            yield from _areas(content["geometry"])
    elif kind == "Polygon":
        yield [ring for ring in content["coordinates"] if len(ring) > 2]
    elif kind == "MultiPolygon":
        for polygon in content["coordinates"]:
            yield [ring for ring in polygon if len(ring) > 2]


def _mask_image(path: Path, shape: tuple[int, int], size: tuple[int, int]) -> Mask:
    """What is not black in a picture of the whole image, of any size."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            found = np.asarray(picture.convert("L")) > 0
    except Exception as error:  # Pillow raises errors of any kind on a damaged file
        raise ImageError(f"--tissue {path}: cannot be read as a picture ({first_line(error)})") from error
    ours, theirs = size[0] / size[1], found.shape[1] / found.shape[0]
    if abs(ours / theirs - 1) > 2 / min(found.shape) + 0.01:
        raise ImageError(
            f"--tissue {path}: {found.shape[1]:,} x {found.shape[0]:,} pixels, another shape than the image's "
            f"{size[0]:,} x {size[1]:,}; it is a mask of another image"
        )
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, found.shape, strict=True))
    mask: Mask = found[rows][:, columns]
    return mask
