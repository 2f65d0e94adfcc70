"""Files of features, of counts and of predictions, as users have them; told apart by what is in them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..context import Context
from ..errors import InputError
from ..slide import Slide
from .checks import reading
from .elements import is_anndata, read_anndata, read_names
from .hdf5 import BARCODES, open_hdf5, read_features
from .sources import Source
from .spatial import is_spatialdata, read_spatialdata
from .zarrs import ROOTS, ZarrSource, open_zarr

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["BARCODES", "read_context", "read_prediction", "read_slide"]


def read_slide(
    path: str | Path,
    *,
    organ: str | None = None,
    technology: str | None = None,
    features_key: str | None = None,
) -> Slide:
    """Read a slide's features from any file that holds them with coordinates; its content tells which it is.

    ==================================  ==============================  ====================  =====================
    file                                features [N, F]                 coordinates [N, 2]    barcodes [N]
    ==================================  ==============================  ====================  =====================
    HDF5 by HEST, STPath, TRIDENT, CLAM `embeddings` or `features`      `coords`              `barcodes`, if any
    AnnData, .h5ad, .zarr, .zarr.zip    X, or obsm[features_key]        obsm['spatial']       obs_names
    SpatialData, .zarr, .zarr.zip       X of the table of tiles         x, y of the shapes    obs_names of the table
    ==================================  ==============================  ====================  =====================

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
    with _opened(path, "features") as source:
        if is_anndata(source):
            parts = read_anndata(source, features_key)
        elif not isinstance(source, ZarrSource):
            parts = read_features(source, features_key)
        elif is_spatialdata(source):
            parts = read_spatialdata(source, features_key)
        else:
            raise InputError(
                f"{path}: a zarr store, but neither AnnData nor SpatialData; it holds: {source.listed('')}"
            )
    return Slide(parts.coords, parts.features, parts.barcodes, organ, technology, name=str(path), patch=parts.patch)


def read_context(path: str | Path) -> Context:
    """Read context spots from an AnnData (h5ad or zarr) of raw counts whose obs_names are barcodes of the slide.

    Raises
    ------
    InputError
        If the file is missing, damaged or no AnnData, or has no X.
    """
    with _opened(Path(path), "context counts") as source:
        _require_anndata(source, "context counts")
        if "X" not in source.names():
            raise InputError(f"{path}: holds no X; expected raw counts there")
        counts = source.read("X")
        spots, genes = read_names(source, "obs"), read_names(source, "var")
    if counts is None:
        raise InputError(f"{path}: holds no X; expected raw counts there")
    return Context(ids=list(spots), counts=counts, genes=list(genes))


def read_prediction(path: str | Path) -> AnnData:
    """Read an AnnData (h5ad or zarr) that `stpath predict` wrote.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction.
    """
    with _opened(Path(path), "a prediction") as source:
        _require_anndata(source, "a prediction")
        if "stpath" not in source.names("uns") or "spatial" not in source.names("obsm"):
            raise InputError(f"{path}: no prediction of stpath predict (it has no uns['stpath'] or obsm['spatial'])")
        adata: AnnData = source.read("")
    if not isinstance(adata.uns["stpath"], dict) or adata.n_obs == 0:
        raise InputError(f"{path}: no prediction of stpath predict (uns['stpath'] is damaged, or it has no spots)")
    return adata


def _require_anndata(source: Source, what: str) -> None:
    if not is_anndata(source):
        raise InputError(f"{source.path}: no AnnData; expected {what} in h5ad or zarr, found: {source.listed('')}")


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Source]:
    """Open a file by what is in it."""
    import h5py

    if path.is_dir():
        if not any((path / name).is_file() for name in ROOTS):
            raise InputError(f"{path}: a folder, and no zarr store; expected {what} in a file or a .zarr folder")
    elif not path.is_file():
        raise InputError(f"{path}: no such file; expected {what}" if not path.exists() else f"{path}: not a file")
    elif h5py.is_hdf5(path):
        with open_hdf5(path) as source:
            yield source
        return
    else:
        _require_zarr_archive(path, what)
    with open_zarr(path) as source:
        yield source


def _require_zarr_archive(path: Path, what: str) -> None:
    """Refuse a file that is neither HDF5 nor an archive of a zarr store; nothing of a PyTorch file is unpickled."""
    with reading(path), path.open("rb") as file:
        start = file.read(2)
    names: list[str] = []
    if zipfile.is_zipfile(path):
        with reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if start[:1] == b"\x80" or any(name.endswith("data.pkl") for name in names):  # a pickle; torch's archive of one
        raise InputError(
            f"{path}: a PyTorch file (.pt), which CLAM and TRIDENT fill with features alone; it holds no coordinates, "
            "and is not unpickled: give the .h5 of the slide"
        )
    if any(name in ROOTS for name in names):
        return
    nested = next((name for name in names if name.endswith(ROOTS) and name.count("/") == 1), None)
    if nested is not None:
        raise InputError(
            f"{path}: an archive of the folder {nested.split('/')[0]!r}; zip what is in it, not the folder"
        )
    kind = "a zip archive without a zarr store" if names else "not an HDF5 file, zarr folder or .zarr.zip"
    raise InputError(f"{path}: {kind}; expected {what} in HDF5, h5ad or zarr")
