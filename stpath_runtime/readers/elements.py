"""AnnData, h5ad or zarr: only features, coordinates and names are read."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileError, SlideError
from ..slides.slide import dense_features
from ..slides.vocabulary import nearest_names
from .sources import Parts, Source, reading


def read_anndata(source: Source, features_key: str | None) -> Parts:
    """Read features, coordinates and names of an AnnData, and nothing else of it.

    Raises
    ------
    InputError
        If it has no obsm['spatial'], no such features, or X holds counts.
    """
    path, kept = source.path, source.names("obsm")
    require_groups(source)
    if "spatial" not in kept:
        raise SlideError(
            f"{path}: no coordinates; expected obsm['spatial'] [N, 2], found in obsm: {source.listed('obsm')}"
        )
    if features_key is not None and features_key not in kept:
        near = nearest_names(features_key, kept)
        raise SlideError(f"{path}: no obsm[{features_key!r}]{near}; obsm holds: {source.listed('obsm')}")
    if features_key is None and "X" not in source.names():
        raise SlideError(
            f"{path}: no X; say which of obsm are the features (features_key), it holds: {source.listed('obsm')}"
        )
    features = dense(source, "X" if features_key is None else f"obsm/{features_key}")
    return Parts(dense(source, "obsm/spatial"), features, read_names(source, "obs"))


def require_groups(source: Source) -> None:
    """Refuse a file of anndata before 0.8 whose tables are arrays of records.

    Raises
    ------
    InputError
        If it is one.
    """
    for table in ("obs", "var"):
        if source.shape(table) is not None and not source.names(table):
            raise FileError(
                f"{source.path}: {table!r} is an array of records, as anndata wrote before 0.8; write it again with a "
                "newer one: anndata.read_h5ad(PATH).write_h5ad(PATH)"
            )


def dense(source: Source, key: str) -> npt.NDArray[Any]:
    """Read a matrix as an array, [N, F]; a sparse one only if it is as filled as features are.

    Raises
    ------
    InputError
        If it is sparse, and hardly filled.
    """
    matrix = read_matrix(source, key)
    source.require_whole(key)
    beside = source.listed(_obsm_beside(key)) if hasattr(matrix, "nnz") else ""
    return np.asarray(dense_features(matrix, f"{source.path}: {key!r}", beside))


def _obsm_beside(key: str) -> str:
    """The obsm of the table that a matrix is of: that of "tables/t/X" is "tables/t/obsm"."""
    table = key.rpartition("/obsm/")[0] if "/obsm/" in key else key.rpartition("/")[0]
    return f"{table}/obsm" if table and table != "obsm" else "obsm"


def read_matrix(source: Source, key: str) -> Any:
    """Read a matrix, [N, F], dense, sparse or a table; the indices of a sparse one are within it.

    Raises
    ------
    InputError
        If it is damaged.
    """
    found = source.read(key)
    with reading(source.path, repr(key)):
        if hasattr(found, "check_format"):  # scipy trusts the indices of a file, and crashes
            found.check_format(full_check=True)
    return found


def _as_text(names: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Names of a file, [N], as anndata takes them: an index of numbers holds names, too, and never positions."""
    return np.array([name if isinstance(name, str | bytes) else str(name) for name in names], object)


def read_names(source: Source, table: str) -> npt.NDArray[Any]:
    """Names of the rows of obs or var, [N], as text.

    Raises
    ------
    InputError
        If there is no such table.
    """
    index = source.attributes(table).get("_index")
    if isinstance(index, str) and index in source.names(table):
        names = np.asarray(source.read(f"{table}/{index}"), object)
        if names.ndim == 1:
            return _as_text(names)
    raise FileError(
        f"{source.path}: {table!r} is not a table with an index of names; write it with anndata 0.8 or newer"
    )


def read_labels(source: Source, column: str) -> list[str]:
    """What a column of obs says of each row, [N], as text.

    Raises
    ------
    InputError
        If there is no such column, it is not of words or whole numbers, or a row has none.
    """
    if column not in source.names("obs"):
        near = nearest_names(column, source.names("obs"))
        raise SlideError(f"{source.path}: no column {column!r} in obs{near}; it holds: {source.listed('obs')}")
    values = np.asarray(source.read(f"obs/{column}"), object).ravel()
    if not all(isinstance(value, str | bytes | int | np.integer | np.bool_) for value in values):
        raise SlideError(
            f"{source.path}: obs[{column!r}] does not name a section of each spot; give words, none missing"
        )
    return [value.decode() if isinstance(value, bytes) else str(value) for value in values]
