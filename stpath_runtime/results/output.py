"""Writing results: atomically, and tile by tile, however large they are."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoding.sizes import CHUNK
from ..errors import InstallError
from ..files import written_whole

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.floating]
Put = Callable[[slice, slice, Floats], None]  # spots, genes, values

LARGE = 2 << 30  # bytes of X above which zarr is the default
HELD = 64 << 20  # bytes of a result without X, up to which it is held in memory to be written
ARRAY = {"encoding-type": "array", "encoding-version": "0.2.0"}  # how anndata marks a dense matrix
TABLE, SHAPES = "stpath", "spots"  # elements of a SpatialData
PROVENANCE = "uns/stpath"
DEVIATION = "std"  # in layers: of the samples whose mean X is


class Format(StrEnum):
    """What a result is written as."""

    H5AD = "h5ad"
    ZARR = "zarr"
    SPATIALDATA = "spatialdata"

    @property
    def suffix(self) -> str:
        """How its name ends."""
        return ".h5ad" if self is Format.H5AD else ".zarr"


def is_prediction(path: Path) -> bool:
    """Whether stpath wrote what is at the path."""
    import h5py

    if path.is_dir():
        return any((path / table / PROVENANCE).is_dir() for table in ("", f"tables/{TABLE}"))
    if not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path, "r") as file:
            return PROVENANCE in file
    except OSError:
        return False


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write an AnnData; the file appears under its name only when it is whole."""
    with written_whole(path) as partial:
        adata.write_h5ad(partial)


@contextmanager
def write_frame(frame: AnnData, path: Path, form: Format, dtype: np.dtype[Any]) -> Iterator[Put]:
    """Write a result without X, and yield the function that writes tiles of X, [N, G].

    The file appears under its name only when the block has ended well.
    """
    writers = {Format.H5AD: _write_hdf5, Format.ZARR: _write_zarr, Format.SPATIALDATA: _write_spatialdata}
    if form is Format.SPATIALDATA:
        require_spatialdata()
    with written_whole(path) as partial, writers[form](frame, partial, dtype) as put:
        yield put


class _Disk(io.FileIO):
    """A file for HDF5, which crashes the process if a write fails: errors are hidden from it and raised later."""

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data; after a failure, nothing."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while len(rest) and self.failed is None:
            try:
                rest = rest[super().write(rest) :]
            except OSError as error:
                self.failed = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the length of the file."""
        try:
            return super().truncate(size) if self.failed is None else size or 0
        except OSError as error:
            self.failed = error
            return size or 0

    def check(self) -> None:
        """Raise the error of the write that failed."""
        if self.failed is not None:
            raise self.failed


@contextmanager
def _write_hdf5(frame: AnnData, path: Path, dtype: np.dtype[Any]) -> Iterator[Put]:
    import anndata.io
    import h5py

    with _Disk(path, "w+") as disk:
        with h5py.File(disk, "w") as file:
            anndata.io.write_elem(file, "/", frame)
            x = file.create_dataset("X", frame.shape, dtype, chunks=_chunks(frame))
            x.attrs.update(ARRAY)

            def put(spots: slice, genes: slice, values: Floats) -> None:
                x[spots, genes] = values
                disk.check()

            yield put
        disk.check()


@contextmanager
def _write_zarr(frame: AnnData, path: Path, dtype: np.dtype[Any]) -> Iterator[Put]:
    import anndata.io
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}  # by their names; where they are small, as zarr takes a millisecond or more for each
    store = MemoryStore(files) if _bytes(frame) < HELD else path
    group = zarr.open_group(store, mode="w", zarr_format=2)  # that every anndata reads
    anndata.io.write_elem(group, "/", frame)
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content.to_bytes())
    yield _zarr_x(zarr.open_group(path, mode="r+", zarr_format=2), frame, dtype)
    zarr.consolidate_metadata(path, zarr_format=2)


def _bytes(frame: AnnData) -> int:
    """Bytes of what grows with the spots; a table of another program, which does not tell its own, counts as large."""
    return sum(getattr(part, "nbytes", HELD) for part in (*frame.obsm.values(), *frame.layers.values()))


@contextmanager
def _write_spatialdata(frame: AnnData, path: Path, dtype: np.dtype[Any]) -> Iterator[Put]:
    import pandas as pd
    import zarr
    from spatialdata import SpatialData
    from spatialdata.models import TableModel

    table = frame.copy()
    table.obs["region"], table.obs["spot_id"] = pd.Categorical([SHAPES] * frame.n_obs), np.arange(frame.n_obs)
    table = TableModel.parse(table, region=SHAPES, region_key="region", instance_key="spot_id")
    SpatialData(shapes={SHAPES: _shapes(frame)}, tables={TABLE: table}).write(path)
    group = zarr.open_group(path / "tables" / TABLE, mode="r+", use_consolidated=False)
    yield _zarr_x(group, frame, dtype)
    zarr.consolidate_metadata(path)


def require_spatialdata() -> None:
    """Raise InputError, with what to install, where spatialdata is not."""
    from importlib.util import find_spec

    if find_spec("spatialdata") is None:
        raise InstallError("SpatialData needs spatialdata; run: pip install 'stpath-engine[spatialdata]'")


def _shapes(frame: AnnData) -> Any:
    """The squares of tissue that the features are of, where their size is known; else circles around the coordinates.

    Where a file tells the size of its patches, its coordinates are their corners of the lowest x and y; those of an
    image are their centres.
    """
    import geopandas
    import shapely
    from spatialdata.models import ShapesModel

    from ..encoding.neighbors import usual_distance

    x, y = np.asarray(frame.obsm["spatial"], float).T
    side = frame.uns["stpath"]["patch"].get("level0_pixels")
    if side is not None:
        if frame.uns["stpath"]["patch"].get("centred"):
            x, y = x - side / 2, y - side / 2
        return ShapesModel.parse(geopandas.GeoDataFrame(geometry=shapely.box(x, y, x + side, y + side)))
    coords = np.column_stack([x, y])
    return ShapesModel.parse(
        coords, geometry=0, radius=(usual_distance(coords) or 1.0) / 2, index=np.arange(len(coords))
    )


def _zarr_x(group: Any, frame: AnnData, dtype: np.dtype[Any]) -> Put:
    import numcodecs
    from zarr.codecs import BloscCodec

    # Groups bits of equal significance: the little compression that predictions allow, at the speed of a disk.
    packed: Any = (
        BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle")
        if group.metadata.zarr_format == 3
        else numcodecs.Blosc("lz4", 1, numcodecs.Blosc.BITSHUFFLE)
    )
    x = group.create_array("X", shape=frame.shape, dtype=dtype, chunks=_chunks(frame), compressors=packed)
    x.attrs.update(ARRAY)

    def put(spots: slice, genes: slice, values: Floats) -> None:
        x[spots, genes] = values

    return put


def _chunks(frame: AnnData) -> tuple[int, ...]:
    return tuple(min(most, size) for most, size in zip(CHUNK, frame.shape, strict=True))
