"""A slide: spots with coordinates and pathology features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, SlideError, warn
from .vocabulary import ORGANS, TECHNOLOGIES, nearest_names, organ_token, technology_token

if TYPE_CHECKING:
    from anndata import AnnData

ROWS_AT_ONCE = 65_536  # checking for NaN makes a copy of this many rows at the most
PUBLISHED_MICRONS = 112  # side of the patches that STPath was trained on: 224 pixels at 0.5 um a pixel
MOST_TIMES = 1.5  # smaller or larger: the model has hardly seen other scales
FEW = 10  # spots: fewer than this warn of nothing
LEAST_FILLED = 0.1  # of a sparse matrix of features: below, it is one of counts


@dataclass(frozen=True)
class Patch:
    """The square of tissue that a spot's features were computed from, as far as a file says."""

    pixels: int  #: its side, at the magnification at which it was read
    magnification: float  #: at which it was read: 20 is 0.5 um a pixel
    level0_pixels: int | None = None  #: its side in the pixels of the coordinates
    level0_magnification: float | None = None  #: of the coordinates
    centred: bool = False  #: whether the coordinates are its centre, not its corner of the lowest x and y

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
        [N, 2], x and y of each spot in pixels or any other unit; integers or floats.
    features
        [N, F], pathology features of each spot; float16, float32 or float64. The slide keeps read-only copies of both;
        an array that is read-only and owns its data is kept as it is.
    barcodes
        N distinct names of the spots, as text or bytes, also [N, 1]; None means they are numbered from 0.
    organ, technology
        Names as in `ORGANS` and `TECHNOLOGIES` of `stpath_runtime.slides.vocabulary`, whatever their case and
        punctuation; None means Others and unknown.
    name
        What messages and outputs call the slide.
    patch
        The size of the patches that the features are of, where it is known; one far from the published 112 um warns.
    sections
        N names of the sections that the spots lie on, as where a slide holds several: each is scaled and attends on its
        own, as if it were a slide; None means one.

    Raises
    ------
    InputError
        If the shapes do not fit, a value is NaN or infinite, a barcode appears twice or a name is unknown.

    Examples
    --------
    >>> slide = Slide([[0, 0], [200, 0]], np.ones((2, 1536)), ["AAAC-1", "AAAG-1"], organ="kidney", technology="Visium")
    >>> slide
    Slide('slide', 2 spots, 1,536 features, organ='Kidney', technology='Visium')
    """

    coords: npt.NDArray[np.generic]
    features: npt.NDArray[np.floating]
    barcodes: Sequence[str] | npt.NDArray[Any] | None = None
    organ: str | None = None
    technology: str | None = None
    name: str = "slide"
    patch: Patch | None = None
    sections: Sequence[str] | None = None

    def __post_init__(self) -> None:
        coords, features = _own(self.name, "coordinates", self.coords), _own(self.name, "features", self.features)
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
            features = own(features.astype(np.float32))
        _check_finite(self.name, "coordinates", coords)
        _check_finite(self.name, "features", features)
        barcodes = [str(i) for i in range(len(coords))]
        if self.barcodes is not None:
            barcodes = [text(barcode, self.name) for barcode in np.asarray(self.barcodes, object).ravel()]
        if len(barcodes) != len(coords):
            raise SlideError(f"{self.name}: {len(barcodes):,} barcodes for {len(coords):,} spots; give one a spot")
        if len(set(barcodes)) != len(barcodes):
            raise SlideError(f"{self.name}: barcode {first_repeated(barcodes)!r} appears twice; make them distinct")
        try:
            organ = ORGANS[organ_token(self.organ)]
            technology = None if self.technology is None else TECHNOLOGIES[technology_token(self.technology)]
        except InputError as error:
            raise SlideError(f"{self.name}: {error}") from None
        sections = self.sections
        if sections is not None:
            sections = [text(section, self.name) for section in np.asarray(sections, object).ravel()]
            if len(sections) != len(coords):
                raise SlideError(f"{self.name}: {len(sections):,} sections for {len(coords):,} spots; give one a spot")
        # Frozen for users; here the checked values are set.
        vars(self).update(coords=coords, features=features, barcodes=barcodes, organ=organ, technology=technology)
        vars(self).update(sections=sections)
        self._warn_of_unlikely_input()

    def _warn_of_unlikely_input(self) -> None:
        if self.patch is not None and not 1 / MOST_TIMES <= self.patch.microns / PUBLISHED_MICRONS <= MOST_TIMES:
            warn(
                f"{self.name}: its patches are {self.patch.microns:.0f} um wide ({self.patch.pixels} pixels at "
                f"{self.patch.magnification:g}x); STPath was trained on patches of {PUBLISHED_MICRONS} um"
            )
        if len(self) >= FEW:
            empty = len(self) - int(np.count_nonzero(self.features.any(axis=1)))
            if 2 * empty >= len(self):
                warn(
                    f"{self.name}: the features of {empty:,} of its {len(self):,} spots are all zero, as where the "
                    "program that wrote them was stopped; compute them again"
                )
            if (self.coords == self.coords[0]).all():
                place = ", ".join(f"{value:g}" for value in self.coords[0])
                warn(f"{self.name}: all {len(self):,} spots are at one place ({place}); check the coordinates")

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        features_key: str | None = None,
        organ: str | None = None,
        technology: str | None = None,
        name: str = "adata",
    ) -> Slide:
        """A slide of an AnnData in memory: what `read_slide` gives of it in a file.

        Parameters
        ----------
        adata
            Features in X or `obsm[features_key]`, coordinates in `obsm["spatial"]`; obs_names are the barcodes.
        features_key
            Where the features are; None means X.
        organ, technology, name
            As `Slide` takes them.

        Raises
        ------
        InputError
            If there are no coordinates or no such features, X holds counts, or `Slide` refuses them.

        Examples
        --------
        >>> from anndata import AnnData
        >>> counts = AnnData(np.ones((3, 2)), obsm={"spatial": np.eye(3, 2), "gigapath": np.ones((3, 8))})
        >>> Slide.from_anndata(counts, features_key="gigapath", organ="Kidney")
        Slide('adata', 3 spots, 8 features, organ='Kidney', technology=None)
        """
        require_anndata(adata, "read_slide reads files")
        held = ", ".join(f"{key} {list(np.shape(adata.obsm[key]))}" for key in adata.obsm) or "nothing"
        if "spatial" not in adata.obsm:
            raise SlideError(f"{name}: no coordinates; expected obsm['spatial'] [N, 2], found in obsm: {held}")
        if features_key is not None and features_key not in adata.obsm:
            near = nearest_names(features_key, adata.obsm)
            raise SlideError(f"{name}: no obsm[{features_key!r}]{near}; obsm holds: {held}")
        matrix = adata.obsm[features_key] if features_key is not None else adata.X
        if adata.isbacked and features_key is None and matrix is not None:
            matrix = matrix[:]
        if matrix is None:
            raise SlideError(f"{name}: no X; say which of obsm are the features (features_key), it holds: {held}")
        features = dense_features(matrix, f"{name}: X", held)
        return cls(np.asarray(adata.obsm["spatial"]), features, adata.obs_names, organ, technology, name)

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


def by_section(slide: Slide) -> list[tuple[npt.NDArray[np.int64], Slide]]:
    """The rows of each section, and the section as a slide of its own; of a slide without sections all rows, and it.

    Examples
    --------
    >>> slide = Slide([[0, 0], [9, 9], [1, 0]], np.ones((3, 4)), sections=["left", "right", "left"])
    >>> [(rows.tolist(), len(section)) for rows, section in by_section(slide)]
    [([0, 2], 2), ([1], 1)]
    """
    if slide.sections is None:
        return [(np.arange(len(slide)), slide)]
    names = np.asarray(slide.sections, object)
    parts = []
    for name in dict.fromkeys(slide.sections):
        rows = np.flatnonzero(names == name)
        part = object.__new__(Slide)  # what it holds is checked already, and warned of
        barcodes = [slide.obs_names[row] for row in rows]
        values = {
            "coords": slide.coords[rows],
            "features": slide.features[rows],
            "barcodes": barcodes,
            "sections": None,
        }
        vars(part).update({**vars(slide), **values})
        parts.append((rows, part))
    return parts


def own(values: Any) -> npt.NDArray[Any]:
    """A read-only array in this machine's byte order: a copy, unless it is one already.

    Libraries return arrays that are big-endian, read-only, backed by a file, or changed later by their owner.

    Raises
    ------
    ValueError
        If it cannot be an array, or an entry is masked.
    """
    if np.ma.is_masked(values):
        raise ValueError(
            f"{int(np.ma.getmaskarray(values).sum()):,} entries are masked; fill them, or leave out their spots"
        )
    try:
        array = np.asarray(values.toarray() if hasattr(values, "toarray") else values)
    except (RuntimeError, TypeError) as error:  # PyTorch's, of tensors that NumPy cannot hold
        raise ValueError(str(error)) from error
    if array.dtype.kind == "O" and all(dtype.kind in "iuf" for dtype in getattr(values, "dtypes", [array.dtype])):
        array = values.to_numpy(np.float64, na_value=np.nan)  # a table of pandas' nullable numbers
    kept = array.base is None and not array.flags.writeable and array.flags.c_contiguous and array.dtype.isnative
    if not kept:
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        array.flags.writeable = False
    return array


def _own(name: str, what: str, values: Any) -> npt.NDArray[Any]:
    try:
        return own(values)
    except ValueError as error:
        raise SlideError(f"{name}: {what} are not an array of numbers ({error})") from error


def require_anndata(adata: Any, readers: str) -> None:
    """Refuse what is no AnnData, such as the path of one."""
    if not hasattr(adata, "obs_names"):
        raise SlideError(f"expected an AnnData, got {type(adata).__name__}; {readers}")


def dense_features(matrix: Any, what: str, obsm: str) -> Any:
    """A matrix of features, [N, F], as it is, or a sparse one as an array, if it is as filled as features are.

    Parameters
    ----------
    what, obsm
        What messages call the matrix, and what is in obsm beside it.

    Raises
    ------
    InputError
        If it is sparse, and hardly filled.
    """
    if not hasattr(matrix, "nnz"):
        return matrix
    filled = matrix.nnz / max(matrix.shape[0] * matrix.shape[1], 1)
    if filled < LEAST_FILLED:
        raise SlideError(
            f"{what} is sparse and {filled:.1%} filled, as counts are and features are not; say which of obsm are the "
            f"features (features_key), it holds: {obsm}"
        )
    return np.asarray(matrix.toarray())


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
    features.flags.writeable = False  # so that it is not copied
    return Slide(coords, features, organ=organ, technology=technology, name=f"random slide of {spots} spots")


def text(name: object, of: str) -> str:
    """Return a name of a spot or gene as text; bytes are decoded.

    Raises
    ------
    InputError
        If it is not text, or holds a character that no file keeps.
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
            values = array[start : start + ROWS_AT_ONCE].astype(np.float32, copy=False)
        if np.isfinite([values.min(initial=0), values.max(initial=0)]).all():  # NaN would be both: the usual case, fast
            continue
        bad = ~np.isfinite(values)
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


def first_repeated(names: Sequence[Any]) -> Any:
    """The first of the names that stands a second time."""
    seen: set[Any] = set()
    return next(n for n in names if n in seen or seen.add(n))  # type: ignore[func-returns-value]
