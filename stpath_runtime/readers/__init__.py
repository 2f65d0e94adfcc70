"""Files of features and of counts, as users have them; recognised by their content."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import ContextError, FileError, InputError, SlideError
from ..slides.context import Context
from ..slides.slide import Slide
from .elements import dense, read_anndata, read_labels, read_matrix, read_names, require_groups
from .hdf5 import BARCODES, open_hdf5, read_features
from .sources import Source, is_anndata, reading, width_of
from .spatial import is_spatialdata, read_spatialdata, widths
from .zarrs import ROOTS, ZarrSource, open_zarr

__all__ = ["BARCODES", "opened", "read_context", "read_slide", "read_spots"]


def read_slide(
    path: str | Path,
    *,
    organ: str | None = None,
    technology: str | None = None,
    features_key: str | None = None,
    sections: str | None = None,
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
    sections
        Of an AnnData the column of obs that tells the section of each spot; each is then as a slide of its own. Files
        that `stpath features --sections` wrote tell it themselves.

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
            if sections is not None:
                parts = parts._replace(sections=read_labels(source, sections))
        elif not isinstance(source, ZarrSource):
            parts = read_features(source, features_key)
        elif is_spatialdata(source):
            parts = read_spatialdata(source, features_key)
        else:
            raise FileError(f"{path}: a zarr store, but neither AnnData nor SpatialData; it holds: {source.listed('')}")
    if sections is not None and parts.sections is None:
        raise SlideError(f"{path}: sections are read of the obs of an AnnData; leave out {sections!r}")
    for array in (parts.coords, parts.features):
        if array.flags.owndata:
            array.flags.writeable = False  # nobody else holds it, so the slide need not copy it
    return Slide(
        parts.coords, parts.features, parts.barcodes, organ, technology, str(path), parts.patch, parts.sections
    )


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


def read_spots(
    path: str | Path, column: str | None = None
) -> tuple[npt.NDArray[np.float64], list[str], list[str] | None]:
    """Read where the spots of an AnnData are, [N, 2], their names, and what a column of obs says of each.

    Raises
    ------
    InputError
        If the file is missing, damaged or no AnnData, or has no such coordinates or column.
    """
    with opened(Path(path), "spots") as source:
        _require_anndata(source, "spots")
        require_groups(source)
        if "spatial" not in source.names("obsm"):
            raise SlideError(f"{path}: no coordinates; expected obsm['spatial'], found: {source.listed('obsm')}")
        coords = np.asarray(dense(source, "obsm/spatial"), np.float64)
        names = [str(name) for name in read_names(source, "obs")]
        sections = read_labels(source, column) if column is not None else None
    if coords.ndim != 2 or coords.shape[1] != 2 or len(coords) != len(names) or not np.isfinite(coords).all():
        raise SlideError(
            f"{path}: obsm['spatial'] is {list(coords.shape)} for {len(names):,} spots; expected finite [N, 2]"
        )
    return coords, names, sections


def _require_anndata(source: Source, what: str) -> None:
    if not is_anndata(source):
        raise FileError(f"{source.path}: not an AnnData; expected {what} in h5ad or zarr, found: {source.listed('')}")


@contextmanager
def opened(path: Path, what: str) -> Iterator[Source]:
    """Open a file by what is in it."""
    import h5py

    with reading(path):  # a folder around it may not be read
        folder, file, there = path.is_dir(), path.is_file(), path.exists()
        store = folder and any((path / name).is_file() for name in ROOTS)
    if folder:
        if not store:
            raise FileError(f"{path}: a folder, but not a zarr store; expected {what} in a file or a .zarr folder")
    elif not file:
        raise FileError(f"{path}: no such file; expected {what}" if not there else f"{path}: not a file")
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
        raise FileError(
            f"{path}: a PyTorch file (.pt), which CLAM and TRIDENT fill with features alone; it holds no coordinates, "
            "and is not unpickled: give the .h5 of the slide"
        )
    if any(name in ROOTS for name in names):
        return
    nested = next((name for name in names if name.endswith(ROOTS) and name.count("/") == 1), None)
    if nested is not None:
        raise FileError(f"{path}: an archive of the folder {nested.split('/')[0]!r}; zip what is in it, not the folder")
    kind = "a zip archive without a zarr store" if names else "not an HDF5 file, zarr folder or .zarr.zip"
    raise FileError(f"{path}: {kind}; expected {what} in HDF5, h5ad or zarr")
