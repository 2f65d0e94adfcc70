"""A slide: spots with coordinates and pathology features."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError, InputWarning, SlideError
from .vocabulary import ORGANS, TECHNOLOGIES, organ_token, technology_token

ROWS_AT_ONCE = 65_536  # checking for NaN makes a copy of this many rows at the most
PUBLISHED_MICRONS = 112  # side of the patches that STPath was trained on: 224 pixels at 0.5 um a pixel
FAR = 1.5  # times smaller or larger: a scale that the model has hardly seen


@dataclass(frozen=True)
class Patch:
    """The square of tissue that the features of a spot are of, as far as a file tells."""

    pixels: int  #: its side, at the magnification at which it was read
    magnification: float  #: at which it was read: 20 is 0.5 um a pixel
    level0_pixels: int | None = None  #: its side in the pixels of the coordinates
    level0_magnification: float | None = None  #: of the coordinates

    @property
    def microns(self) -> float:
        """Its side in micrometres."""
        return self.pixels * 10 / self.magnification


@dataclass(frozen=True, eq=False, repr=False)
class Slide:
    """Spots of one slide, checked.

    Parameters
    ----------
    coords
        [N, 2], x and y of each spot in pixels or any other unit; integers or floats. Never changed.
    features
        [N, F], pathology features of each spot; float16, float32 or float64.
    barcodes
        N distinct names of the spots, as text or bytes, also [N, 1]; None means they are numbered from 0.
    organ, technology
        Names as in `stpath_runtime.vocabulary`, whatever their case and punctuation; None means Others and unknown.
    name
        What messages and outputs call the slide.
    patch
        The size of the patches that the features are of, where it is known; one far from the published 112 um warns.

    Raises
    ------
    InputError
        If the shapes do not fit, a value is NaN or infinite, a barcode stands twice or a name is unknown.
    """

    coords: npt.NDArray[np.generic]
    features: npt.NDArray[np.floating]
    barcodes: Sequence[str] | npt.NDArray[Any] | None = None
    organ: str | None = None
    technology: str | None = None
    name: str = "slide"
    patch: Patch | None = None

    def __post_init__(self) -> None:
        coords, features = np.asarray(self.coords), np.asarray(self.features)
        _check_numbers(self.name, "coordinates", coords, "[N, 2]")
        _check_numbers(self.name, "features", features, "[N, F]")
        if coords.shape[1] != 2:
            raise SlideError(f"{self.name}: coordinates have the shape {list(coords.shape)}; expected [N, 2], x and y")
        if len(coords) != len(features):
            raise SlideError(
                f"{self.name}: {len(features):,} rows of features but {len(coords):,} of coordinates; "
                "each spot needs one of both"
            )
        if len(coords) == 0:
            raise SlideError(f"{self.name}: the slide has no spots")
        if features.dtype.kind != "f":
            features = features.astype(np.float32)
        _check_finite(self.name, "coordinates", coords)
        _check_finite(self.name, "features", features)
        barcodes = [str(i) for i in range(len(coords))]
        if self.barcodes is not None:
            barcodes = [text(barcode, self.name) for barcode in np.asarray(self.barcodes, object).ravel()]
        if len(barcodes) != len(coords):
            raise SlideError(f"{self.name}: {len(barcodes):,} barcodes for {len(coords):,} spots; give one a spot")
        if len(set(barcodes)) != len(barcodes):
            raise SlideError(f"{self.name}: barcode {_first_repeated(barcodes)!r} stands twice; make them distinct")
        try:
            organ = ORGANS[organ_token(self.organ)]
            technology = None if self.technology is None else TECHNOLOGIES[technology_token(self.technology)]
        except InputError as error:
            raise SlideError(f"{self.name}: {error}") from None
        # The dataclass is frozen to its users; here it takes its checked form.
        checked = {"coords": coords, "features": features, "barcodes": barcodes}
        for field, value in {**checked, "organ": organ, "technology": technology}.items():
            object.__setattr__(self, field, value)
        if self.patch is not None and not 1 / FAR <= self.patch.microns / PUBLISHED_MICRONS <= FAR:
            warnings.warn(
                f"{self.name}: its patches are {self.patch.microns:.0f} um wide ({self.patch.pixels} pixels at "
                f"{self.patch.magnification:g}x); STPath was trained on patches of {PUBLISHED_MICRONS} um",
                InputWarning,
                stacklevel=3,
            )

    def __len__(self) -> int:
        return len(self.coords)

    def __repr__(self) -> str:
        shape = f"{len(self):,} spots, {self.features.shape[1]:,} features"
        return f"Slide({self.name!r}, {shape}, organ={self.organ!r}, technology={self.technology!r})"

    @property
    def obs_names(self) -> list[str]:
        """Names of the spots: the barcodes, or their numbers."""
        return list(self.barcodes) if self.barcodes is not None else []

    @property
    def organ_token(self) -> int:
        """Token of the organ."""
        return organ_token(self.organ)

    @property
    def technology_token(self) -> int:
        """Token of the technology."""
        return technology_token(self.technology)

    def normalized_coords(self) -> npt.NDArray[np.float64]:
        """Coordinates as the model takes them, [N, 2]: each axis on its own from 0 to 100 over the slide.

        (c - min) / (max - min) * 100. An axis on which all spots agree is 0 (the published code gives NaN there).
        """
        coords = self.coords.astype(np.float64)
        low = coords.min(axis=0)
        span = coords.max(axis=0) - low
        normalized: npt.NDArray[np.float64] = (coords - low) / np.where(span > 0, span, 1) * 100
        return normalized


def random_slide(
    spots: int,
    n_features: int,
    seed: int,
    organ: str | None = None,
    technology: str | None = None,
    dtype: npt.DTypeLike = np.float32,
) -> Slide:
    """A slide of random features on a hexagonal grid: for proofs and benchmarks, never for biology."""
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(spots), int(np.ceil(np.sqrt(spots))))
    coords = np.stack([200 * column + 100 * (row % 2), 173 * row], axis=1)
    features = np.empty((spots, n_features), dtype)
    for start in range(0, spots, 8_192):  # in parts: what making it takes must not show in a peak of memory
        part = features[start : start + 8_192]
        part[:] = rng.standard_normal(part.shape, np.float32)
    return Slide(coords, features, organ=organ, technology=technology, name=f"random slide of {spots} spots")


def text(name: object, of: str) -> str:
    """Return a name of a spot or gene as text; bytes are decoded.

    Raises
    ------
    InputError
        If it is no text, or holds a character that no file keeps.
    """
    if isinstance(name, bytes):
        try:
            name = name.decode()
        except UnicodeDecodeError:
            raise SlideError(f"{of}: the name {name!r} is not text in UTF-8") from None
    if not isinstance(name, str | int | np.integer) or "\0" in str(name):
        raise SlideError(f"{of}: {name!r} is not a name; give text")
    return str(name)


def _check_numbers(name: str, what: str, array: npt.NDArray[np.generic], shape: str) -> None:
    if array.dtype.kind not in "iuf" or array.dtype.itemsize > 8:
        raise SlideError(f"{name}: {what} are of type {array.dtype}; expected numbers")
    if array.ndim != 2:
        raise SlideError(f"{name}: {what} have the shape {list(array.shape)}; expected {shape}")


def _check_finite(name: str, what: str, array: npt.NDArray[np.generic]) -> None:
    if array.dtype.kind != "f":
        return
    count, first = 0, -1
    for start in range(0, len(array), ROWS_AT_ONCE):
        # In the model's type: a finite float64 may be infinite there.
        with np.errstate(over="ignore"):
            bad = ~np.isfinite(array[start : start + ROWS_AT_ONCE].astype(np.float32))
        rows = np.flatnonzero(bad.any(axis=1))
        count += int(bad.sum())
        if first < 0 and len(rows):
            first = start + int(rows[0])
    if count:
        verb = "value of the {} is" if count == 1 else "values of the {} are"
        raise SlideError(
            f"{name}: {count:,} {verb.format(what)} NaN or infinite (in float32), the first at spot {first}; "
            "drop those spots or compute them again"
        )


def _first_repeated(names: Sequence[str]) -> str:
    seen: set[str] = set()
    return next(n for n in names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
