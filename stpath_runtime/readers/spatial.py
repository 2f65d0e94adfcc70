"""SpatialData, zarr, as LazySlide writes it: a table of features whose rows are tiles among the shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileError, InstallError, SlideError
from ..vocabulary import nearest_names
from .checks import check_size, reading
from .elements import dense, read_names
from .patches import patch_of_lazyslide
from .sources import Parts
from .zarrs import ZarrSource


def is_spatialdata(source: ZarrSource) -> bool:
    """Whether a store holds SpatialData."""
    return "spatialdata_attrs" in source.attributes() or {"tables", "shapes"} <= set(source.names())


def read_spatialdata(source: ZarrSource, features_key: str | None) -> Parts:
    """Read a table of features that annotates tiles; rows are matched to tiles by their id.

    Raises
    ------
    InputError
        If there is no such table or there are several, or its rows are not among the tiles.
    """
    table = _table_name(source, features_key)
    key = f"tables/{table}"
    element, instance_key = _annotated(source, table)
    rows = _column(source, table, instance_key)
    if len(set(rows.tolist())) != len(rows):
        raise SlideError(f"{source.path}: the table {table!r} has one {instance_key} twice; make them distinct")
    coords = _coords(source, element, instance_key, rows)
    patch = patch_of_lazyslide(source.attributes().get("tile_spec"), element, source.path)
    return Parts(coords, dense(source, f"{key}/X"), read_names(source, f"{key}/obs"), patch)


def _table_name(source: ZarrSource, features_key: str | None) -> str:
    tables = source.names("tables")
    shapes = {name: source.shape(f"tables/{name}/X") for name in tables}
    listed = ", ".join(f"{name} {shape or ''}".strip() for name, shape in shapes.items()) or "none"
    if features_key is not None:
        if features_key not in tables:
            near = nearest_names(features_key, tables)
            raise SlideError(f"{source.path}: no table {features_key!r}{near}; its tables: {listed}")
        return features_key
    of_tiles = [name for name in tables if source.attributes(f"tables/{name}").get("region") in source.names("shapes")]
    if len(of_tiles) != 1:
        problem = "no table annotates" if not of_tiles else f"{len(of_tiles)} tables annotate"
        raise SlideError(
            f"{source.path}: {problem} tiles or other shapes; say which has the features (features_key), its tables: "
            f"{listed}"
        )
    return of_tiles[0]


def _annotated(source: ZarrSource, table: str) -> tuple[str, str]:
    """The one element that a table annotates, and the column of obs with its instances."""
    found = source.read(f"tables/{table}/uns/spatialdata_attrs")
    if not isinstance(found, dict) or not {"region", "region_key", "instance_key"} <= set(found):
        raise SlideError(f"{source.path}: the table {table!r} annotates nothing; give one of tiles")
    region_key, instance_key = str(found["region_key"]), str(found["instance_key"])
    regions = {str(region) for region in np.atleast_1d(np.asarray(found["region"], object)).tolist()}
    regions |= {str(region) for region in _column(source, table, region_key).tolist()}
    if len(regions) != 1 or not regions <= set(source.names("shapes")):
        listed, shapes = ", ".join(map(repr, sorted(regions))), ", ".join(source.names("shapes")) or "there is none"
        raise SlideError(
            f"{source.path}: the table {table!r} annotates {listed}; give one that annotates one element of shapes: "
            f"{shapes}"
        )
    return regions.pop(), instance_key


def _column(source: ZarrSource, table: str, name: str) -> npt.NDArray[Any]:
    """A column of obs, [N]."""
    if name not in source.names(f"tables/{table}/obs"):
        raise FileError(f"{source.path}: the table {table!r} has no column {name!r}; make it anew")
    column = np.asarray(source.read(f"tables/{table}/obs/{name}"))
    if column.ndim != 1:
        raise FileError(f"{source.path}: {name!r} of the table {table!r} is no column; make it anew")
    return column


def _coords(source: ZarrSource, element: str, instance_key: str, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Coordinates of the rows of a table, [N, 2]: x and y of their tiles, or the corner of the outline."""
    import pandas as pd

    path, what = source.path, f"'shapes/{element}'"
    tiles = _read_tiles(source, element, instance_key)
    with reading(path, what):
        ids = pd.Index(tiles.get(instance_key, tiles.index))
        if not ids.is_unique:
            raise SlideError(f"{path}: {what} has one {instance_key} twice; make them distinct")
        at = ids.get_indexer(pd.Index(rows))
    if missing := rows[at < 0].tolist():
        raise SlideError(
            f"{path}: {len(missing):,} of {len(rows):,} rows of the table are not in {what}, the first has the "
            f"{instance_key} {missing[0]!r}; compute the features again"
        )
    with reading(path, what):
        return np.asarray(_corners(tiles)[at])


def _corners(tiles: Any) -> Any:
    """X and y of tiles, [N, 2]."""
    if {"x", "y"} <= set(tiles):
        return tiles[["x", "y"]].to_numpy()
    import shapely

    return shapely.bounds(shapely.from_wkb(tiles["geometry"].to_numpy()))[:, :2]


def _read_tiles(source: ZarrSource, element: str, instance_key: str) -> Any:
    """The table of an element's shapes: its ids, and coordinates or outlines."""
    try:
        import shapely  # noqa: F401  (for outlines)
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InstallError(
            f"{source.path}: reading SpatialData needs a package: pip install 'stpath-engine[spatialdata]'"
        ) from error
    name = f"shapes/{element}/shapes.parquet"
    if name not in source.files.sizes:
        raise FileError(f"{source.path}: no {name!r}; write it again with spatialdata 0.1 or newer")
    with reading(source.path, repr(name)), source.files.open(name) as stream:
        file = ParquetFile(stream)
        columns = set(file.schema_arrow.names)
        wanted = [instance_key, *(("x", "y") if {"x", "y"} <= columns else ("geometry",))]
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        declared = max(file.metadata.num_rows * 8 * len(wanted), sum(group.total_byte_size for group in groups))
        check_size(source.path, repr(name), declared, len(groups), source.files.sizes[name])
        return file.read([name for name in wanted if name in columns], use_pandas_metadata=True).to_pandas()
