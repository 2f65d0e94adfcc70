"""Files as the tools write them, each by the library that owns the format."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import anndata
import geopandas as gpd
import h5py
import numpy as np
import pandas as pd
import zarr
from anndata import AnnData
from shapely import box
from spatialdata import SpatialData
from spatialdata.models import ShapesModel, TableModel

from stpath_runtime.results.reading import open_prediction

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((5, 8)).astype(np.float32)
COORDS = np.array([[0, 512], [512, 0], [1024, 512], [512, 1024], [2048, 256]])
BARCODES = [f"spot-{i}" for i in range(5)]
TRIDENT_COORDS = {  # trident.IO.coords_to_h5
    "patch_size": 256,
    "patch_size_level0": 512,
    "level0_magnification": 40,
    "target_magnification": 20,
    "overlap": 0,
    "name": "slide",
    "savetodir": "out/20x_256px_0px_overlap",
    "level0_width": 4096,
    "level0_height": 4096,
}
TILE_SPEC = {  # wsidata's TileSpec.to_dict()
    "height": 256,
    "width": 256,
    "stride_height": 224,
    "stride_width": 224,
    "mpp": 0.5,
    "ops_level": 0,
    "ops_downsample": 1.0,
    "base_level": 0,
    "base_downsample": 2.0,
    "tissue_name": "tissues",
}


def write_hdf5(path: Path, attributes: dict | None = None, **datasets) -> Path:
    """An HDF5 file of datasets; attributes are those of `coords`."""
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
        if attributes:
            file["coords"].attrs.update(attributes)
    return path


def write_trident(path: Path, features=FEATURES, coords=COORDS, attributes=None, encoder="gigapath") -> Path:
    """As trident.IO.save_h5 does: resizable, one chunk a row; attributes of None as the text 'None'."""
    attributes = {
        "features": {"name": "slide", "savetodir": "out"} | ({} if encoder is None else {"encoder": encoder}),
        "coords": TRIDENT_COORDS if attributes is None else attributes,
    }
    with h5py.File(path, "w") as file:
        for key, value in {"features": features, "coords": coords}.items():
            shape = value.shape
            dataset = file.create_dataset(
                key, shape=shape, maxshape=(None, *shape[1:]), chunks=(1, *shape[1:]), dtype=value.dtype
            )
            dataset[:] = value
            for name, attribute in attributes[key].items():
                dataset.attrs[name] = "None" if attribute is None else attribute
    return path


def make_anndata(**changes) -> AnnData:
    """An AnnData of features in X and in obsm, with tables beside that no reader needs."""
    obs = pd.DataFrame({"area": pd.Categorical(list("aabba")), "score": np.arange(5.0)}, index=BARCODES)
    adata = AnnData(FEATURES.copy(), obs=obs)
    adata.obsm.update({"spatial": COORDS.astype(float), "gigapath": FEATURES * 2, "uni": FEATURES[:, :3]})
    for name, value in changes.items():
        setattr(adata, name, value)
    return adata


def write_anndata(adata: AnnData, path: Path) -> Path:
    """By the ending: .h5ad, .v2.zarr, .v3.zarr, or one of these and .zip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".h5ad":
            adata.write_h5ad(path)
            return path
        with anndata.settings.override(zarr_write_format=2 if ".v2" in path.name else 3):
            if path.suffix == ".zip":
                with zarr.storage.ZipStore(path, mode="w") as store:
                    adata.write_zarr(store)
            else:
                adata.write_zarr(path)
    return path


def make_tiles(coords=COORDS, **columns) -> gpd.GeoDataFrame:
    """As wsidata.io.add_tiles does."""
    x, y = coords[:, 0], coords[:, 1]
    data = {"tile_id": np.arange(len(coords)), "x": x, "y": y, "tissue_id": np.zeros(len(coords), int)} | columns
    data = {name: column for name, column in data.items() if column is not None}
    return ShapesModel.parse(gpd.GeoDataFrame(data | {"geometry": [box(*xy, *(xy + 448)) for xy in coords]}))


def make_table(tile_id, features=FEATURES, region="tiles", instance_key="tile_id") -> AnnData:
    """As wsidata.io.add_features does."""
    tile_id = np.asarray(tile_id)
    obs = pd.DataFrame(
        {instance_key: tile_id, "library_id": pd.Categorical([region] * len(tile_id))}, index=tile_id.astype(str)
    )
    return TableModel.parse(
        AnnData(X=features, obs=obs), region=region, region_key="library_id", instance_key=instance_key
    )


def write_spatialdata(path: Path, tables=None, shapes=None, attrs=None, version: int = 3) -> Path:
    """In zarr format 3 or 2; a path that ends in .zip is archived from a folder beside it."""
    from spatialdata._io.format import SpatialDataContainerFormatV01, SpatialDataContainerFormatV02

    folder = path.with_suffix("") if path.suffix == ".zip" else path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SpatialData(
            shapes={"tiles": make_tiles()} if shapes is None else shapes,
            tables={"gigapath_tiles": make_table(range(5))} if tables is None else tables,
            attrs={"tile_spec": {"tiles": TILE_SPEC}} if attrs is None else attrs,
        ).write(
            folder, sdata_formats=[SpatialDataContainerFormatV02() if version == 3 else SpatialDataContainerFormatV01()]
        )
    if path.suffix == ".zip":
        shutil.make_archive(str(folder), "zip", folder)
    return path


HUGE = 2**40


def _virtual(group: h5py.Group, name: str) -> None:
    layout = h5py.VirtualLayout(FEATURES.shape, FEATURES.dtype)
    layout[:] = h5py.VirtualSource("other.h5", "features", FEATURES.shape)
    group.create_virtual_dataset(name, layout)


def _through(group: h5py.Group, name: str) -> None:
    group.file["away"] = h5py.ExternalLink("other.h5", "/")
    group[name] = h5py.SoftLink("/away/features")


def _circle(group: h5py.Group, name: str) -> None:
    inner = group.create_group(name)
    inner["again"] = inner


HDF5_FAULTS = {  # name -> put it into a group under a name
    "external link": lambda group, name: group.__setitem__(name, h5py.ExternalLink("other.h5", "/features")),
    "soft link through an external one": _through,
    "external storage": lambda group, name: group.create_dataset(name, (5, 8), "f4", external=[("other", 0, 160)]),
    "virtual": _virtual,
    "huge, in chunks": lambda group, name: group.create_dataset(name, (HUGE, 8), "f4", chunks=(1024, 8)),
    "huge": lambda group, name: group.create_dataset(name, (2**26, 8), "f4"),
    "many chunks": lambda group, name: group.create_dataset(name, (2**24,), "u1", chunks=(1,)),
    "huge chunks": lambda group, name: group.create_dataset(name, (5, 8), "f4", chunks=(2**27, 7), maxshape=(None, 8)),
    "compound": lambda group, name: group.create_dataset(name, data=np.zeros(5, [("a", "f4")])),
    "opaque": lambda group, name: group.create_dataset(name, data=np.zeros(5, "V8")),
    "ragged": lambda group, name: group.create_dataset(name, (5,), h5py.vlen_dtype(np.float32)),
    "references": lambda group, name: group.create_dataset(name, (5,), h5py.ref_dtype),
    "circle": _circle,
    "nowhere": lambda group, name: group.__setitem__(name, h5py.SoftLink("/nowhere")),
}


def read_prediction(path):
    """All of a prediction, X too."""
    with open_prediction(path) as (adata, x):
        adata.X = x[:]
    return adata
