"""Genes decoded later, from the embedding that a prediction keeps."""

from __future__ import annotations

import dataclasses
import shutil

import anndata
import numpy as np
import pytest
import spatialdata
from scipy.sparse import csr_matrix

from helpers import write_slide
from stpath_runtime import Context, Engine
from stpath_runtime.cli.app import main
from stpath_runtime.decoding import add_genes
from stpath_runtime.errors import InputWarning
from stpath_runtime.results.output import Format

READ = {
    "p.h5ad": anndata.read_h5ad,
    "p.zarr": anndata.read_zarr,
    "sd.zarr": lambda path: spatialdata.read_zarr(path)["stpath"],
}


@pytest.fixture(scope="module")
def engine(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


@pytest.fixture(scope="module")
def slide(tiny):
    return tiny.slides()[0][1]


@pytest.fixture
def predicted(slide, tiny_engine, tmp_path):
    """Predict three genes into a file of some format."""
    features = write_slide(slide, tmp_path / "s.h5")

    def predict(name: str, *more: str):
        path = tmp_path / name
        words = ["predict", features, "--engine", tiny_engine, "--out", path, "--organ", "Brain"]
        words += ["--genes", "GENE3,GENE5,GENE9", *more]
        words += ["--format", "spatialdata"] if name.startswith("sd") else []
        assert main([*map(str, words)]) == 0
        return path

    return predict


def refused(capsys, *words) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", READ)
def test_genes_are_added_to_what_is_there(name, predicted, engine, slide, tiny_engine, capsys):
    path = predicted(name, "--embeddings")
    words = ["decode", path, "--engine", tiny_engine, "--genes", "GENE5,GENE1,ENSG00000000003,GENE0"]
    assert main([*map(str, words)]) == 0
    assert capsys.readouterr().out.endswith(f"{path}: 61 spots, 2 genes added to 3\n")
    found = READ[name](path)
    genes = ["GENE3", "GENE5", "GENE9", "GENE1", "GENE0"]
    assert list(found.var_names) == genes
    expected = engine.predict(slide, genes=genes)
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5, atol=1e-5)
    assert list(found.var["gene_ids"]) == list(expected.var["gene_ids"])
    assert list(found.obs_names) == slide.barcodes
    assert found.uns["stpath"]["engine"] == engine.hash()
    assert main([*map(str, [*words[:-1], "all"])]) == 0
    assert READ[name](path).shape == (61, 200)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
@pytest.mark.parametrize("sparse", [False, True])
def test_predictions_that_were_joined_and_made_sparse(form, sparse, predicted, engine, slide, tiny_engine, tmp_path):
    """anndata.concat drops what var holds."""
    parts = anndata.read_h5ad(predicted("p.h5ad", "--embeddings"))
    joined = anndata.concat([parts[40:], parts[:40]], uns_merge="same")
    assert "gene_ids" not in joined.var
    joined.X = csr_matrix(joined.X) if sparse else joined.X.astype(np.float64)
    edited, out = tmp_path / f"edited.{form}", tmp_path / "more.h5ad"
    getattr(joined, f"write_{form}")(edited)
    words = ["decode", edited, "--engine", tiny_engine, "--genes", "GENE1,GENE5", "--out", out]
    assert main([*map(str, words)]) == 0
    found = anndata.read_h5ad(out)
    assert list(found.var_names) == ["GENE3", "GENE5", "GENE9", "GENE1"]
    organ = dataclasses.replace(slide, organ="Brain", technology=None)
    expected = engine.predict(organ, genes=list(found.var_names))[joined.obs_names]
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5, atol=1e-5)
    assert list(found.var["gene_ids"]) == list(expected.var["gene_ids"])
    assert main(["plot", str(edited), "GENE5", "--out", str(tmp_path / "map.png")]) == 0


def test_what_a_joined_prediction_lacks_is_said(predicted, tiny_engine, tmp_path, capsys):
    parts = anndata.read_h5ad(predicted("p.h5ad", "--embeddings"))
    joined = anndata.concat([parts[:20], parts[20:]])
    joined.write_h5ad(tmp_path / "no_uns.h5ad")
    words = ["--engine", tiny_engine, "--genes", "GENE1", "--out", tmp_path / "more.h5ad"]
    assert "does not say which engine made it" in refused(capsys, "decode", tmp_path / "no_uns.h5ad", *words)
    assert main(["plot", str(tmp_path / "no_uns.h5ad"), "GENE5", "--out", str(tmp_path / "map.png")]) == 0
    joined.uns["stpath"] = parts.uns["stpath"]
    joined.var_names = ["GENE3", "mine", "GENE9"]
    joined.write_h5ad(tmp_path / "renamed.h5ad")
    assert "1 of its names are not known to the engine, the first is 'mine'" in refused(
        capsys, "decode", tmp_path / "renamed.h5ad", *words
    )
    del joined.X
    joined.write_h5ad(tmp_path / "no_x.h5ad")
    assert "it has no X for 61 spots and 3 genes" in refused(capsys, "decode", tmp_path / "no_x.h5ad", *words)


def test_into_another_file_and_what_was_measured_stays(engine, slide, tiny_engine, tmp_path):
    context = Context([slide.barcodes[4]], [[7]], ["GENE5"])
    (prediction,) = engine.predict_many([slide], [context], genes=["GENE5"], embeddings=True, fill_context=True)
    prediction.write(tmp_path / "p.h5ad")
    words = [
        "decode",
        tmp_path / "p.h5ad",
        "--engine",
        tiny_engine,
        "--genes",
        "GENE6",
        "--out",
        tmp_path / "more.zarr",
    ]
    with pytest.warns(InputWarning, match="context spots hold measured values"):
        add_genes(engine, tmp_path / "p.h5ad", ["GENE6"], tmp_path / "more.h5ad", Format.H5AD, np.float32)
    assert main([*map(str, words)]) == 0
    assert anndata.read_h5ad(tmp_path / "p.h5ad").n_vars == 1
    found = anndata.read_zarr(tmp_path / "more.zarr")
    assert list(found.var_names) == ["GENE5", "GENE6"]
    assert found.X[4, 0] == pytest.approx(np.log1p(7))
    assert found.obs["context"].sum() == 1


@pytest.mark.parametrize("name", READ)
def test_what_others_added_is_not_lost(name, predicted, tiny_engine, tmp_path, capsys):
    path = predicted(name, "--embeddings")
    if name == "sd.zarr":
        data = spatialdata.read_zarr(path)
        data["he"] = spatialdata.models.Image2DModel.parse(np.zeros((3, 8, 8), np.uint8), dims="cyx")
        data.write_element("he")
        added = "images/he"
    else:
        adata = READ[name](path)
        adata.obs["cluster"], adata.var["variable"] = "a", True
        adata.layers["scaled"], adata.uns["leiden"] = adata.X, {"resolution": 1}
        getattr(adata, "write_h5ad" if name == "p.h5ad" else "write_zarr")(path)
        added = "uns/leiden, layers/scaled, var/variable"
    words = ["decode", path, "--engine", tiny_engine, "--genes", "GENE1"]
    err = refused(capsys, *words)
    assert f"{path}: holds what stpath did not write and would not keep ({added}); give --out" in err
    assert main([*map(str, [*words, "--out", tmp_path / "more.h5ad"])]) == 0
    found = anndata.read_h5ad(tmp_path / "more.h5ad")
    assert list(found.var_names) == ["GENE3", "GENE5", "GENE9", "GENE1"]
    assert ("cluster" in found.obs) == (name != "sd.zarr")


def test_an_archive_is_read_and_not_written_anew(predicted, tiny_engine, tmp_path, capsys):
    archive = shutil.make_archive(str(tmp_path / "p.zarr"), "zip", predicted("p.zarr", "--embeddings"))
    words = ["decode", archive, "--engine", tiny_engine, "--genes", "GENE1"]
    assert "an archive, which cannot be rewritten; give --out" in refused(capsys, *words)
    assert main([*map(str, [*words, "--out", tmp_path / "more.zarr"])]) == 0
    assert anndata.read_zarr(tmp_path / "more.zarr").n_vars == 4


def test_faults(predicted, tiny_engine, tmp_path, capsys):
    plain, kept = predicted("plain.h5ad"), predicted("p.h5ad", "--embeddings")
    decode = ["--engine", tiny_engine, "--genes", "GENE1"]
    assert "keeps no embedding; predict it again with --embeddings" in refused(capsys, "decode", plain, *decode)
    assert "unknown gene: 'GENEX'" in refused(capsys, "decode", kept, *decode[:-1], "GENEX")
    assert "no such file" in refused(capsys, "decode", tmp_path / "none.h5ad", *decode)
    assert "not a prediction" in refused(capsys, "decode", tmp_path / "s.h5", *decode)
    assert "give --out too" in refused(capsys, "decode", kept, *decode, "--format", "zarr")
    assert "would overwrite an input" in refused(capsys, "decode", kept, *decode, "--out", kept)
    other = shutil.copytree(tiny_engine, tmp_path / "other")
    manifest = other / "engine.json"
    manifest.write_text(manifest.read_text().replace('"created": "2', '"created": "1'))
    assert "predicted by another engine" in refused(capsys, "decode", kept, "--engine", other, "--genes", "GENE1")
    narrow = anndata.read_h5ad(kept)
    narrow.obsm["stpath_embedding"] = narrow.obsm["stpath_embedding"][:, :5]
    narrow.write_h5ad(tmp_path / "narrow.h5ad")
    assert "float32 of shape [61, 5]; this engine's is float [N, 64]" in refused(
        capsys, "decode", tmp_path / "narrow.h5ad", *decode
    )
