"""STFlow engines: what they predict, what they count, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest
from anndata import read_h5ad

from helpers import FLOW_CASES, load_flow_golden, relative_l2, require_bf16, write_slide
from stpath_runtime import Engine, InputError, Slide
from stpath_runtime.cli.app import main
from stpath_runtime.flow_engine import FlowEngine

OF_ENGINE = [case for case in FLOW_CASES if case != "relu"]  # the cases that have the engine's weights


@pytest.fixture(scope="module", params=["onnxruntime", "openvino"])
def engine(request, flow_engine):
    with Engine.load(flow_engine, backend=request.param) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def slide() -> Slide:
    rng = np.random.default_rng(0)
    return Slide(rng.random((300, 2)) * 4_000, rng.standard_normal((300, 24), np.float32), name="slide")


@pytest.mark.parametrize("case", OF_ENGINE)
def test_published_outputs(case, engine):
    golden = load_flow_golden(case)
    a = golden.arrays
    assert isinstance(engine, FlowEngine)
    found = engine.predict(golden.slide, steps=golden.steps, start=a["x0"], neighbor_index=a["neighbors"])
    assert relative_l2(found.X, a["output"]) <= 1e-5
    facts = found.uns["stpath"]
    assert facts["degenerate_frames"] == (a["gap"] < 1e-6).sum()
    assert (facts["start"], facts["neighbors_given"], facts["steps"]) == ("given", True, golden.steps)


def test_bfloat16_keeps_near_the_published_outputs(flow_engine):
    require_bf16()
    golden = load_flow_golden("random_small")
    with Engine.load(flow_engine, backend="openvino", precision="bf16") as loaded:
        given = {"start": golden.arrays["x0"], "neighbor_index": golden.arrays["neighbors"]}
        assert 1e-5 < relative_l2(loaded.predict(golden.slide, **given).X, golden.arrays["output"]) < 3e-2


def test_a_seed_repeats_and_the_first_of_many_samples_is_the_only_one_of_another_call(engine, slide):
    one, again, other = (engine.predict(slide, seed=seed) for seed in (5, 5, 6))
    assert (one.X == again.X).all()
    assert (one.X != other.X).any()
    assert "std" not in one.layers
    each = [engine.predict(slide, start=start).X for start in _starts(engine, slide, seed=5, samples=11)]
    assert relative_l2(each[0], one.X) <= 1e-6
    many = engine.predict(slide, seed=5, samples=11)  # more than run at once
    assert relative_l2(many.X, np.mean(each, axis=0)) <= 1e-5
    assert relative_l2(many.layers["std"], np.std(each, axis=0, ddof=1)) <= 1e-3
    assert {name: many.uns["stpath"][name] for name in ("samples", "seed", "model", "variant")} == {
        "samples": 11,
        "seed": 5,
        "model": "stflow",
        "variant": "published",
    }


def _starts(engine, slide, seed, samples):
    from stpath_runtime.stflow.starts import draw_start

    return [draw_start(engine.manifest.model, len(slide), seed, number) for number in range(samples)]


def test_starts_of_several_samples_are_taken(engine, slide):
    starts = np.stack(_starts(engine, slide, seed=5, samples=2))
    assert (
        relative_l2(engine.predict(slide, samples=2, start=starts).X, engine.predict(slide, samples=2, seed=5).X) < 1e-6
    )


def test_memory_changes_nothing(engine, slide):
    whole = engine.predict(slide, samples=3)
    least = int(_least(engine, slide))
    small = engine.predict(slide, samples=3, memory=least)
    assert relative_l2(small.X, whole.X) <= 1e-6
    with pytest.raises(InputError, match=": 9 KiB of memory cannot hold one tile of .* the least that works"):
        engine.predict(slide, memory=10_000)


def _least(engine, slide) -> int:
    with pytest.raises(InputError) as error:
        engine.predict(slide, memory=1)
    return int(str(error.value).split("works is ")[1].split(" MiB")[0].replace(",", "")) << 20


def test_genes_are_picked_by_name_in_the_order_asked(engine, slide):
    both = engine.predict(slide, samples=2)
    picked = engine.predict(slide, samples=2, genes=["GENE7", "GENE3"])
    assert picked.var_names.tolist() == ["GENE7", "GENE3"]
    assert (picked.X == both[:, ["GENE7", "GENE3"]].X).all()
    assert (picked.layers["std"] == both[:, ["GENE7", "GENE3"]].layers["std"]).all()
    with pytest.raises(InputError, match="GENE77.*did you mean"):
        engine.predict(slide, genes=["GENE77"])


def test_sections_are_slides_of_their_own(engine, slide):
    halves = ["a" if i < 150 else "b" for i in range(300)]
    parted = Slide(slide.coords, slide.features, name="parted", sections=halves)
    start = _starts(engine, slide, seed=0, samples=1)[0]
    first = engine.predict(Slide(slide.coords[:150], slide.features[:150]), start=start[:150])
    assert relative_l2(engine.predict(parted).X[:150], first.X) <= 1e-6


def test_a_slide_of_few_spots_takes_all_of_them(engine):
    rng = np.random.default_rng(1)
    for spots in (1, 2, 8):
        found = engine.predict(Slide(rng.random((spots, 2)), rng.standard_normal((spots, 24), np.float32)))
        assert np.isfinite(found.X).all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 1}, "steps must be a whole number from 2, not 1"),
        ({"steps": 2.5}, "steps must be"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"start": np.zeros((300, 49))}, "start: float64 of shape"),
        ({"start": np.full((300, 50), np.nan)}, "start: NaN or infinity at spot 0"),
        ({"start": np.zeros((300, 50)), "samples": 2}, "start: float64 of shape"),
        ({"neighbor_index": np.full((300, 8), 300)}, "has the neighbours"),
        ({"neighbor_index": np.zeros((300, 7), int)}, "neighbor_index"),
    ],
)
def test_what_cannot_be_is_refused(options, said, engine, slide):
    with pytest.raises(InputError, match=said):
        engine.predict(slide, **options)


def test_what_is_of_the_other_model_is_refused_by_name(engine, slide, tiny_engine, tiny):
    of_stpath = [
        ("attention", "knn:8"),
        ("neighbors", 3),
        ("neighbors", 0),
        ("embeddings", True),
        ("fill_context", True),
    ]
    for name, value in of_stpath:
        with pytest.raises(InputError, match=f"{name.replace('_', '-')}: of STPath engines"):
            engine.options(**{name: value})
    with pytest.raises(InputError, match="context: of STPath"):
        engine.predict_many([slide], [tiny.slides()[0][2]])
    with pytest.raises(InputError, match="no embeddings"):
        engine.embed(slide)
    with pytest.raises(InputError, match="steps and samples: of STFlow engines"):
        Engine.load(tiny_engine).options(steps=5, samples=2)


def test_a_damaged_manifest_is_refused(flow_engine, tmp_path):
    content = json.loads((flow_engine / "engine.json").read_text())
    for changed, said in (
        ({"variant": "fork"}, "family and variant"),
        ({"model": {**content["model"], "steps": 1}}, "steps is 1"),
        ({"model": {**content["model"], "n_heads": 3}}, "not a multiple"),
        ({"schema": 4}, "schema 4 is newer"),
        ({"precision": "fp8"}, "precision"),
    ):
        (tmp_path / "engine.json").write_text(json.dumps(content | changed))
        with pytest.raises(InputError, match=said):
            Engine.load(tmp_path)


def test_the_command_line_gives_what_the_engine_does(flow_engine, slide, tmp_path, capsys):
    path = write_slide(slide, tmp_path / "slide.h5")
    words = ["predict", path, "--engine", flow_engine, "--out", tmp_path / "out.h5ad"]
    main([str(word) for word in (*words, "--steps", 3, "--seed", 7, "--samples", 2)])
    found = read_h5ad(tmp_path / "out.h5ad")
    wanted = Engine.load(flow_engine).predict(slide, steps=3, seed=7, samples=2)
    assert relative_l2(found.X, wanted.X) <= 1e-6
    assert relative_l2(found.layers["std"], wanted.layers["std"]) <= 1e-4
    assert {name: found.uns["stpath"][name] for name in ("steps", "seed", "samples", "tied_neighbors")} == {
        "steps": 3,
        "seed": 7,
        "samples": 2,
        "tied_neighbors": 0,
    }
    for options, said in {
        ("--attention", "global"): "attention: of STPath engines",
        ("--embeddings",): "embeddings: of STPath engines",
        ("--steps", "1"): "steps must be",
        ("--context", str(path)): "context: of STPath engines",
    }.items():
        assert main([str(word) for word in (*words[:-1], tmp_path / "no.h5ad", *options)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "no.h5ad").exists()


def test_a_cohort_is_sampled_and_known_again_by_its_settings(flow_engine, slide, tmp_path, capsys):
    (tmp_path / "slides").mkdir()
    write_slide(slide, tmp_path / "slides" / "a.h5")
    words = ["run", tmp_path / "slides", "--engine", flow_engine, "--out", tmp_path / "out", "--samples", 2, "--seed"]
    for seed, said in ((1, "1 done"), (1, "1 skipped"), (2, "1 done")):
        main([str(word) for word in (*words, seed)])
        assert said in capsys.readouterr().out
    found = read_h5ad(tmp_path / "out" / "a.h5ad")
    assert relative_l2(found.X, Engine.load(flow_engine).predict(slide, samples=2, seed=2).X) <= 1e-6


def test_commands_of_the_other_model_say_so(flow_engine, slide, tmp_path, capsys):
    path = write_slide(slide, tmp_path / "slide.h5")
    main(["predict", str(path), "--engine", str(flow_engine), "--out", str(tmp_path / "p.h5ad")])
    for words in (
        ["decode", tmp_path / "p.h5ad", "--engine", flow_engine, "--genes", "GENE1"],
        ["fidelity", flow_engine, "--slide", path, "--out", tmp_path / "f.png"],
        ["bench", flow_engine],
        ["verify", flow_engine, "--checkpoint", flow_engine.parent / "flow.pth", "--report", tmp_path / "report"],
    ):
        assert main([str(word) for word in words]) == 2
        assert "STFlow engine" in capsys.readouterr().err
    main(["info", str(flow_engine)])
    assert "STFlow as published" in capsys.readouterr().out
