"""Slide images: OpenSlide's formats, and plain pictures, behind one small Protocol.

Sources: https://openslide.org/api/python/ and https://openslide.org/properties/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import FileError, ImageError, InstallError, MemoryLimitError, first_line, warn
from ..machine import available_on_host

Pixels = npt.NDArray[np.uint8]  # [height, width, 3], RGB

PLAIN = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
ENDINGS = (".svs", ".ndpi", ".scn", ".mrxs", ".bif", ".vms", ".vmu", ".dcm", *PLAIN)
LEAST, MOST = 0.05, 20.0  # um a pixel that a file may say: others are no microscope's, such as 72 dots an inch
NEAR = 0.02  # a share by which two scales may differ and be taken as one
SIDES = 1.02  # how much x and y of a scale may differ
WHITE = 255
MICRONS = {"nm": 1e-3, "um": 1.0, "µm": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}  # of OME's units
COLOURS = 3


@dataclass(frozen=True)
class Level:
    """A resolution that an image is stored in."""

    size: tuple[int, int]  #: pixels, width and height
    downsample: float  #: 1 for the finest


class SlideImage(Protocol):
    """An open slide image. Reading is safe from several threads."""

    path: Path
    microns_a_pixel: float  #: of level 0
    levels: tuple[Level, ...]  #: the finest first

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Pixels [height, width, 3] of a level, from (x, y) of level 0 on; what is outside of the image is white."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


def is_image(path: str | Path) -> bool:
    """Whether a name ends as those of slide images do."""
    return str(path).lower().endswith(ENDINGS)


def endings_in_folder(microns_a_pixel: float | None) -> tuple[str, ...]:
    """How the names of images in a folder end; plain pictures, which may be anything, only where a scale is given."""
    return ENDINGS if microns_a_pixel is not None else tuple(set(ENDINGS) - {".png", ".jpg", ".jpeg"})


@contextmanager
def open_image(path: str | Path, microns_a_pixel: float | None = None) -> Iterator[SlideImage]:
    """Open a slide image: what OpenSlide reads, or a plain PNG, JPEG or TIFF of which the scale is given.

    Parameters
    ----------
    microns_a_pixel
        The scale of level 0; None means what the file says. A scale that the file contradicts warns.

    Raises
    ------
    InputError
        If the file is missing, damaged, no image or not RGB, its scale is not known, or OpenSlide is not installed.

    Examples
    --------
    >>> with open_image(image_path) as image:
    ...     image.read(0, 0, 0, 224, 224).shape
    (224, 224, 3)
    """
    path = Path(path)
    if microns_a_pixel is not None and not LEAST <= microns_a_pixel <= MOST:
        raise ImageError(f"--mpp {microns_a_pixel:g}: give um a pixel of the finest level, from {LEAST} to {MOST:g}")
    image = _opened(path, microns_a_pixel)
    try:
        yield image
    finally:
        image.close()


def _opened(path: Path, given: float | None) -> SlideImage:
    openslide = _openslide()
    if not path.exists():
        raise FileError(f"{path}: no such file; expected a slide image")
    if path.is_dir():
        raise FileError(f"{path}: a folder; give a slide image (of DICOM: one of its files)")
    known = openslide.OpenSlide.detect_format(str(path)) is not None
    if not known and path.suffix.lower() not in PLAIN:
        raise ImageError(f"{path}: no slide image that OpenSlide reads, or damaged at its start; copy it again")
    samples, description = _tiff_tags(path)
    _require_rgb(path, samples, description)
    if not known:
        return PlainImage(path, given, description)
    try:
        slide = openslide.OpenSlide(path)
    except openslide.OpenSlideError as error:
        raise ImageError(f"{path}: OpenSlide cannot open it ({first_line(error)}); copy or convert it again") from error
    try:
        return OpenSlideImage(path, slide, given)
    except BaseException:
        slide.close()
        raise


class OpenSlideImage:
    """A slide image by OpenSlide, whose one handle serves all threads."""

    def __init__(self, path: Path, slide: Any, given: float | None) -> None:
        self.path, self._slide = path, slide
        self.microns_a_pixel = _scale(path, given, _stated(slide.properties))
        pairs = zip(slide.level_dimensions, slide.level_downsamples, strict=True)
        self.levels = tuple(Level(size, float(downsample)) for size, downsample in pairs)
        background = re.fullmatch(r"[0-9a-fA-F]{6}", slide.properties.get("openslide.background-color", ""))
        self._background = np.array(list(bytes.fromhex(background[0])) if background else [WHITE] * 3, np.float32)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As `SlideImage.read`.

        Raises
        ------
        InputError
            If the pixels cannot be read; OpenSlide then reads nothing more of the file.
        """
        from openslide import OpenSlideError

        try:
            rgba = np.asarray(self._slide.read_region((x, y), level, (width, height)))
        except OpenSlideError as error:
            raise ImageError(
                f"{self.path}: level {level} cannot be read at ({x:,}, {y:,}) ({first_line(error)}); the file is "
                "truncated or damaged: copy it again"
            ) from error
        return on_background(rgba, self._background)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


class PlainImage:
    """A plain picture, decoded whole."""

    def __init__(self, path: Path, given: float | None, description: str) -> None:
        stated = _stated({"tiff.ImageDescription": description})  # of an OME-TIFF in strips
        if given is None and stated is None:
            raise ImageError(f"{path}: a plain picture, which says no scale; give its um a pixel with --mpp")
        self.path, self.microns_a_pixel = path, _scale(path, given, stated)
        self._pixels = _decoded(path)
        self.levels: tuple[Level, ...] = (Level((self._pixels.shape[1], self._pixels.shape[0]), 1.0),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As `SlideImage.read`."""
        found = np.full((height, width, COLOURS), WHITE, np.uint8)
        rows, columns = self._pixels.shape[:2]
        top, left, bottom, right = max(y, 0), max(x, 0), min(y + height, rows), min(x + width, columns)
        if top < bottom and left < right:
            found[top - y : bottom - y, left - x : right - x] = self._pixels[top:bottom, left:right]
        return found

    def close(self) -> None:
        """Nothing is open."""


def on_background(rgba: Pixels, background: npt.NDArray[np.float32]) -> Pixels:
    """RGB of RGBA [h, w, 4]; where it is transparent, the background shows."""
    alpha = rgba[..., 3:]
    if alpha.min(initial=WHITE) == WHITE:
        return np.ascontiguousarray(rgba[..., :3])
    share = alpha.astype(np.float32) / WHITE
    mixed: Pixels = np.floor(rgba[..., :3] * share + background * (1 - share) + 0.5).astype(np.uint8)
    return mixed


def _openslide() -> Any:
    try:
        import openslide
    except (ImportError, OSError) as error:
        raise InstallError(
            f"slide images need OpenSlide and Pillow ({first_line(error)}); run: pip install 'stpath-engine[wsi]'"
        ) from error
    return openslide


def _scale(path: Path, given: float | None, stated: float | None) -> float:
    if given is None and stated is None:
        raise ImageError(f"{path}: says no um a pixel that can be; give it with --mpp")
    if given is not None and stated is not None and abs(given / stated - 1) > NEAR:
        warn(f"{path}: says {stated:g} um a pixel; {given:g} is taken, as --mpp says")
    return float(given if given is not None else stated)  # type: ignore[arg-type]


def _stated(properties: Mapping[str, str]) -> float | None:
    """The um a pixel that a file states, the mean of x and y; None if it states none, or none that can be."""
    x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    if x is None or y is None:
        x, y = _ome_scale(properties.get("tiff.ImageDescription", ""))
    if x is None or y is None or not all(LEAST <= one <= MOST for one in (x, y)) or not 1 / SIDES <= x / y <= SIDES:
        return None
    return (x + y) / 2


def _ome_scale(description: str) -> tuple[float | None, float | None]:
    """PhysicalSizeX and PhysicalSizeY of OME-XML in um: OpenSlide does not read them.

    Source: https://docs.openmicroscopy.org/ome-model/6.3.1/ome-tiff/specification.html.
    """
    if "<OME" not in description:
        return None, None
    found = []
    for axis in "XY":
        size = re.search(rf'\bPhysicalSize{axis}="([^"]*)"', description)
        unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', description)
        number, times = _number(size[1] if size else None), MICRONS.get(unit[1] if unit else "um")
        found.append(number * times if number is not None and times is not None else None)
    return found[0], found[1]


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) and number > 0 else None


def _tiff_tags(path: Path) -> tuple[int, str]:
    """Samples a pixel and the description of a TIFF; three and none of anything else, and where they cannot be read."""
    from PIL import Image, UnidentifiedImageError

    if path.suffix.lower() not in (".tif", ".tiff", ".svs"):
        return COLOURS, ""
    try:
        with _no_limit(), Image.open(path) as image:
            tags: Any = getattr(image, "tag_v2", {})
            samples = tags.get(277, COLOURS)
            return samples if isinstance(samples, int) else COLOURS, str(tags.get(270, ""))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, KeyError, TypeError):
        return COLOURS, ""  # what opens it says what is wrong with it


def _require_rgb(path: Path, samples: int, description: str) -> None:
    """Refuse a TIFF whose pixels are not of three colours, such as one of fluorescence: OpenSlide would grey it."""
    channels = re.search(r'\bSizeC="(\d+)"', description) if "<OME" in description else None
    count = int(channels[1]) if channels is not None else samples
    if count not in (COLOURS, COLOURS + 1):
        raise ImageError(
            f"{path}: {count} channels, as of fluorescence; STPath's encoders take bright-field images in three "
            "colours (H&E)"
        )


def _decoded(path: Path) -> Pixels:
    """The pixels of a plain picture."""
    from PIL import Image

    try:
        with _no_limit(), Image.open(path) as image:
            mode, (width, height) = image.mode, image.size
            if mode not in ("RGB", "RGBA"):
                raise ImageError(f"{path}: of the mode {mode}, not RGB; convert a bright-field image to RGB (8 bits)")
            need = width * height * (len(mode) + COLOURS)
            if need > available_on_host():
                raise MemoryLimitError(
                    f"{path}: {width:,} x {height:,} pixels take {need / 2**30:.1f} GiB as a plain picture; convert it "
                    "to a tiled TIFF, which is read in parts"
                )
            pixels = np.asarray(image)
    except (ImageError, MemoryLimitError):
        raise
    except Exception as error:  # Pillow raises errors of any kind on a damaged file
        raise ImageError(f"{path}: cannot be read as an image ({first_line(error)}); copy it again") from error
    return on_background(pixels, np.full(3, WHITE, np.float32)) if mode == "RGBA" else np.ascontiguousarray(pixels)


@contextmanager
def _no_limit() -> Iterator[None]:
    """Let Pillow open pictures of any size: what they need is checked against memory."""
    from PIL import Image

    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
