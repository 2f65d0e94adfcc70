"""From a slide image to genes: the same as by way of its features, and drawn over the tissue."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import anndata
import h5py
import numpy as np
import pytest
from spatialdata import read_zarr

from helpers import CROP, without_coverage
from images_helpers import tissue_pixels, write_svs
from stpath_runtime.cli.app import main
from stpath_runtime.engine import Engine
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.images.features import FeaturesJob
from stpath_runtime.images.slide import ImageSlides
from stpath_runtime.readers import read_slide

GENES = "GENE1,GENE2,GENE7"


@pytest.fixture
def words(tiny_engine, tiny_encoder):
    return ["--engine", str(tiny_engine), "--encoder", str(tiny_encoder), "--genes", GENES, "--organ", "Skin"]


def test_two_ways_give_the_same_genes(words, tiny_engine, tmp_path, capsys):
    assert main(["predict", str(CROP), *words, "--out", str(tmp_path / "a.h5ad")]) == 0
    assert capsys.readouterr().out.endswith("spots, 3 genes (Skin, unknown technology)\n")
    features = tmp_path / "a.features.h5"
    rest = ["--engine", str(tiny_engine), "--genes", GENES, "--organ", "Skin"]
    assert main(["predict", str(features), *rest, "--out", str(tmp_path / "b.h5ad")]) == 0
    image, file = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    np.testing.assert_allclose(image.X, file.X, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(image.obsm["spatial"], file.obsm["spatial"] + 112)  # centres
    assert (tmp_path / "a.tiles.png").stat().st_size > 10_000
    assert image.uns["stpath"]["patch"]["centred"]
    assert ("stpath_embedding" in image.obsm, "stpath_embedding" in file.obsm) == (True, False)  # stpath view wants it


def read_back(path, form):
    """The AnnData of a result."""
    if form == "spatialdata":
        return read_zarr(path).tables["stpath"]
    return anndata.read_h5ad(path) if form == "h5ad" else anndata.read_zarr(path)


@pytest.mark.parametrize("form", ["h5ad", "zarr", "spatialdata"])
def test_genes_are_added_and_the_tissue_is_kept(words, tiny_engine, tmp_path, form):
    path = tmp_path / ("a.h5ad" if form == "h5ad" else "a.zarr")
    predict = ["predict", str(CROP), *words, "--out", str(path), "--format", form]
    assert main(predict) == 0
    assert main(["decode", str(path), "--engine", str(tiny_engine), "--genes", "GENE9"]) == 0
    adata = read_back(path, form)
    assert list(adata.var_names) == [*GENES.split(","), "GENE9"]
    assert adata.uns["spatial"][CROP.stem]["images"]["hires"].dtype == np.uint8
    assert main([*predict, "--no-embeddings"]) == 0
    assert "stpath_embedding" not in read_back(path, form).obsm


def test_torch_is_not_imported(words, tmp_path):
    code = (
        "import sys; from stpath_runtime.cli.app import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules and 'timm' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "predict", str(CROP), *words, "--out", str(tmp_path / "a.zarr")]
    subprocess.run(command, check=True, env=without_coverage())
    assert (tmp_path / "a.zarr" / "uns" / "spatial").is_dir()


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_scanpy_and_squidpys_layout_draw_genes_over_the_tissue(form, words, tmp_path):
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt
    import scanpy as sc

    assert main(["predict", str(CROP), *words, "--out", str(tmp_path / f"a.{form}")]) == 0
    adata = anndata.read_h5ad(tmp_path / "a.h5ad") if form == "h5ad" else anndata.read_zarr(tmp_path / "a.zarr")
    spatial = adata.uns["spatial"][CROP.stem]
    scales, images = spatial["scalefactors"], spatial["images"]
    for name in ("hires", "lowres"):
        height, width, _ = images[name].shape
        scale = scales[f"tissue_{name}_scalef"]
        assert (round(1124 * scale), round(1350 * scale)) == pytest.approx((width, height), abs=1)
        middles = (adata.obsm["spatial"] * scale).astype(int)  # of tissue, not of glass
        assert images[name][middles[:, 1], middles[:, 0]].std(axis=1).mean() > 5
    assert scales["spot_diameter_fullres"] == 224
    axes = sc.pl.spatial(adata, color=["GENE1", "GENE2"], show=False)
    assert len(axes) == 2
    assert axes[0].get_images()  # the tissue is below
    plt.close("all")


def test_sections_are_slides_of_their_own(words, tiny_engine, tmp_path):
    path = write_svs(tmp_path / "two.svs", tissue_pixels())
    assert main(["predict", str(path), *words, "--sections", "--out", str(tmp_path / "a.h5ad")]) == 0
    assert main(["predict", str(path), *words, "--out", str(tmp_path / "together" / "b.h5ad")]) == 0
    adata, together = anndata.read_h5ad(tmp_path / "a.h5ad"), anndata.read_h5ad(tmp_path / "together" / "b.h5ad")
    assert adata.obs["section"].cat.categories.tolist() == ["section 1", "section 2"]
    slide = read_slide(tmp_path / "a.features.h5", organ="Skin")
    engine = Engine.load(tiny_engine)
    for section in adata.obs["section"].cat.categories:
        rows = np.flatnonzero(adata.obs["section"] == section)
        alone = type(slide)(slide.coords[rows], slide.features[rows], organ="Skin")
        found = engine.predict(alone, genes=GENES.split(","))
        np.testing.assert_allclose(adata.X[rows], found.X, rtol=0, atol=1e-5)
    assert np.abs(adata.X - together.X).max() > 1e-3  # it matters
    # The features file tells the sections itself.
    assert main(["predict", str(tmp_path / "a.features.h5"), "--engine", str(tiny_engine), "--genes", GENES,
                 "--organ", "Skin", "--out", str(tmp_path / "c.h5ad")]) == 0  # fmt: skip
    np.testing.assert_allclose(anndata.read_h5ad(tmp_path / "c.h5ad").X, adata.X, rtol=0, atol=1e-6)


def test_sections_of_an_anndata_of_features(tiny_engine, tmp_path):
    rng = np.random.default_rng(0)
    adata = anndata.AnnData(rng.standard_normal((40, 96)).astype(np.float32))
    adata.obsm["spatial"] = rng.uniform(0, 5000, (40, 2))
    adata.obs["part"] = ["left"] * 15 + ["right"] * 25
    adata.write_h5ad(tmp_path / "f.h5ad")
    words = ["predict", str(tmp_path / "f.h5ad"), "--engine", str(tiny_engine), "--genes", GENES]
    assert main([*words, "--sections", "part", "--out", str(tmp_path / "a.h5ad")]) == 0
    assert main([*words, "--out", str(tmp_path / "b.h5ad")]) == 0
    a, b = (anndata.read_h5ad(tmp_path / f"{name}.h5ad") for name in "ab")
    assert a.obs["section"].value_counts().to_dict() == {"right": 25, "left": 15}
    assert np.abs(a.X - b.X).max() > 1e-3


def test_sections_in_context(tiny_engine, tiny):
    """A context spot is one of its section, and of no other."""
    from stpath_runtime.slides.context import Context
    from stpath_runtime.slides.slide import Slide

    rng = np.random.default_rng(0)
    coords, features = rng.uniform(0, 100, (30, 2)), rng.standard_normal((30, 96))
    sections = ["a", "b"] * 15
    names = ["GENE1", "GENE2"]
    context = Context([0, 3, 7, 8], rng.poisson(4, (4, 2)), names)
    engine = Engine.load(tiny_engine)
    whole = engine.predict(Slide(coords, features, sections=sections), genes=names, context=context)
    for section, ids, rows in (("a", [0, 8], slice(0, None, 2)), ("b", [3, 7], slice(1, None, 2))):
        counts = context.counts[[context.ids.index(i) for i in ids]]
        own = Context([i // 2 for i in ids], counts, names)
        alone = engine.predict(Slide(coords[rows], features[rows]), genes=names, context=own)
        np.testing.assert_allclose(whole[whole.obs["section"] == section].X, alone.X, rtol=0, atol=1e-5)
    assert whole.obs["context"].sum() == 4


def test_patches_go_the_same_way(words, tmp_path):
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["img"] = rng.integers(0, 256, (5, 256, 256, 3), dtype=np.uint8)
        file["coords"] = rng.integers(0, 9_000, (5, 2))
        file["barcode"] = np.array([[f"AAAC{i}-1".encode()] for i in range(5)])
    assert main(["predict", str(tmp_path / "p.h5"), *words, "--out", str(tmp_path / "a.h5ad")]) == 0
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert adata.obs_names.tolist() == [f"AAAC{i}-1" for i in range(5)]
    assert "spatial" not in adata.uns


def test_spots_of_visium_in_context(words, tiny, tmp_path):
    (tmp_path / "tissue_positions.csv").write_text(
        "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres\n"
        + "".join(f"S{i}-1,1,{i},0,{300 + 40 * i},{300 + 25 * i}\n" for i in range(12))
    )
    counts = anndata.AnnData(np.ones((3, 2), np.float32))
    counts.obs_names, counts.var_names = ["S1-1", "S4-1", "S9-1"], ["GENE1", "GENE2"]
    counts.write_h5ad(tmp_path / "counts.h5ad")
    more = ["--spots", str(tmp_path / "tissue_positions.csv"), "--context", str(tmp_path / "counts.h5ad")]
    assert main(["predict", str(CROP), *words, *more, "--out", str(tmp_path / "a.h5ad")]) == 0
    adata = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert adata.obsm["spatial"][:2].tolist() == [[300, 300], [325, 340]]
    assert adata.obs_names[adata.obs["context"]].tolist() == ["S1-1", "S4-1", "S9-1"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder", "none"], "give the tile encoder with --encoder"),
        (["--pitch", "0"], "--pitch 0"),
        (["--sections", "part"], "a column of obs, and there is no obs"),
        (["--mpp", "-1"], "--mpp -1"),
        (["--tissue", "nowhere.geojson"], "--tissue nowhere.geojson: no such file"),
    ],
)
def test_faults_of_the_options(more, message, words, tmp_path, capsys):
    if more == ["--encoder", "none"]:
        words, more = words[:2] + words[4:], []
    assert main(["predict", str(CROP), *words, *more, "--out", str(tmp_path / "a.h5ad")]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.h5*"))


def test_an_image_that_is_not_there_without_an_encoder(tiny_engine, tmp_path, capsys):
    words = ["--engine", str(tiny_engine), "--out", str(tmp_path / "a.h5ad")]
    assert main(["predict", str(CROP), str(tmp_path / "gone.svs"), *words]) == 2
    assert "gone.svs: no such file" in capsys.readouterr().err


def test_options_of_images_without_an_image(tiny_engine, tiny_encoder, tmp_path, capsys):
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["embeddings"], file["coords"] = np.ones((3, 96), np.float32), np.eye(3, 2)
    words = ["predict", str(tmp_path / "f.h5"), "--engine", str(tiny_engine), "--out", str(tmp_path / "a.h5ad")]
    for more, message in (
        (["--encoder", str(tiny_encoder)], "there is no slide image and no patches file"),
        (["--pitch", "100"], "--pitch 100.0: of slide images"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_an_encoder_of_another_width(encoder_folder, tiny_engine, tiny_encoder, tmp_path, capsys):
    from helpers import write_encoder
    from stpath_export.encoders.exporter import export_encoder

    folder = write_encoder(tmp_path / "hub", more={"embed_dim": 48, "patch_size": 16, "depth": 1})
    export_encoder(str(folder), tmp_path / "narrow")
    words = ["--engine", str(tiny_engine), "--encoder", str(tmp_path / "narrow"), "--out", str(tmp_path / "a.h5ad")]
    assert main(["predict", str(CROP), *words]) == 2
    assert "gives 48 features, and" in capsys.readouterr().err


def test_a_cohort_of_images(words, tmp_path, capsys):
    for name in "ab":
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{name}.svs").write_bytes(CROP.read_bytes())
    write_svs(tmp_path / "in" / "blank.svs", tissue_pixels(pieces=()))
    (tmp_path / "in" / "thumbnail.png").write_bytes(b"no slide")
    run = ["run", str(tmp_path / "in"), *words, "--out", str(tmp_path / "out")]
    assert main(run) == 1
    assert "no tissue in it" in (tmp_path / "out" / "failures.csv").read_text()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{name}{ending}" for name in "ab" for ending in (".h5ad", ".features.h5", ".tiles.png")} <= names
    a, b = (anndata.read_h5ad(tmp_path / "out" / f"{name}.h5ad") for name in "ab")
    np.testing.assert_array_equal(a.X, b.X)
    assert list(a.uns["spatial"]) == ["a"]
    capsys.readouterr()
    (tmp_path / "in" / "blank.svs").unlink()
    assert main(run) == 0
    assert "2 skipped" in capsys.readouterr().out
    assert main([*run, "--pitch", "150"]) == 1  # features of other tiles are there: nothing is overwritten
    assert "is of other tiles" in (tmp_path / "out" / "failures.csv").read_text()


def test_a_manifest_of_images(words, tmp_path, capsys):
    outlines = {"type": "Polygon", "coordinates": [[[0, 0], [600, 0], [600, 700], [0, 700], [0, 0]]]}
    (tmp_path / "t.geojson").write_text(json.dumps(outlines))
    (tmp_path / "a.svs").write_bytes(CROP.read_bytes())
    (tmp_path / "cohort.csv").write_text("slide,tissue,mpp\na.svs,t.geojson,0.499\n")
    assert main(["run", str(tmp_path / "cohort.csv"), *words, "--out", str(tmp_path / "out")]) == 0
    adata = anndata.read_h5ad(tmp_path / "out" / "a.h5ad")
    assert (adata.obsm["spatial"].max(axis=0) < 750).all()
    (tmp_path / "cohort.csv").write_text("slide,mpp\na.svs,half\n")
    assert main(["run", str(tmp_path / "cohort.csv"), *words, "--out", str(tmp_path / "out")]) == 2
    assert "line 2 has mpp 'half'" in capsys.readouterr().err


def test_images_on_ray_are_those_of_one_machine(words, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.svs").write_bytes(CROP.read_bytes())
    for out, more in (("here", []), ("ray", ["--ray", "local"])):
        assert main(["run", str(tmp_path / "in"), *words, *more, "--out", str(tmp_path / out)]) == 0
    for name in ("a.features.h5", "a.tiles.png"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()
    here, ray = (anndata.read_h5ad(tmp_path / out / "a.h5ad") for out in ("here", "ray"))
    np.testing.assert_allclose(here.X, ray.X, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--organ", "Kidny"], "unknown organ 'Kidny'.*Kidney"),
        (["--tech", "Visum"], "unknown technology 'Visum'"),
        (["--genes", "GENE_"], "unknown gene"),
    ],
)
def test_names_are_checked_before_features_are_made(more, message, words, tmp_path, capsys):
    assert main(["predict", str(CROP), *words, *more, "--out", str(tmp_path / "a.h5ad")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # no features, no picture


def test_a_stop_ends_after_the_batch_that_runs(tiny_encoder, tmp_path):
    """As of a cohort that is interrupted: a slide's features may take hours, and go on with the next run."""
    with TileEncoder.load(tiny_encoder) as encoder:
        slides = ImageSlides([FeaturesJob(CROP, tmp_path / "a.h5")], encoder)
        seen = []

        def tell(job, done: int, total: int) -> None:
            seen.append(done)
            slides.stop()

        with pytest.raises(InterruptedError, match="stopped after"):
            slides.next("Skin", None, tell)
        slides.close()
    assert len(seen) == 1
    assert not (tmp_path / "a.h5").exists()
