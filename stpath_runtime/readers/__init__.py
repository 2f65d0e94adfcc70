"""Files of features and of counts, as users have them; recognised by their content."""

from __future__ import annotations

from pathlib import Path

from ..errors import ContextError, FileError, InputError
from ..slides.context import Context
from ..slides.slide import Slide
from .elements import is_anndata, read_anndata, read_matrix, read_names, require_groups
from .hdf5 import BARCODES, read_features
from .opening import opened
from .sources import Source, width_of
from .spatial import is_spatialdata, read_spatialdata, widths
from .zarrs import ZarrSource

__all__ = ["BARCODES", "read_context", "read_slide"]


def read_slide(
    path: str | Path,
    *,
    organ: str | None = None,
    technology: str | None = None,
    features_key: str | None = None,
) -> Slide:
    """Read a slide's features from any file that holds them with coordinates; its content tells which it is.

    ===================================  ==============================  ====================  =====================
    file                                 features [N, F]                 coordinates [N, 2]    barcodes [N]
    ===================================  ==============================  ====================  =====================
    HDF5 by HEST, STPath, TRIDENT, CLAM  `embeddings` or `features`      `coords`              `barcodes`, if any
    AnnData, .h5ad, .zarr, .zarr.zip     X, or obsm[features_key]        obsm['spatial']       obs_names
    SpatialData, .zarr, .zarr.zip        X of the table of tiles         x, y of the shapes    obs_names of the table
    ===================================  ==============================  ====================  =====================

    The size of the patches is kept where TRIDENT's attributes or LazySlide's `tile_spec` tell it.

    Parameters
    ----------
    organ, technology
        As `Slide` takes them.
    features_key
        Where the features are: the key in obsm of an AnnData (left out: X), the table of a SpatialData (left out: the
        only one that annotates shapes), the dataset of another HDF5 file (left out: `embeddings` or `features`).

    Raises
    ------
    InputError
        If the file is missing, damaged or of no kind that is known, lacks features or coordinates, holds something
        that must not be read (a pickle, a link to another file, an array that declares absurdly more than it stores),
        or holds a slide that `Slide` refuses.

    Examples
    --------
    >>> read_slide(slide_path, organ="Kidney")
    Slide('s.h5', 61 spots, 96 features, organ='Kidney', technology=None)
    """
    path = Path(path)
    with opened(path, "features") as source:
        if is_anndata(source):
            parts = read_anndata(source, features_key)
        elif not isinstance(source, ZarrSource):
            parts = read_features(source, features_key)
        elif is_spatialdata(source):
            parts = read_spatialdata(source, features_key)
        else:
            raise FileError(f"{path}: a zarr store, but neither AnnData nor SpatialData; it holds: {source.listed('')}")
    for array in (parts.coords, parts.features):
        if array.flags.owndata:
            array.flags.writeable = False  # nobody else holds it, so the slide need not copy it
    return Slide(parts.coords, parts.features, parts.barcodes, organ, technology, name=str(path), patch=parts.patch)


def keys_of_width(path: str | Path, width: int) -> list[str]:
    """Features keys of a file whose rows have this width, for a message; empty if the file cannot be read."""
    try:
        with opened(Path(path), "features") as source:
            if is_anndata(source):
                found = {key: width_of(source.shape(f"obsm/{key}")) for key in source.names("obsm")}
            elif isinstance(source, ZarrSource):
                found = dict(widths(source))
            else:
                found = {key: width_of(source.shape(key)) for key in source.names()}
    except (InputError, OSError):
        return []
    return [key for key, wide in found.items() if wide == width]


def read_context(path: str | Path) -> Context:
    """Read context spots from an AnnData (h5ad or zarr) of raw counts whose obs_names are barcodes of the slide.

    Raises
    ------
    InputError
        If the file is missing, damaged or no AnnData, or has no X.
    """
    with opened(Path(path), "context counts") as source:
        _require_anndata(source, "context counts")
        require_groups(source)
        if "X" not in source.names():
            raise ContextError(f"{path}: holds no X; expected raw counts there")
        counts = read_matrix(source, "X")
        spots, genes = read_names(source, "obs"), read_names(source, "var")
    if counts is None:
        raise ContextError(f"{path}: holds no X; expected raw counts there")
    return Context(ids=list(spots), counts=counts, genes=list(genes))


def _require_anndata(source: Source, what: str) -> None:
    if not is_anndata(source):
        raise FileError(f"{source.path}: not an AnnData; expected {what} in h5ad or zarr, found: {source.listed('')}")
