"""SpatialData, zarr, as LazySlide and spatialdata write it: a table of features whose rows annotate shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FileError, InstallError, SlideError
from ..slides.slide import Patch
from ..slides.vocabulary import nearest_names
from .elements import dense, read_names
from .sources import (
    PIXELS,
    SCALES,
    Parts,
    check_size,
    patch_sizes,
    reading,
    shortened,
    warn_ignored,
    warn_of_resize,
    width_of,
)
from .zarrs import ZarrSource

LAZYSLIDE = {"height": PIXELS, "width": PIXELS, "mpp": SCALES, "base_downsample": SCALES}


def is_spatialdata(source: ZarrSource) -> bool:
    """Whether a store holds SpatialData."""
    return "spatialdata_attrs" in source.attributes() or {"tables", "shapes"} <= set(source.names())


def read_spatialdata(source: ZarrSource, features_key: str | None) -> Parts:
    """Read the features of a table, and the coordinates of the shapes that its rows annotate.

    A table that annotates nothing has its coordinates in obsm['spatial'], as an AnnData has.

    Raises
    ------
    InputError
        If there are no such features or several, the table annotates anything but one element of shapes, or its rows
        are not among the shapes.
    """
    table, key = _features(source, features_key)
    folder = f"tables/{table}"
    element, patch = None, None
    if _annotates(source, table):
        element, instance_key = _annotated(source, table)
        coords = _coords(source, table, element, instance_key)
        patch = _patch(source.attributes().get("tile_spec"), element, source.path)
    elif "spatial" in source.names(f"{folder}/obsm"):
        coords = dense(source, f"{folder}/obsm/spatial")
    else:
        raise SlideError(
            f"{source.path}: the table {table!r} annotates no shapes and has no obsm['spatial']; give a table whose "
            "rows have a place"
        )
    features = dense(source, f"{folder}/{key}")
    warn_of_resize(source.path, "LazySlide", patch, features, table, None)
    return Parts(coords, features, read_names(source, f"{folder}/obs"), patch)


def _features(source: ZarrSource, features_key: str | None) -> tuple[str, str]:
    """The table that holds the features, and where in it: "X" or "obsm/KEY"."""
    tables = source.names("tables")
    if features_key is None:
        return _only_table(source, tables), "X"
    name, _, rest = features_key.partition("/")
    found = [(features_key, "X")] if features_key in tables else []
    if name in tables and (rest == "X" or rest in source.names(f"tables/{name}/obsm")):
        found.append((name, "X" if rest == "X" else f"obsm/{rest}"))
    found += [(table, f"obsm/{features_key}") for table in tables if features_key in _obsm(source, table)]
    if len(found) == 1:
        return found[0]
    if not found:
        known = [*tables, *(key for table in tables for key in _obsm(source, table))]
        near = nearest_names(features_key, known)
        raise SlideError(
            f"{source.path}: no table {features_key!r}{near}, and no table has an obsm of that name; its tables: "
            f"{_listed(source, tables)}"
        )
    ways = ", ".join(f"{table}/{key.removeprefix('obsm/')}" for table, key in found)
    raise SlideError(f"{source.path}: {features_key!r} names several features; say which (features_key): {ways}")


def _only_table(source: ZarrSource, tables: list[str]) -> str:
    """The table of features where none is named: the only one of shapes or, where none is, the only one with places."""
    shapes = set(source.names("shapes"))
    annotating = [table for table in tables if _annotates(source, table)]
    of_shapes = [table for table in annotating if _regions(source, table) & shapes]
    placed = [table for table in tables if table not in annotating and "spatial" in _obsm(source, table)]
    chosen = of_shapes or placed or annotating  # for the last kind, reading it gives the reason why it cannot be read
    if len(chosen) != 1:
        problem = "no table annotates" if not chosen else f"{len(chosen)} tables annotate"
        raise SlideError(
            f"{source.path}: {problem} tiles or other shapes; say which has the features (features_key), its tables: "
            f"{_listed(source, tables)}"
        )
    return chosen[0]


def widths(source: ZarrSource) -> dict[str, int]:
    """What `features_key` may name, and how wide it is."""
    found: dict[str, int] = {}
    for table in source.names("tables"):
        keys = {table: f"tables/{table}/X"} | {key: f"tables/{table}/obsm/{key}" for key in _obsm(source, table)}
        found |= {name: width for name, key in keys.items() if (width := width_of(source.shape(key))) is not None}
    return found


def _listed(source: ZarrSource, tables: list[str]) -> str:
    """Tables with the shapes of their X and obsm, for messages."""
    shown = []
    for table in tables:
        shape, kept = source.shape(f"tables/{table}/X"), _obsm(source, table)
        inside = ", ".join(f"{key} {source.shape(f'tables/{table}/obsm/{key}')}" for key in kept)
        shown.append(f"{table} {shape or ''}".strip() + (f" (obsm: {inside})" if kept else ""))
    return ", ".join(shown) or "none"


def _obsm(source: ZarrSource, table: str) -> list[str]:
    return source.names(f"tables/{table}/obsm")


def _annotates(source: ZarrSource, table: str) -> bool:
    return "spatialdata_attrs" in source.names(f"tables/{table}/uns")


def _attributes(source: ZarrSource, table: str) -> dict[str, Any]:
    """The attributes of an annotating table: region, region_key and instance_key."""
    attributes = source.read(f"tables/{table}/uns/spatialdata_attrs")
    if not isinstance(attributes, dict) or not {"region", "region_key", "instance_key"} <= set(attributes):
        raise SlideError(f"{source.path}: the table {table!r} annotates nothing; give one of tiles")
    return attributes


def _regions(source: ZarrSource, table: str) -> set[str]:
    """The elements that a table says it annotates."""
    region = _attributes(source, table)["region"]
    return {str(name) for name in np.atleast_1d(np.asarray(region, object)).tolist()}


def _annotated(source: ZarrSource, table: str) -> tuple[str, str]:
    """The one element that a table annotates, and the column of obs with its instances."""
    attributes = _attributes(source, table)
    regions = _regions(source, table)
    regions |= {str(region) for region in _column(source, table, str(attributes["region_key"])).tolist()}
    shapes = source.names("shapes")
    listed = ", ".join(map(repr, sorted(regions)))
    if len(regions) != 1 or not regions <= set(shapes):
        several = " (of several slides? save the rows of each as a table of its own)" if len(regions) > 1 else ""
        raise SlideError(
            f"{source.path}: the table {table!r} annotates {listed}; give one that annotates one element of shapes: "
            f"{', '.join(shapes) or 'there is none'}{several}"
        )
    return regions.pop(), str(attributes["instance_key"])


def _column(source: ZarrSource, table: str, name: str) -> npt.NDArray[Any]:
    """A column of obs, [N]."""
    if name not in source.names(f"tables/{table}/obs"):
        raise FileError(f"{source.path}: the table {table!r} has no column {name!r}; make it again")
    column = np.asarray(source.read(f"tables/{table}/obs/{name}"))
    if column.ndim != 1:
        raise FileError(f"{source.path}: {name!r} of the table {table!r} is not a column; make it again")
    return column


def _coords(source: ZarrSource, table: str, element: str, instance_key: str) -> npt.NDArray[Any]:
    """Coordinates of the rows of a table, [N, 2]."""
    instances = _column(source, table, instance_key)
    if len(set(instances.tolist())) != len(instances):
        raise SlideError(f"{source.path}: the table {table!r} has one {instance_key} twice; make them distinct")
    tile_spec = source.attributes().get("tile_spec")
    of_tiles = isinstance(tile_spec, Mapping) and element in tile_spec  # LazySlide: x and y are its tiles' corners
    shapes = _read_shapes(source, element, instance_key, of_tiles)
    what = f"'shapes/{element}'"
    with reading(source.path, what):
        rows = _rows(shapes, instance_key, instances, f"{source.path}: {what}")
        return np.asarray(_corners(shapes)[rows])


def _rows(shapes: Any, instance_key: str, instances: npt.NDArray[Any], where: str) -> npt.NDArray[np.int64]:
    """The row of the shapes of each instance, [N].

    By SpatialData's rule instances are names in the index of the shapes. Where the index does not hold them, as after
    LazySlide has taken some of its tiles and numbered them anew, they are those of the column of that name.
    """
    import pandas as pd

    wanted = pd.Index(instances)
    ways = {"index": shapes.index}
    if instance_key in shapes.columns:
        ways[f"column {instance_key!r}"] = pd.Index(shapes[instance_key])
    if not all(ids.is_unique for ids in ways.values()):
        raise SlideError(f"{where} has one {instance_key} twice; make them distinct")
    found = {way: ids.get_indexer(wanted) for way, ids in ways.items()}
    whole = {way: rows for way, rows in found.items() if (rows >= 0).all()}
    if not whole:
        raise SlideError(f"{where}: {_why_missing(found, ways, wanted, instance_key)}")
    first, *others = whole.values()
    if any((rows != first).any() for rows in others):
        raise SlideError(
            f"{where}: its index and its {' and '.join(list(whole)[1:])} both hold the table's instances, and name "
            "other shapes by them; remove the column, or make it the index"
        )
    return np.asarray(first, np.int64)


def _why_missing(found: dict[str, Any], ways: dict[str, Any], wanted: Any, instance_key: str) -> str:
    if {wanted.inferred_type} | {ids.inferred_type for ids in ways.values()} == {"string", "integer"}:
        kinds = ("text", "numbers") if wanted.inferred_type == "string" else ("numbers", "text")
        return f"the table's {instance_key} are {kinds[0]}, and those of the shapes are {kinds[1]}; make both the same"
    rows = max(found.values(), key=lambda rows: int((rows >= 0).sum()))
    missing = wanted[rows < 0].tolist()
    return (
        f"{len(missing):,} of {len(wanted):,} rows of the table are not in it, the first has the "
        f"{instance_key} {missing[0]!r}; compute the features again"
    )


def _corners(shapes: Any) -> Any:
    """X and y of shapes, [N, 2]: of a point itself, of an outline its corner."""
    if "geometry" not in shapes:
        return shapes[["x", "y"]].to_numpy()
    import shapely

    return shapely.bounds(shapely.from_wkb(shapes["geometry"].to_numpy()))[:, :2]


def _read_shapes(source: ZarrSource, element: str, instance_key: str, of_tiles: bool) -> Any:
    """The table of an element's shapes: its ids and, of tiles, x and y, or else its outlines."""
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
        places = ("x", "y") if of_tiles and {"x", "y"} <= columns else ("geometry",)
        wanted = [name for name in (instance_key, *places) if name in columns]
        if not set(places) <= columns:
            raise FileError(f"{source.path}: {name!r} has no geometry; write it again with spatialdata")
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        declared = max(file.metadata.num_rows * 8 * len(wanted), sum(group.total_byte_size for group in groups))
        check_size(source.path, repr(name), declared, len(groups), source.files.sizes[name])
        return file.read(wanted, use_pandas_metadata=True).to_pandas()


def _patch(tile_spec: object, element: str, path: Path) -> Patch | None:
    """The patch that an element's entry in the root attribute `tile_spec` tells of, or None, as for TRIDENT.

    wsidata writes height and width in pixels at mpp microns a pixel, and base_downsample: how many pixels of level 0
    make one of them.
    """
    entry = tile_spec.get(element) if isinstance(tile_spec, Mapping) else tile_spec
    if entry is not None and not isinstance(entry, Mapping):
        warn_ignored(path, f"tile_spec of {element!r} is {shortened(entry)}, not a table of sizes")
    if not isinstance(entry, Mapping):
        return None
    found = patch_sizes(entry, LAZYSLIDE, f"{{}} in tile_spec of {element!r}", path)
    if not {"height", "width", "mpp"} <= set(found):
        return None
    if found["height"] != found["width"]:
        warn_ignored(
            path, f"tile_spec of {element!r} is of {found['width']:g} x {found['height']:g} pixels, not a square"
        )
        return None
    pixels, magnification, downsample = int(found["width"]), 10 / found["mpp"], found.get("base_downsample")
    if downsample is None:
        return Patch(pixels, magnification)
    return Patch(pixels, magnification, int(pixels * downsample), magnification * downsample)
