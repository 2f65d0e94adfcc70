"""Files of features and of counts, as users have them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .context import Context
from .errors import InputError
from .slide import Slide

if TYPE_CHECKING:
    import h5py
    from anndata import AnnData

FEATURES = ("embeddings", "features")  # STPath and HEST; TRIDENT and CLAM
BARCODES = ("barcodes", "barcode")


def read_slide(path: str | Path, *, organ: str | None = None, technology: str | None = None) -> Slide:
    """Read a slide's features from an HDF5 file of STPath, HEST, TRIDENT or CLAM.

    The file holds `embeddings` or `features` [N, F] (or [1, N, F]), `coords` [N, 2] and, where it has them,
    `barcodes` [N] or [N, 1].

    Raises
    ------
    InputError
        If the file is missing, not HDF5, lacks features or coordinates, or holds a slide that `Slide` refuses.
    """
    import h5py

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file" if not path.exists() else f"{path}: a folder, not a features file")
    if not h5py.is_hdf5(path):
        hint = "; a .pt file holds no coordinates, give the .h5 beside it" if path.suffix == ".pt" else ""
        raise InputError(f"{path}: not an HDF5 file; give a features file with 'coords' and {_or(FEATURES)}{hint}")
    try:
        with h5py.File(path, "r") as file:
            features = _read(file, path, FEATURES)
            coords = _read(file, path, ("coords",))
            barcodes = _read(file, path, BARCODES)
            found = ", ".join(sorted(file))
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read, the file is truncated or damaged ({_brief(error)})") from error
    if features is None:
        raise InputError(f"{path}: no features; expected a dataset {_or(FEATURES)}, found: {found or 'nothing'}")
    if coords is None:
        raise InputError(f"{path}: no coordinates; expected a dataset 'coords' [N, 2], found: {found}")
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]
    if barcodes is not None and barcodes.dtype.kind not in "SOUiu":
        raise InputError(f"{path}: the barcodes are of type {barcodes.dtype}; expected text")
    return Slide(coords, features, barcodes, organ, technology, name=str(path))


def read_context(path: str | Path) -> Context:
    """Read context spots from an h5ad file of raw counts whose obs_names are barcodes of the slide.

    Raises
    ------
    InputError
        If the file is missing or is not a readable h5ad.
    """
    adata = _read_h5ad(path, "context counts")
    if adata.X is None:
        raise InputError(f"{path}: holds no X; expected raw counts there")
    return Context(ids=list(adata.obs_names), counts=adata.X, genes=list(adata.var_names))


def read_prediction(path: str | Path) -> AnnData:
    """Read an h5ad file that `stpath predict` wrote.

    Raises
    ------
    InputError
        If the file is missing or is not a readable h5ad.
    """
    adata = _read_h5ad(path, "a prediction")
    if "stpath" not in adata.uns or "spatial" not in adata.obsm or adata.n_obs == 0:
        raise InputError(f"{path}: no prediction of stpath predict (it has no uns['stpath'] or obsm['spatial'])")
    return adata


def _read_h5ad(path: str | Path, what: str) -> AnnData:
    import anndata

    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected {what} in h5ad")
    try:
        return anndata.read_h5ad(path)
    except Exception as error:  # anndata raises errors of h5py, pandas and its own on a damaged file
        raise InputError(f"{path}: cannot be read as h5ad, {what} ({_brief(error)})") from error


def _read(file: h5py.File, path: Path, names: tuple[str, ...]) -> npt.NDArray[Any] | None:
    """The first dataset of the names, or None; links that leave the file are not followed."""
    import h5py

    for name in names:
        link = file.get(name, getlink=True)
        if link is None:
            continue
        if isinstance(link, h5py.ExternalLink):
            raise InputError(f"{path}: {name!r} is a link to another file; copy the data into this one")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{path}: {name!r} is a group; expected a dataset")
        if dataset.external or dataset.is_virtual:
            raise InputError(f"{path}: {name!r} keeps its data in another file; copy the data into this one")
        try:
            return np.asarray(dataset[()])
        except MemoryError:
            raise InputError(f"{path}: {name!r} with the shape {list(dataset.shape)} does not fit in memory") from None
    return None


def _brief(error: Exception) -> str:
    """Return the first line of an error, short."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else line[:120] + "…"


def _or(names: tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)
