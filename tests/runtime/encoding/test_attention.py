"""kNN attention as dense blocks, tiles and memory: the engine against message passing in PyTorch Geometric."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_l2
from stpath_runtime import Context, Engine, InputError, Slide, machine
from stpath_runtime.cli.app import main
from stpath_runtime.encoding import encoder
from stpath_runtime.encoding.attention import Attention, Spots, keys_of
from stpath_runtime.errors import InputWarning
from stpath_runtime.machine import available_in_cgroups, available_on_host, parse_bytes
from stpath_runtime.measures.fidelity import measure_fidelity
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
    keys = keys_of([slide], spots, engine.manifest.model, "fp32", Attention("knn", k))
    assert keys.rows == 512
    tiled = encoder.encode(engine.backend, engine.manifest.model, "fp32", spots, keys, tile=tile)
    assert relative_l2(tiled, engine.embed(slide, attention="knn", neighbors=k)) <= 1e-6


@pytest.mark.parametrize("how", [{}, {"attention": "knn", "neighbors": 8}])
def test_memory_bounds_the_tile_and_changes_nothing_else(engine, how, monkeypatch):
    slide = random_slide(700, 2)
    attention = Attention(how.get("attention", "global"), how.get("neighbors", 0))
    keys = keys_of([slide], Spots.of([slide], [None]), engine.manifest.model, engine.precision, attention)
    kept = (keys.rows + 2 + 4 * keys.keys) * 64 * 4 + keys.kept_bytes + keys.planning_bytes
    monkeypatch.setattr(engine.backend, "tiles_at_once", 2)
    sizes = []
    real = encoder.tile_rows
    monkeypatch.setattr(encoder, "tile_rows", lambda *a: sizes.append(real(*a)) or sizes[-1])
    whole = engine.embed(slide, **how)
    row_bytes = keys.row_bytes + 4 * (6 * 64 + 2 * 128 + 96)
    tight = engine.embed(slide, **how, memory=kept + keys.unit * row_bytes)
    two = engine.embed(slide, **how, memory=kept + 140 * row_bytes)
    assert sizes == [(512, 2), (keys.unit, 1), (64, 2)]
    assert relative_l2(two, whole) <= 1e-6
    assert relative_l2(tight, whole) <= 1e-6


def test_too_little_memory_says_the_least_that_works(engine):
    slide = random_slide(3000, 3)
    with pytest.raises(
        InputError, match=r"1 MiB of memory cannot hold one tile of 3,000 spots; the least that works"
    ) as e:
        engine.embed(slide, memory=2**20)
    least = parse_bytes(str(e.value).split("least that works is ")[1].split(" (")[0].replace(",", ""))
    engine.embed(slide, memory=least)


def test_half_of_what_is_available_is_the_default(engine, monkeypatch):
    monkeypatch.setattr(engine.backend, "available_memory", lambda: 2**21)
    with pytest.raises(InputError, match="1 MiB"):
        engine.embed(random_slide(3000, 3))


def test_an_approximation_is_warned_of_once_and_recorded(tiny_engine):
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


@pytest.mark.parametrize("same", [{"attention": "knn:8"}, {"attention": Attention("knn", 8)}])
def test_every_way_to_say_knn_gives_the_same(engine, same):
    slide = random_slide(100, 4)
    engine._warned_of_approximation = True
    np.testing.assert_array_equal(engine.embed(slide, **same), engine.embed(slide, attention="knn", neighbors=8))
    assert engine.predict(slide, genes=["GENE1"], **same).uns["stpath"]["neighbors"] == 8


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
        ({"attention": "knn:"}, "unknown attention 'knn:'"),
        ({"attention": "knn:8.5"}, "unknown attention 'knn:8.5'"),
        ({"attention": "knn:0"}, "from 1, not 0"),
        ({"attention": "knn:8", "neighbors": 8}, "leave out neighbors"),
        ({"attention": "global:8"}, "global attention takes no neighbors"),
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
    with pytest.raises(InputError, match="is not a size"):
        parse_bytes(text)


def cgroup(folder: Path, limit: object, used: int, inactive: int, version: int = 2) -> None:
    """A memory cgroup as Linux shows it."""
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\nfile 7\n")


@pytest.mark.parametrize(("version", "line"), [(2, "0::{}"), (1, "4:cpu,memory:{}")])
def test_memory_of_the_cgroups_around_a_process(version, line, tmp_path):
    mount = tmp_path if version == 2 else tmp_path / "memory"
    cgroup(mount, "max", 50, 0, version)
    cgroup(mount / "outer", 9_000, 6_000, 500, version)
    cgroup(mount / "outer" / "inner", 20_000, 1_000, 0, version)
    (tmp_path / "self").write_text(f"7:cpuset:/other\n{line.format('/outer/inner')}\n")
    assert sorted(available_in_cgroups(tmp_path, tmp_path / "self")) == [3_500, 19_000]
    (tmp_path / "self").write_text(line.format("/kubepods/not/mounted/here"))
    assert available_in_cgroups(tmp_path, tmp_path / "self") == []
    cgroup(mount, 4_000, 3_000, 600, version)  # a container sees its own cgroup as the root
    assert available_in_cgroups(tmp_path, tmp_path / "self") == [1_600]
    assert available_in_cgroups(tmp_path, tmp_path / "none") == []


def test_what_is_available_is_the_least_of_system_and_cgroups(monkeypatch):
    alone = available_on_host()
    monkeypatch.setattr(machine, "available_in_cgroups", lambda: [10**15, 4_000])
    assert available_on_host() == 4_000 < alone
    monkeypatch.setattr(machine, "available_in_cgroups", lambda: [-5])
    assert available_on_host() == 0


@settings(max_examples=20, deadline=None)
@given(spots=st.integers(1, 400), k=st.sampled_from([None, 1, 30, 500]), share=st.floats(0, 1))
def test_the_least_memory_that_is_named_works_and_less_does_not(tiny_engine, spots, k, share):
    engine = Engine.load(tiny_engine)
    engine._warned_of_approximation = True
    how = {} if k is None else {"attention": "knn", "neighbors": k}
    slide = random_slide(spots, 3)
    with pytest.raises(InputError, match=r"the least that works is \d+ MiB") as refused:
        engine.embed(slide, **how, memory=1 + int(share * 2**14))
    least = int(re.search(r"works is (\d+) MiB", str(refused.value))[1]) << 20
    engine.embed(slide, **how, memory=least)
    with pytest.raises(InputError, match="the least that works is"):
        engine.embed(slide, **how, memory=least - 2**20 or 1)


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
    together = engine.predict_many(slides, contexts, **how)
    for slide, own, found in zip(slides, contexts, together, strict=True):
        assert relative_l2(found.embedding, engine.embed(slide, context=own, **how)) <= 1e-6
        assert list(found.frame.obs_names) == slide.obs_names
