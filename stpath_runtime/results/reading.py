"""Reading predictions back, only the parts that are needed: X may be larger than the memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import PredictionError
from ..readers import opened
from ..readers.elements import read_matrix
from ..readers.mapped import map_array
from ..readers.sources import Source, reading
from ..readers.spatial import is_spatialdata
from ..readers.zarrs import ZarrSource
from .output import DEVIATION, TABLE

if TYPE_CHECKING:
    from anndata import AnnData


class Stored:
    """X of an open file, [N, G], read slice by slice; a damaged piece of it raises InputError.

    Parameters
    ----------
    array
        An array of the file, or a scipy sparse matrix, as others may have made of it.
    """

    def __init__(self, path: Path, array: Any) -> None:
        self.path, self.array = path, array
        self.shape: tuple[int, ...] = tuple(array.shape)

    def __getitem__(self, part: Any) -> npt.NDArray[Any]:
        with reading(self.path, "'X'"):
            piece: Any = self.array[part]
            return np.asarray(piece.toarray() if hasattr(piece, "toarray") else piece)


@contextmanager
def open_prediction(
    path: str | Path, mapped: Collection[str] = (), pictures: bool = False, deviations: bool = False
) -> Iterator[tuple[AnnData, Stored]]:
    """Open a prediction, h5ad, zarr or SpatialData: the result but for X, and X [N, G] of its file, to be sliced.

    Predictions that other programs changed are read, too: `uns["stpath"]` is empty where joining predictions
    dropped it, and X may be sparse.

    Parameters
    ----------
    mapped
        Names in obsm that are mapped from the file, not read.
    pictures
        Whether to read those of the tissue, `uns["spatial"]`, where the file has them.
    deviations
        Whether to read the standard deviations of samples, `layers["std"]`, where the file has them.

    Raises
    ------
    InputError
        If the file is missing or damaged, or has no spots, genes, coordinates or X.
    """
    import pandas as pd
    from anndata import AnnData

    with opened(Path(path), "a prediction") as source:
        start = _start(source)
        obs, var = source.read(f"{start}obs"), source.read(f"{start}var")
        if not isinstance(obs, pd.DataFrame) or not isinstance(var, pd.DataFrame) or len(obs) == 0:
            raise PredictionError(
                f"{source.path}: not a prediction by stpath predict; obs or var is not a table of rows"
            )
        obsm = {
            name: (map_array(source, key) if name in mapped else source.read(key))
            for name in source.names(f"{start}obsm")
            for key in [f"{start}obsm/{name}"]
        }
        x = _stored_x(source, start, (len(obs), len(var)))
        uns = {"stpath": _facts(source, start)}
        if pictures and source.names(f"{start}uns/spatial"):
            uns["spatial"] = source.read(f"{start}uns/spatial")
        with reading(source.path):
            frame = AnnData(obs=obs, var=var, obsm=obsm, uns=uns)
            # Other programs may keep something else under this name.
            if deviations and "samples" in uns["stpath"] and DEVIATION in source.names(f"{start}layers"):
                frame.layers[DEVIATION] = np.asarray(source.read(f"{start}layers/{DEVIATION}"), np.float32)
        yield frame, Stored(source.path, x)


def read_facts(path: str | Path) -> dict[str, Any]:
    """The provenance of a prediction, `uns["stpath"]`.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction, or has lost its provenance.
    """
    with opened(Path(path), "a prediction") as source:
        facts = _facts(source, _start(source))
        if not facts:
            raise PredictionError(f"{source.path}: not a prediction by stpath predict; it has no uns['stpath']")
        return facts


def _start(source: Source) -> str:
    """How the keys of the AnnData start in its file."""
    start = f"tables/{TABLE}/" if isinstance(source, ZarrSource) and is_spatialdata(source) else ""
    lacking = [key for key in ("obs", "var") if not source.names(f"{start}{key}")]
    lacking += ["obsm['spatial']"] if "spatial" not in source.names(f"{start}obsm") else []
    if lacking:
        raise PredictionError(
            f"{source.path}: not a prediction by stpath predict; it has no {' and no '.join(lacking)}"
        )
    return start


def _facts(source: Source, start: str) -> dict[str, Any]:
    if "stpath" not in source.names(f"{start}uns"):
        return {}
    facts = source.read(f"{start}uns/stpath")
    if not isinstance(facts, dict):
        raise PredictionError(
            f"{source.path}: not a prediction by stpath predict; its uns['stpath'] is not a table of facts"
        )
    return facts


def _stored_x(source: Source, start: str, shape: tuple[int, int]) -> Any:
    """X, not read yet; a sparse one is read."""
    key = f"{start}X"
    x = source.lazy(key)
    if x is None and source.names(key):
        matrix: Any = read_matrix(source, key)
        x = matrix.tocsc() if hasattr(matrix, "tocsc") else None
    if x is None or tuple(x.shape) != shape:
        held = "no X" if x is None else f"an X of the shape {list(x.shape)}"
        raise PredictionError(
            f"{source.path}: it has {held} for {shape[0]:,} spots and {shape[1]:,} genes; predict it again"
        )
    return x
