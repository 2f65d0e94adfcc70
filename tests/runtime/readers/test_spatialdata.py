"""SpatialData as LazySlide writes it."""

from __future__ import annotations

import shutil
import sys

import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from anndata.io import write_elem
from hypothesis import given, settings
from hypothesis import strategies as st
from readers_helpers import COORDS, FEATURES, TILE_SPEC, make_table, make_tiles, write_spatialdata
from scipy.sparse import csr_matrix
from spatialdata.models import TableModel

from stpath_runtime import InputError, InputWarning, read_slide
from stpath_runtime.slides.slide import Patch

ORDER = [3, 1, 4, 0, 2]
CROPPED = {"tile_spec": {"tiles": TILE_SPEC | {"height": 224, "width": 224}}}


@pytest.mark.parametrize("name", ["s.zarr", "s.zarr.zip"])
@pytest.mark.parametrize("version", [2, 3])
def test_a_table_of_tiles(name, version, tmp_path):
    tables = {"gigapath_tiles": make_table(ORDER, FEATURES[ORDER])}
    slide = read_slide(write_spatialdata(tmp_path / name, tables, version=version), technology="visium")
    assert slide.obs_names == [str(i) for i in ORDER]
    np.testing.assert_array_equal(slide.features, FEATURES[ORDER])
    np.testing.assert_array_equal(slide.coords, COORDS[ORDER])
    assert slide.patch == Patch(256, 20, 512, 40)
    assert slide.technology == "Visium"


def test_tiles_that_lazyslide_cropped_for_gigapath_warn(tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr", attrs=CROPPED)
    with pytest.warns(InputWarning, match=r"patches of 224 pixels by LazySlide.* saw 98 um, not 112"):
        read_slide(path)
    tables = {"uni_tiles": make_table(range(5))}
    assert read_slide(write_spatialdata(tmp_path / "t.zarr", tables, attrs=CROPPED)).patch == Patch(224, 20, 448, 40)


@settings(max_examples=5, deadline=None)
@given(order=st.lists(st.integers(0, 4), min_size=1, unique=True), shuffled=st.permutations(range(5)))
def test_rows_are_matched_by_id_and_not_by_order(order, shuffled, tmp_path_factory):
    tiles = make_tiles(COORDS[shuffled], tile_id=np.array(shuffled))
    tiles.index = np.array(shuffled)
    shapes = {"tiles": tiles}
    tables = {"gigapath_tiles": make_table(order, FEATURES[order])}
    slide = read_slide(write_spatialdata(tmp_path_factory.mktemp("sd") / "s.zarr", tables, shapes))
    np.testing.assert_array_equal(slide.coords, COORDS[order])
    np.testing.assert_array_equal(slide.features, FEATURES[order])


def test_shapes_without_x_and_y_have_corners(tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr", shapes={"tiles": make_tiles(x=None, y=None)})
    np.testing.assert_array_equal(read_slide(path).coords, COORDS)


def test_shapes_without_the_column_have_an_index(tmp_path):
    tiles = make_tiles(tile_id=None)
    tiles.index = np.array(ORDER)
    path = write_spatialdata(tmp_path / "s.zarr", {"t": make_table(ORDER, instance_key="spot")}, {"tiles": tiles})
    np.testing.assert_array_equal(read_slide(path).coords, COORDS)


@settings(max_examples=20, deadline=None)
@given(
    names=st.lists(st.integers(0, 40), min_size=5, max_size=5, unique=True),
    rows=st.lists(st.integers(0, 4), min_size=1, unique=True),
    by=st.sampled_from(["index", "column", "both"]),
    as_text=st.booleans(),
)
def test_instances_are_names_in_the_index_or_else_in_the_column(names, rows, by, as_text, tmp_path_factory):
    """The right places, or a refusal where index and column name different shapes."""
    names = np.array([f"t{name}" for name in names] if as_text else names)
    other = np.array([f"o{i}" for i in range(5)] if as_text else range(5))  # as after reset_index
    tiles = make_tiles(tile_id=names if by != "index" else None)
    tiles.index = names if by != "column" else other
    tables = {"t": make_table(names[rows], FEATURES[rows])}
    path = write_spatialdata(tmp_path_factory.mktemp("sd") / "s.zarr", tables, {"tiles": tiles})
    ambiguous = by == "column" and set(names[rows]) <= set(other) and (names[rows] != other[rows]).any()
    if ambiguous:
        with pytest.raises(InputError, match="both hold the table's instances, and name other shapes"):
            read_slide(path)
    else:
        np.testing.assert_array_equal(read_slide(path).coords, COORDS[rows])


def test_text_ids_of_shapes_with_numbers_are_said_to_be(tmp_path):
    tables = {"t": make_table(np.arange(5).astype(str))}
    path = write_spatialdata(tmp_path / "s.zarr", tables, {"tiles": make_tiles(tile_id=None)})
    with pytest.raises(InputError, match="the table's tile_id are text, and those of the shapes are numbers"):
        read_slide(path)


def test_x_and_y_are_places_only_where_the_store_says_so(tmp_path):
    """Columns of that name may be positions in an array of spots: the geometry has the places."""
    tiles = make_tiles(x=np.arange(5) % 2, y=np.arange(5) // 2)
    path = write_spatialdata(tmp_path / "visium.zarr", shapes={"tiles": tiles}, attrs={})
    np.testing.assert_array_equal(read_slide(path).coords, COORDS)


def test_features_in_obsm_of_a_table(tmp_path):
    counts, of_genes = make_table(range(5), csr_matrix(np.eye(5, 300, dtype="f4"))), make_table(range(5))
    counts.obsm["gigapath"], counts.obsm["uni"] = FEATURES, FEATURES[:, :3]
    of_genes.obsm["uni"] = FEATURES[:, :2]
    path = write_spatialdata(tmp_path / "s.zarr", {"counts": counts, "genes": of_genes})
    np.testing.assert_array_equal(read_slide(path, features_key="gigapath").features, FEATURES)
    np.testing.assert_array_equal(read_slide(path, features_key="genes/uni").features, FEATURES[:, :2])
    with pytest.raises(InputError, match=r"'uni' names several features; say which .*: counts/uni, genes/uni"):
        read_slide(path, features_key="uni")
    with pytest.raises(InputError, match=r"0.3% filled.*it holds: gigapath \[5, 8\], uni \[5, 3\]"):
        read_slide(path, features_key="counts")
    with pytest.raises(InputError, match=r"did you mean gigapath.*counts \[5, 300\] \(obsm: gigapath \[5, 8\]"):
        read_slide(path, features_key="gigapat")


def test_a_table_that_annotates_nothing_has_its_own_places(tmp_path):
    table = AnnData(FEATURES, obs=pd.DataFrame(index=list("abcde")), obsm={"spatial": COORDS})
    slide = read_slide(write_spatialdata(tmp_path / "s.zarr", {"t": TableModel.parse(table)}))
    np.testing.assert_array_equal(slide.coords, COORDS)
    np.testing.assert_array_equal(slide.features, FEATURES)
    assert slide.obs_names == list("abcde")
    del table.obsm["spatial"]
    path = write_spatialdata(tmp_path / "nowhere.zarr", {"t": TableModel.parse(table)})
    with pytest.raises(InputError, match="the table 't' annotates no shapes and has no obsm"):
        read_slide(path, features_key="t")


def test_a_table_of_two_regions_is_said_to_be(tmp_path):
    regions = pd.Categorical(["a", "a", "b", "b", "b"])
    obs = pd.DataFrame({"region": regions, "spot": [0, 1, 0, 1, 2]}, index=list("vwxyz"))
    table = TableModel.parse(AnnData(FEATURES, obs=obs), region=["a", "b"], region_key="region", instance_key="spot")
    shapes = {"a": make_tiles(tile_id=None), "b": make_tiles(tile_id=None)}
    with pytest.raises(InputError, match="annotates 'a', 'b'; .*save the rows of each as a table of its own"):
        read_slide(write_spatialdata(tmp_path / "s.zarr", {"t": table}, shapes))


def test_several_tables(tmp_path):
    tables = {"gigapath_tiles": make_table(range(5)), "uni_tiles": make_table(range(5), FEATURES[:, :3])}
    path = write_spatialdata(tmp_path / "s.zarr", tables)
    with pytest.raises(
        InputError, match=r"2 tables annotate .*\(features_key\).*gigapath_tiles \[5, 8\], uni_tiles \[5, 3\]"
    ):
        read_slide(path)
    assert read_slide(path, features_key="uni_tiles").features.shape == (5, 3)
    with pytest.raises(InputError, match=r"no table 'uni_tile' \(did you mean uni_tiles"):
        read_slide(path, features_key="uni_tile")


@pytest.mark.filterwarnings("ignore:The table is annotating:UserWarning")
def test_faults(tmp_path):
    with pytest.raises(InputError, match=r"no table annotates tiles.*its tables: none"):
        read_slide(write_spatialdata(tmp_path / "none.zarr", {}))
    path = write_spatialdata(tmp_path / "strangers.zarr", {"t": make_table([0, 1, 2, 3, 9])})
    with pytest.raises(
        InputError, match=r"'shapes/tiles': 1 of 5 rows of the table are not in it, the first has the tile_id 9"
    ):
        read_slide(path)
    path = write_spatialdata(tmp_path / "twice.zarr", shapes={"tiles": make_tiles(tile_id=np.array([0, 1, 2, 3, 3]))})
    with pytest.raises(InputError, match="'shapes/tiles' has one tile_id twice"):
        read_slide(path)
    path = write_spatialdata(tmp_path / "one_tile.zarr")
    (path / "tables" / "gigapath_tiles" / "obs" / "tile_id" / "c" / "0").unlink()  # reads as zeros
    with pytest.raises(InputError, match="the table 'gigapath_tiles' has one tile_id twice"):
        read_slide(path)
    path = write_spatialdata(tmp_path / "lost.zarr")
    (path / "shapes" / "tiles" / "shapes.parquet").unlink()
    with pytest.raises(InputError, match="no 'shapes/tiles/shapes.parquet'"):
        read_slide(path)
    shutil.rmtree(path / "shapes" / "tiles")
    with pytest.raises(
        InputError, match="annotates 'tiles'; give one that annotates one element of shapes: there is none"
    ):
        read_slide(path, features_key="gigapath_tiles")
    path = write_spatialdata(tmp_path / "damaged.zarr")
    shapes = path / "shapes" / "tiles" / "shapes.parquet"
    shapes.write_bytes(shapes.read_bytes()[:-20])
    with pytest.raises(InputError, match="'shapes/tiles/shapes.parquet' cannot be read; it is truncated or damaged"):
        read_slide(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("region", "tissues", "annotates 'tiles', 'tissues'; give one that annotates one element of shapes: tiles"),
        ("region", np.array(["tiles", "tissues"]), "annotates 'tiles', 'tissues'"),
        ("instance_key", "spot", "has no column 'spot'"),
        ("region_key", np.array(["a", "b"]), "has no column"),
    ],
)
def test_damaged_annotations(name, value, message, tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr")
    table = zarr.open_group(path / "tables" / "gigapath_tiles", mode="a", use_consolidated=False)
    write_elem(table["uns/spatialdata_attrs"], name, value)
    with pytest.raises(InputError, match=message):
        read_slide(path)
    write_elem(table["uns"], "spatialdata_attrs", {"region": "tiles"})
    with pytest.raises(InputError, match="the table 'gigapath_tiles' annotates nothing; give one of tiles"):
        read_slide(path)


def test_a_column_that_is_none(tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr")
    table = zarr.open_group(path / "tables" / "gigapath_tiles", mode="a", use_consolidated=False)
    write_elem(table["obs"], "tile_id", np.zeros((5, 2)))
    with pytest.raises(InputError, match="'tile_id' of the table 'gigapath_tiles' is not a column"):
        read_slide(path)


def test_without_the_extra(tmp_path, monkeypatch):
    path = write_spatialdata(tmp_path / "s.zarr")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InputError, match=r"s.zarr: .*pip install 'stpath-engine\[spatialdata\]'$"):
        read_slide(path)


@pytest.mark.parametrize(
    ("spec", "patch"),
    [
        ({"tiles": TILE_SPEC | {"base_downsample": None}}, Patch(256, 20)),
        ({"tiles": TILE_SPEC | {"mpp": None}}, None),
        ({"tissues": TILE_SPEC}, None),
        (  # wsidata of old
            {"tiles": {"height": 256, "width": 256, "raw_height": 512, "raw_width": 512, "level": 0, "mpp": 0.5}},
            Patch(256, 20),
        ),
    ],
)
def test_tile_specs_that_tell_less(spec, patch, tmp_path):
    assert read_slide(write_spatialdata(tmp_path / "s.zarr", attrs={"tile_spec": spec})).patch == patch


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([1, 2], r"tile_spec of 'tiles' is \[1, 2\], not a table"),
        ({"tiles": "224"}, "tile_spec of 'tiles' is '224'"),
        ({"tiles": TILE_SPEC | {"mpp": 0}}, "mpp in tile_spec of 'tiles' is 0;"),
        ({"tiles": TILE_SPEC | {"mpp": "half"}}, "mpp in tile_spec of 'tiles' is 'half'"),
        ({"tiles": TILE_SPEC | {"mpp": float("nan")}}, "mpp in tile_spec of 'tiles' is (nan|'NaN')"),
        ({"tiles": TILE_SPEC | {"width": 224}}, "is of 224 x 256 pixels, not a square"),
        ({"tiles": TILE_SPEC | {"width": 10**400}}, "width in tile_spec"),
    ],
)
def test_nonsense_of_a_tile_spec_is_ignored_with_a_warning(spec, message, tmp_path):
    path = write_spatialdata(tmp_path / "s.zarr", attrs={"tile_spec": spec})
    with pytest.warns(InputWarning, match=message):
        assert read_slide(path).patch is None
