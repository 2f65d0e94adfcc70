"""Engines within LazySlide, and predictions in squidpy: `make test-lazyslide` installs both into .venv/lazyslide."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openslide
import pytest

from helpers import CROP, without_coverage
from stpath_runtime.cli.app import main
from stpath_runtime.engine import Engine
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.slides.slide import Slide

pytestmark = pytest.mark.lazyslide
PYTHON = Path(sys.prefix) / "lazyslide" / "bin" / "python"

# A torchvision built for CUDA loads beside a PyTorch for the CPU only if the operators that it lacks are declared.
START = """
import sys
import numpy as np
import torch
if "+cpu" in torch.__version__:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import lazyslide as zs
from stpath_runtime.integrations.lazyslide import STPath, TileModel
"""

SLIDE = (
    START
    + """
from wsidata import open_wsi
image, engine, encoder, out = sys.argv[1:]
wsi = open_wsi(image, store=None)
zs.pp.find_tissues(wsi)
zs.pp.tile_tissues(wsi, tile_px=256, stride_px=224, mpp=0.499)
zs.tl.feature_extraction(wsi, TileModel(encoder, name="gigapath"), device="cpu", pbar=False)
zs.tl.feature_prediction(wsi, STPath(engine, organ="Skin", genes=["GENE3", "ALIAS7"]), device="cpu", pbar=False)
table, tiles = wsi.tables["stpath_tiles"], wsi.shapes["tiles"]
np.savez(out, x=np.asarray(table.X), genes=list(table.var_names), features=wsi.tables["gigapath_tiles"].X,
         coords=tiles.bounds[["minx", "miny"]].to_numpy())
"""
)

MANY = (
    START
    + """
from lazyslide_models.base import FeaturePredictionModelProtocol, ImageModelProtocol
engine, encoder = sys.argv[1:]
model = STPath(engine, genes=["GENE3"], attention="knn:8")
assert isinstance(model, FeaturePredictionModelProtocol) and model.needs_coords and model.whole_slide
assert isinstance(TileModel(encoder), ImageModelProtocol)
rng = np.random.default_rng(0)
found = model.predict(rng.standard_normal((9_000, 96)).astype(np.float32), rng.uniform(0, 1e5, (9_000, 2)))
assert list(found) == ["GENE3"] and found["GENE3"].shape == (9_000,) and np.isfinite(found["GENE3"]).all()
everything = STPath(engine).predict(np.ones((3, 96), np.float32), np.eye(3, 2))
assert len(everything) == 200 and next(iter(everything)) == "ENSG00000000000"
for wrong, words in ((dict(organ="Kidny"), "Kidney"), (dict(genes=["GENE_"]), "unknown gene")):
    try:
        STPath(engine, **wrong)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(wrong)
"""
)


DRAWN = """
import sys
import matplotlib
matplotlib.use("agg")
import anndata
import matplotlib.pyplot as plt
import squidpy as sq
adata = anndata.read_zarr(sys.argv[1])
sq.pl.spatial_scatter(adata, color=["GENE1", "GENE2"])
axes = [axes for axes in plt.gcf().axes if axes.get_images()]
assert len(axes) == 2, "the tissue is below each gene"
assert len(axes[0].collections[0].get_offsets() if len(axes[0].collections[0].get_offsets()) > 1 else
           axes[0].collections[0].get_paths()) == adata.n_obs
"""


def run(script: str, *words: object) -> None:
    if not PYTHON.exists():
        pytest.skip("LazySlide is not installed; make test-lazyslide installs it")
    done = subprocess.run(
        [PYTHON, "-W", "ignore", "-c", script, *map(str, words)],
        env=without_coverage(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_features_and_genes_within_lazyslide_are_the_engines(tiny_engine, tiny_encoder, tmp_path):
    out = tmp_path / "found.npz"
    run(SLIDE, CROP, tiny_engine, tiny_encoder, out)
    found = np.load(out)
    corners = found["coords"]
    assert len(corners) > 5
    # Each tile is 256 pixels, of which the encoder sees the middle 224.
    with openslide.OpenSlide(CROP) as slide:
        tiles = [slide.read_region((int(x) + 16, int(y) + 16), 0, (224, 224)).convert("RGB") for x, y in corners]
    with TileEncoder.load(tiny_encoder) as encoder:
        features = encoder(np.stack([np.asarray(tile) for tile in tiles]))
    inside = (corners >= 0).all(axis=1) & (corners + 256 <= (1124, 1350)).all(axis=1)
    np.testing.assert_allclose(found["features"][inside], features[inside], rtol=1e-3, atol=1e-3)
    predicted = Engine.load(tiny_engine).predict(
        Slide(corners, found["features"], organ="Skin"), genes=["GENE3", "ALIAS7"]
    )
    np.testing.assert_allclose(found["x"], predicted.X, rtol=1e-4, atol=1e-5)
    assert found["genes"].tolist() == ["GENE3", "ALIAS7"]


def test_squidpy_draws_genes_over_the_tissue(tiny_engine, tiny_encoder, tmp_path):
    words = ["--engine", str(tiny_engine), "--encoder", str(tiny_encoder), "--genes", "GENE1,GENE2"]
    assert main(["predict", str(CROP), *words, "--out", str(tmp_path / "a.zarr")]) == 0
    run(START.partition("import lazyslide")[0] + DRAWN, tmp_path / "a.zarr")


def test_more_than_8000_tiles_run(tiny_engine, tiny_encoder):
    run(MANY, tiny_engine, tiny_encoder)
