"""Results in files: what every format holds, who opens it, and that nothing looks whole that is not."""

from __future__ import annotations

import subprocess
import sys

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scanpy
import spatialdata
import zarr

from helpers import write_slide
from stpath_runtime import Context, Engine, InputError
from stpath_runtime.cli.app import main
from stpath_runtime.encoding import encoder
from stpath_runtime.files import remove, written_whole
from stpath_runtime.results import output
from stpath_runtime.results.output import Format, is_prediction
from stpath_runtime.results.targets import sized
from stpath_runtime.slides.slide import Patch, Slide

SUFFIX = {Format.H5AD: ".h5ad", Format.ZARR: ".zarr", Format.SPATIALDATA: ".sd.zarr"}
READ = {
    Format.H5AD: anndata.read_h5ad,
    Format.ZARR: anndata.read_zarr,
    Format.SPATIALDATA: lambda path: spatialdata.read_zarr(path)["stpath"],
}


@pytest.fixture(scope="module")
def engine(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


@pytest.fixture(scope="module")
def slide() -> Slide:
    rng = np.random.default_rng(0)
    barcodes = [f"spot{i}" for i in range(2500)]
    return Slide(rng.integers(0, 9000, (2500, 2)), rng.standard_normal((2500, 96)), barcodes, organ="Brain")


@pytest.fixture(params=list(Format))
def form(request) -> Format:
    return request.param


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_format_holds_what_predict_returns(engine, slide, form, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "GENES_AT_ONCE", 64)  # 4 x 3 tiles
    monkeypatch.setattr(encoder, "MOST_BYTES", 1024)
    expected = engine.predict(slide, embeddings=True)
    seen = []
    path = tmp_path / f"p{SUFFIX[form]}"
    (prediction,) = engine.predict_many([slide], embeddings=True)
    prediction.write(path, form, dtype, lambda *progress: seen.append(progress))
    found = READ[form](path)
    assert found.X.dtype == dtype
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-3 if dtype is np.float16 else 0, atol=1e-3)
    assert list(found.obs_names) == list(expected.obs_names)
    assert list(found.var_names) == list(expected.var_names)
    assert list(found.var["gene_ids"]) == list(expected.var["gene_ids"])
    for key in ("spatial", "stpath_embedding"):
        np.testing.assert_array_equal(found.obsm[key], expected.obsm[key])
    assert {name: found.uns["stpath"][name] for name in expected.uns["stpath"]} == expected.uns["stpath"]
    assert len(seen) == 12
    assert seen[-1] == (2500 * 200, 2500 * 200)
    assert is_prediction(path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_tools_open_the_files(engine, slide, tmp_path):
    (prediction,) = engine.predict_many([slide])
    prediction.write(tmp_path / "p.h5ad")
    backed = anndata.read_h5ad(tmp_path / "p.h5ad", backed="r")
    np.testing.assert_array_equal(backed[:7, 3].X, prediction.to_anndata().X[:7, 3:4])
    adata = scanpy.read_h5ad(tmp_path / "p.h5ad")
    scanpy.pp.pca(adata, n_comps=5)
    assert adata.obsm["X_pca"].shape == (2500, 5)
    prediction.write(tmp_path / "p.zarr", Format.ZARR)
    lazy = anndata.experimental.read_lazy(tmp_path / "p.zarr")
    np.testing.assert_array_equal(lazy[:7, 3].to_memory().X, backed[:7, 3].X)


def test_chunks_serve_one_gene_and_one_region(engine, slide, tmp_path):
    (prediction,) = engine.predict_many([slide])
    prediction.write(tmp_path / "p.h5ad")
    prediction.write(tmp_path / "p.zarr", Format.ZARR)
    with h5py.File(tmp_path / "p.h5ad") as file:
        assert file["X"].chunks == (1024, 200)
    x = zarr.open_group(tmp_path / "p.zarr", mode="r")["X"]
    assert (x.chunks, x.compressors[0].cname) == ((1024, 200), "lz4")


def test_zarr_is_the_same_whether_it_is_held_in_memory_before_or_not(engine, slide, tmp_path, monkeypatch):
    """A table in obsm, which tells no bytes, is written straight away."""
    (prediction,) = engine.predict_many([slide], embeddings=True)
    files = {}
    for name, held in {"held": output.HELD, "straight": 0}.items():
        monkeypatch.setattr(output, "HELD", held)
        prediction.write(tmp_path / name, Format.ZARR)
        paths = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        files[name] = {path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in paths}
    assert files["held"] == files["straight"]
    monkeypatch.undo()
    monkeypatch.setattr(zarr.storage, "MemoryStore", None)
    prediction.frame.obsm["of_others"] = pd.DataFrame({"a": np.arange(2500.0)}, index=prediction.frame.obs_names)
    prediction.write(tmp_path / "table", Format.ZARR)
    assert anndata.read_zarr(tmp_path / "table").obsm["of_others"]["a"].tolist() == list(range(2500))


@pytest.mark.parametrize("patch", [None, Patch(224, 20.0, 448, 40.0)])
def test_spatialdata_has_a_shape_for_every_spot(engine, slide, patch, tmp_path):
    of_patches = Slide(slide.coords, slide.features, slide.barcodes, patch=patch)
    (prediction,) = engine.predict_many([of_patches], genes=["GENE1"])
    prediction.write(tmp_path / "p.zarr", Format.SPATIALDATA)
    found = spatialdata.read_zarr(tmp_path / "p.zarr")
    shapes, table = spatialdata.match_element_to_table(found, "spots", "stpath")
    assert table.n_obs == 2500
    assert list(table.obs_names) == slide.barcodes
    if patch is None:
        centres = np.column_stack([shapes["spots"].geometry.x, shapes["spots"].geometry.y])
        np.testing.assert_array_equal(centres, slide.coords)
        assert 0 < shapes["spots"]["radius"].iloc[0] < 500
    else:
        np.testing.assert_array_equal(shapes["spots"].bounds[["minx", "miny"]], slide.coords)
        assert set(shapes["spots"].area) == {448.0**2}
        assert table.uns["stpath"]["patch"]["level0_pixels"] == 448


def test_one_spot_of_one_gene_in_every_format(engine, form, tmp_path):
    one = Slide([[5, 5]], np.ones((1, 96), np.float32))
    (prediction,) = engine.predict_many([one], genes=["GENE7"])
    prediction.write(tmp_path / "p.zarr" if form is not Format.H5AD else tmp_path / "p.h5ad", form)
    assert READ[form](next(tmp_path.iterdir())).shape == (1, 1)


def test_context_spots_are_marked_and_filled_on_request(engine, slide):
    counts = np.array([[3, 0], [1, 8]])
    context = Context(["spot7", "spot2000"], counts, ["GENE9", "ALIAS150"])
    plain = engine.predict(slide, context=context)
    filled = engine.predict(slide, context=context, fill_context=True)
    assert list(plain.obs_names[plain.obs["context"]]) == ["spot7", "spot2000"]
    assert "context" not in engine.predict(slide, genes=["GENE1"]).obs
    np.testing.assert_allclose(filled[["spot7", "spot2000"], ["GENE9", "GENE150"]].X, np.log1p(counts))
    changed = filled.X != plain.X
    assert changed.sum() == 4
    assert (plain.uns["stpath"]["context_filled"], filled.uns["stpath"]["context_filled"]) == (False, True)


def test_large_results_go_to_zarr_where_nothing_else_is_said(tmp_path):
    target = tmp_path / "a.b.h5ad"
    assert sized(target, None, (100_000, 38_982), np.float32) == (tmp_path / "a.b.zarr", Format.ZARR)
    assert sized(target, None, (10_000, 38_982), np.float32) == (target, Format.H5AD)
    assert sized(target, Format.H5AD, (100_000, 38_982), np.float32) == (target, Format.H5AD)


def run_with(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line in a process in which some code went before."""
    script = f"import sys\nfrom stpath_runtime.cli import main\n{code}\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def slide_file(slide, tmp_path_factory):
    return write_slide(slide, tmp_path_factory.mktemp("slides") / "s.h5")


FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
"""
KILLED = """
import os, signal
from stpath_runtime.encoding import encoder
from stpath_runtime.results import prediction
tiles = encoder.decode
def decode(*given):
    encoder.GENES_AT_ONCE = 64
    for i, tile in enumerate(tiles(*given)):
        if i == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield tile
prediction.decode = decode
"""


@pytest.mark.parametrize("trouble", [FULL, KILLED])
def test_a_full_disk_or_a_kill_leaves_what_was_there(trouble, form, slide_file, tiny_engine, tmp_path):
    path = tmp_path / f"p{SUFFIX[form]}"
    words = ["predict", slide_file, "--engine", tiny_engine, "--out", path, "--format", form.value]
    assert main([*map(str, words), "--genes", "GENE1"]) == 0
    done = run_with(trouble, *words)
    if trouble == FULL:
        assert done.returncode == 2
        assert done.stderr.startswith(f"error[output]: {path}: cannot be written"), done.stderr
        assert done.stderr.count("\n") == 1
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    else:
        assert done.returncode == -9
    assert READ[form](path).shape == (2500, 1)


def test_a_first_result_is_not_there_until_it_is_whole(form, slide_file, tiny_engine, tmp_path):
    path = tmp_path / f"p{SUFFIX[form]}"
    words = ["predict", slide_file, "--engine", tiny_engine, "--out", path, "--format", form.value]
    assert run_with(KILLED, *words).returncode == -9
    left = list(tmp_path.iterdir())
    assert left, "the kill came before anything was written: the test shows nothing"
    assert all(entry.name.startswith(".") and entry.name.endswith(".partial") for entry in left)
    assert not path.exists()


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    for content in ("old", "new"):
        with written_whole(tmp_path / "x") as partial:
            partial.mkdir()
            (partial / "file").write_text(content)
    assert (tmp_path / "x" / "file").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
    remove(tmp_path / "x")
    remove(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_spatialdata_says_what_to_install(engine, slide, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (prediction,) = engine.predict_many([slide], genes=["GENE1"])
    with pytest.raises(InputError, match=r"pip install 'stpath-engine\[spatialdata\]'"):
        prediction.write(tmp_path / "p.zarr", Format.SPATIALDATA)
    assert list(tmp_path.iterdir()) == []


def test_writing_takes_no_memory_for_all_of_x(tiny_engine, tmp_path):
    """100,000 spots of 2,000 genes are 800 MB; to write them takes a quarter of it, of which a tile is 64 MiB."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from stpath_runtime import Engine, Slide
from stpath_runtime.results.output import Format
from stpath_runtime.results.prediction import Prediction, new_frame
engine, out, form = Engine.load(sys.argv[1]), Path(sys.argv[2]), Format(sys.argv[3])
head = engine.backend, engine.precision
n, tokens = 100_000, np.tile(engine.vocabulary.all_tokens(), 10)
slide = Slide(np.zeros((n, 2), np.int32), np.zeros((n, 1), np.float16))
frame = new_frame(slide, [str(i) for i in range(2000)], engine.vocabulary.gene_ids(tokens), {}, None)
embedding = np.zeros((n, 64), np.float32)
Prediction(*head, frame[:2000].copy(), embedding[:2000], tokens).write(out / f"few{form.suffix}", form)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Prediction(*head, frame, embedding, tokens).write(out / f"p{form.suffix}", form)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    for form in (Format.H5AD, Format.ZARR):
        words = [sys.executable, "-c", code, str(tiny_engine), str(tmp_path), form.value]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) < 200_000, f"{form}: {int(done.stdout) / 1000:.0f} MB"
