"""kNN attention as dense blocks, tiles and memory: the engine against message passing in PyTorch Geometric."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_l2
from stpath_runtime import Context, Engine, InputError, Slide, encoder
from stpath_runtime.cli import main
from stpath_runtime.encoder import Spots
from stpath_runtime.errors import InputWarning
from stpath_runtime.fidelity import measure_fidelity
from stpath_runtime.memory import available_on_host, parse_bytes
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.inputs import slide_inputs

FP32_BAR = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:knn attention")


@pytest.fixture(scope="module")
def engine(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


def random_slide(spots: int, seed: int) -> Slide:
    rng = np.random.default_rng(seed)
    return Slide(rng.integers(0, 3000, (spots, 2)), rng.standard_normal((spots, 96)), organ="Brain")


def message_passing(model, slide, vocabulary, neighbors, context=None):
    inputs = slide_inputs(slide, vocabulary, context, torch.float64, neighbors)
    return copy.deepcopy(model).double().embed(**inputs).numpy()


@settings(max_examples=25, deadline=None)
@given(spots=st.integers(1, 400), k=st.integers(1, 80), context=st.booleans(), seed=st.integers(0, 2**16))
def test_dense_blocks_equal_message_passing(tiny, tiny_engine, spots, k, context, seed):
    slide = random_slide(spots, seed)
    measured = Context([0], np.array([[3, 1]]), ["GENE3", "GENE9"]) if context else None
    engine = Engine.load(tiny_engine)
    found = engine.embed(slide, context=measured, attention="knn", neighbors=k)
    assert relative_l2(found, message_passing(tiny.model, slide, engine.vocabulary, k, measured)) <= FP32_BAR


def test_as_many_neighbours_as_spots_is_global(engine):
    slide = random_slide(150, 0)
    for k in (150, 10_000):
        assert relative_l2(engine.embed(slide, attention="knn", neighbors=k), engine.embed(slide)) <= 1e-6


@pytest.mark.parametrize("k", [4, 32])
@pytest.mark.parametrize("tile", [64, 128, 192, 1024])
def test_knn_does_not_depend_on_the_tile(engine, k, tile):
    slide = random_slide(500, 1)
    spots = Spots.of([slide], [None])
    keys = engine.keys([slide], spots, "knn", k)
    assert keys.rows == 512
    tiled = encoder.encode(engine.backend, engine.manifest.model, "fp32", spots, keys, tile=tile)
    assert relative_l2(tiled, engine.embed(slide, attention="knn", neighbors=k)) <= 1e-6


@pytest.mark.parametrize("how", [{}, {"attention": "knn", "neighbors": 8}])
def test_memory_bounds_the_tile_and_changes_nothing_else(engine, how, monkeypatch):
    slide = random_slide(700, 2)
    keys = engine.keys([slide], Spots.of([slide], [None]), how.get("attention", "global"), how.get("neighbors", 0))
    kept = (keys.rows + 4 * keys.keys) * 64 * 4 + keys.kept_bytes
    sizes = []
    real = encoder.tile_rows
    monkeypatch.setattr(encoder, "tile_rows", lambda *a: sizes.append(real(*a)) or sizes[-1])
    whole = engine.embed(slide, **how)
    tight = engine.embed(slide, **how, memory=kept + 70 * (keys.row_bytes + 4 * (6 * 64 + 2 * 128 + 96)))
    assert sizes == [1024, 64]
    assert relative_l2(tight, whole) <= 1e-6


def test_too_little_memory_says_the_least_that_works(engine):
    slide = random_slide(3000, 3)
    with pytest.raises(
        InputError, match=r"1 MiB of memory do not hold one tile of 3,000 spots; the least that works"
    ) as e:
        engine.embed(slide, memory=2**20)
    least = parse_bytes(str(e.value).split("least that works is ")[1].split(" (")[0].replace(",", ""))
    engine.embed(slide, memory=least)


def test_half_of_what_is_available_is_the_default(engine, monkeypatch):
    monkeypatch.setattr(engine.backend, "available_memory", lambda: 2**21)
    with pytest.raises(InputError, match="1 MiB"):
        engine.embed(random_slide(3000, 3))


def test_an_approximation_is_told_once_and_recorded(tiny_engine):
    engine = Engine.load(tiny_engine)
    slide = random_slide(100, 4)
    with pytest.warns(InputWarning, match="knn attention to 8 spots on a model trained with global"):
        engine.embed(slide, attention="knn", neighbors=8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adata = engine.predict(slide, genes=["GENE1"], attention="knn", neighbors=8)
    facts = adata.uns["stpath"]
    assert (facts["attention"], facts["neighbors"], facts["trained_attention"]) == ("knn", 8, "global")


def test_a_model_trained_with_knn_attends_so_by_default(tiny, tiny_genes, tmp_path):
    from stpath_export.exporter import export_engine
    from stpath_train import load_checkpoint, save_checkpoint

    config = dataclasses.replace(tiny.model.config, n_layers=1, attention="knn", neighbors=6)
    model = seeded_checkpoint(config, 0)
    save_checkpoint(model, tmp_path / "knn.safetensors")
    assert load_checkpoint(tmp_path / "knn.safetensors").config == model.config
    export_engine(tmp_path / "knn.safetensors", tmp_path / "engine", tiny_genes)
    engine = Engine.load(tmp_path / "engine")
    slide = random_slide(200, 5)
    assert relative_l2(engine.embed(slide), message_passing(model, slide, engine.vocabulary, 6)) <= FP32_BAR
    assert engine.predict(slide, genes=["GENE1"]).uns["stpath"]["neighbors"] == 6
    with pytest.warns(InputWarning, match="global attention on a model trained with knn attention to 6 spots"):
        engine.embed(slide, attention="global")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"attention": "knn"}, "needs the number of neighbors"),
        ({"attention": "knn", "neighbors": 0}, "from 1, not 0"),
        ({"attention": "knn", "neighbors": -3}, "from 1"),
        ({"attention": "knn", "neighbors": 2.5}, "not 2.5"),
        ({"attention": "knn", "neighbors": "8"}, "not '8'"),
        ({"neighbors": 8}, "global attention takes no neighbors"),
        ({"attention": "sparse"}, "unknown attention 'sparse'; known: global, knn"),
    ],
)
def test_faulty_ways_to_attend_are_refused(engine, how, message):
    with pytest.raises(InputError, match=message):
        engine.embed(random_slide(10, 0), **how)


def test_command_line(engine, tiny_engine, tmp_path, capsys):
    import anndata
    import h5py

    slide = random_slide(300, 6)
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = slide.features, slide.coords
    words = ["predict", str(path), "--engine", str(tiny_engine), "--out", str(tmp_path / "p.h5ad"), "--genes", "GENE1"]
    words += ["--organ", "Brain"]
    assert main([*words, "--attention", "knn", "--neighbors", "8", "--memory", "200M"]) == 0
    assert capsys.readouterr().err.startswith("warning: knn attention to 8 spots")
    expected = engine.predict(slide, genes=["GENE1"], attention="knn", neighbors=8)
    np.testing.assert_allclose(anndata.read_h5ad(tmp_path / "p.h5ad").X, expected.X, rtol=1e-5, atol=1e-5)

    for faulty in (["--neighbors", "many"], ["--attention", "knn", "--neighbors", "0"], ["--memory", "lots"]):
        assert main([*words, *faulty]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main([*words, "--memory", "10K"]) == 2
    assert "the least that works is" in capsys.readouterr().err

    picture = tmp_path / "f.png"
    words = ["fidelity", str(tiny_engine), "--slide", str(path), "--neighbors", "4,16,300", "--out", str(picture)]
    assert main(words) == 0
    assert "kNN against global attention: 300 spots, 200 genes" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*words[:-1], str(tmp_path / "f.pdf")]) == 2
    assert main([*words, "--neighbors", "4,x"]) == 2


def test_fidelity_by_hand(engine):
    slide = random_slide(200, 7)
    report = measure_fidelity(engine, slide, [5, 200])
    few, everyone = report.rows
    exact, found = engine.embed(slide), engine.embed(slide, attention="knn", neighbors=5)
    assert few.relative_l2 == pytest.approx(relative_l2(found, exact), rel=1e-3)
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(engine.decode(found).T, engine.decode(exact).T, strict=True)]
    np.testing.assert_allclose(few.pearson, np.quantile(r, [0.05, 0.25, 0.5, 0.75, 0.95]), atol=1e-5)
    assert everyone.relative_l2 < 1e-6
    np.testing.assert_allclose(everyone.pearson, 1, atol=1e-6)


@pytest.mark.parametrize(("text", "size"), [("6G", 6 << 30), ("1.5 GiB", 3 << 29), ("500m", 500 << 20), ("77", 77)])
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1G", "0", "6X", "6G6"])
def test_sizes_that_are_none(text):
    with pytest.raises(InputError, match="no size"):
        parse_bytes(text)


def test_memory_of_the_host_is_bounded_by_its_cgroup(monkeypatch):
    files = {"/proc/meminfo": "MemAvailable:    8000 kB\n", "/sys/fs/cgroup/memory.max": "5000000\n"}
    files["/sys/fs/cgroup/memory.current"] = "1000000\n"
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in files)
    monkeypatch.setattr(Path, "read_text", lambda path: files[str(path)])
    assert available_on_host() == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_on_host() == 8000 * 1024


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 150), min_size=2, max_size=5),
    k=st.sampled_from([None, 5, 200]),
    context=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_slides_run_together_as_each_alone(tiny_engine, sizes, k, context, seed):
    engine = Engine.load(tiny_engine)
    how = {} if k is None else {"attention": "knn", "neighbors": k}
    slides = [random_slide(spots, seed + i) for i, spots in enumerate(sizes)]
    measured = Context([0], np.array([[3, 1]]), ["GENE3", "GENE9"])
    contexts = [measured if context and i % 2 else None for i in range(len(slides))]
    together = engine.encode(slides, contexts, **how)
    for slide, own, found in zip(slides, contexts, together, strict=True):
        assert relative_l2(found.embedding, engine.embed(slide, context=own, **how)) <= 1e-6
        assert list(found.frame.obs_names) == slide.obs_names
