"""What stpath wrote, of which only what is asked for is read: X may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError, PredictionError
from ..output import TABLE
from .checks import reading
from .opening import opened
from .sources import Source
from .spatial import is_spatialdata
from .zarrs import ZarrSource

if TYPE_CHECKING:
    from anndata import AnnData


class Stored:
    """X of an open file, [N, G], read slice by slice; a damaged piece of it raises InputError."""

    def __init__(self, path: Path, array: Any) -> None:
        self.path, self.array = path, array
        self.shape: tuple[int, ...] = tuple(array.shape)

    def __getitem__(self, some: Any) -> npt.NDArray[Any]:
        with reading(self.path, "'X'"):
            return np.asarray(self.array[some])


@contextmanager
def open_prediction(path: str | Path) -> Iterator[tuple[AnnData, Stored]]:
    """Open a prediction, h5ad, zarr or SpatialData: the result but for X, and X [N, G] of its file, to be sliced.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction.
    """
    import pandas as pd
    from anndata import AnnData

    with opened(Path(path), "a prediction") as source:
        at = _place(source)
        facts = source.read(f"{at}uns/stpath")
        obs, var = source.read(f"{at}obs"), source.read(f"{at}var")
        obsm = {name: source.read(f"{at}obsm/{name}") for name in source.names(f"{at}obsm")}
        x = source.lazy(f"{at}X")
        tables = isinstance(obs, pd.DataFrame) and isinstance(var, pd.DataFrame) and len(obs) > 0
        if not tables or not isinstance(facts, dict) or x is None or x.shape != (len(obs), len(var)):
            raise _refused(source)
        with reading(source.path):
            frame = AnnData(obs=obs, var=var, obsm=obsm, uns={"stpath": facts})
        yield frame, Stored(source.path, x)


def read_facts(path: str | Path) -> dict[str, Any]:
    """The provenance of a prediction, `uns["stpath"]`.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction.
    """
    with opened(Path(path), "a prediction") as source:
        facts = source.read(f"{_place(source)}uns/stpath")
        if not isinstance(facts, dict):
            raise _refused(source)
        return facts


def _place(source: Source) -> str:
    """Where in its file the AnnData is, as the start of a key."""
    at = f"tables/{TABLE}/" if isinstance(source, ZarrSource) and is_spatialdata(source) else ""
    if "stpath" not in source.names(f"{at}uns") or "spatial" not in source.names(f"{at}obsm"):
        raise _refused(source)
    return at


def _refused(source: Source) -> InputError:
    return PredictionError(
        f"{source.path}: no prediction of stpath predict (it has no uns['stpath'] or obsm['spatial'], or is damaged)"
    )
