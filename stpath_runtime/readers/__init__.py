"""Files of features, of counts and of predictions, as users have them; told apart by what is in them."""

from __future__ import annotations

from pathlib import Path

from ..context import Context
from ..errors import ContextError, FileError
from ..slide import Slide
from .elements import is_anndata, read_anndata, read_matrix, read_names
from .hdf5 import BARCODES, read_features
from .opening import opened
from .predictions import open_prediction, read_facts
from .sources import Source
from .spatial import is_spatialdata, read_spatialdata
from .zarrs import ZarrSource

__all__ = ["BARCODES", "open_prediction", "read_context", "read_facts", "read_slide"]


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
    return Slide(parts.coords, parts.features, parts.barcodes, organ, technology, name=str(path), patch=parts.patch)


def read_context(path: str | Path) -> Context:
    """Read context spots from an AnnData (h5ad or zarr) of raw counts whose obs_names are barcodes of the slide.

    Raises
    ------
    InputError
        If the file is missing, damaged or no AnnData, or has no X.
    """
    with opened(Path(path), "context counts") as source:
        _require_anndata(source, "context counts")
        if "X" not in source.names():
            raise ContextError(f"{path}: holds no X; expected raw counts there")
        counts = read_matrix(source, "X")
        spots, genes = read_names(source, "obs"), read_names(source, "var")
    if counts is None:
        raise ContextError(f"{path}: holds no X; expected raw counts there")
    return Context(ids=list(spots), counts=counts, genes=list(genes))


def _require_anndata(source: Source, what: str) -> None:
    if not is_anndata(source):
        raise FileError(f"{source.path}: no AnnData; expected {what} in h5ad or zarr, found: {source.listed('')}")
