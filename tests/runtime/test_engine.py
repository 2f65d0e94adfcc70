"""Engines through the API: the published numbers, what comes out, and what is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from helpers import relative_l2
from stpath_runtime import Context, Engine, InputError, Slide, files, read_slide
from stpath_runtime.backends.onnxruntime import OnnxRuntimeBackend
from stpath_runtime.encoding import encoder
from stpath_runtime.encoding.attention import Attention, Spots, keys_of
from stpath_runtime.errors import InputWarning
from stpath_runtime.slides.slide import random_slide
from stpath_train.inputs import slide_inputs
from stpath_train.literal import literal_forward

FP32_BAR = 1e-5


@pytest.fixture(scope="module")
def engine(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


@pytest.fixture(scope="module")
def slide(tiny) -> Slide:
    return tiny.slides()[0][1]


@pytest.fixture
def engine_copy(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def test_engine_gives_the_published_outputs(golden, golden_engine):
    engine = Engine.load(golden_engine)
    embedding, expression = (
        np.empty((len(golden.prediction), golden.model.config.d_model)),
        np.empty_like(golden.prediction),
    )
    for spots, slide, context in golden.slides():
        embedding[spots] = engine.embed(slide, context=context)
        expression[spots] = engine.predict(slide, genes=golden.genes, context=context).X
    assert relative_l2(embedding[golden.embedded], golden.arrays["embedding"]) <= FP32_BAR
    assert relative_l2(expression, golden.prediction) <= FP32_BAR
    for found, exact in zip(expression.T, golden.prediction.T, strict=True):
        assert np.corrcoef(found, exact)[0, 1] >= 0.99999


@settings(max_examples=25, deadline=None)
@given(
    spots=st.integers(1, 80),
    context=st.integers(0, 10),
    organ=st.sampled_from([None, "Brain", "Lymph node"]),
    technology=st.sampled_from([None, "Visium HD"]),
    seed=st.integers(0, 2**16),
)
def test_engine_equals_the_literal_formula(tiny, tiny_engine, spots, context, organ, technology, seed):
    rng = np.random.default_rng(seed)
    coords, features = rng.integers(0, 5000, (spots, 2)), rng.standard_normal((spots, 96))
    slide = Slide(coords, features, organ=organ, technology=technology)
    measured = None
    if context:
        ids = rng.choice(spots, min(context, spots), replace=False)
        measured = Context(ids, rng.poisson(3, (len(ids), 4)), ["GENE3", "GENE8", "GENE90", "ALIAS8"])
    engine = Engine.load(tiny_engine)
    inputs = slide_inputs(slide, engine.vocabulary, measured, torch.float64)
    embedding, expression = literal_forward(copy.deepcopy(tiny.model).double(), **inputs)
    adata = engine.predict(slide, context=measured, embeddings=True)
    assert relative_l2(adata.obsm["stpath_embedding"], embedding) <= FP32_BAR
    assert relative_l2(adata.X, expression[:, 2:]) <= FP32_BAR


@pytest.mark.parametrize("tile", [1, 7, 16, 61, 1000])
def test_result_does_not_depend_on_the_tile(engine, tiny, tile):
    _, slide, context = tiny.slides()[0]
    spots = Spots.of([slide], [context.resolve(slide, engine.vocabulary)])
    keys = keys_of([slide], spots, engine.manifest.model, engine.precision, Attention("global"))
    tiled = encoder.encode(engine.backend, engine.manifest.model, "fp32", spots, keys, tile=tile)
    assert relative_l2(tiled, engine.embed(slide, context=context)) <= 1e-6


@pytest.mark.parametrize("attention", ["global", "knn:8"])
@pytest.mark.parametrize("at_once", [1, 3, 16])
@pytest.mark.filterwarnings("ignore::stpath_runtime.InputWarning")  # kNN of a global model
def test_result_does_not_depend_on_how_many_tiles_run_at_once(engine, monkeypatch, attention, at_once):
    slide = random_slide(700, 96, 1)
    expected = engine.embed(slide, attention=attention)
    monkeypatch.setattr(engine.backend, "tiles_at_once", at_once)
    assert relative_l2(engine.embed(slide, attention=attention), expected) <= 1e-6


def test_a_graph_whose_tiles_run_at_once_has_one_thread_and_is_loaded_once(tiny_engine, monkeypatch):
    monkeypatch.setattr("stpath_runtime.backends.onnxruntime.cores", lambda: 4)
    loaded = []
    real = OnnxRuntimeBackend._load
    monkeypatch.setattr(OnnxRuntimeBackend, "_load", lambda self, graph: loaded.append(graph) or real(self, graph))
    engine = Engine.load(tiny_engine)
    engine.predict(random_slide(700, 96, 1), genes=["GENE1"])
    threads = {graph: engine.backend._session(graph).get_session_options().intra_op_num_threads for graph in loaded}
    assert sorted(loaded) == sorted(threads)
    assert threads == {"tokens": 0, "embed": 1, "block_1": 1, "block_2": 1, "block_3": 1, "head": 0}


def test_progress_counts_up_to_the_whole(engine, slide, monkeypatch):
    monkeypatch.setattr(engine.backend, "most_rows", 16)
    seen = []
    engine.embed(slide, on_tile=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len(seen) > 4
    assert seen[-1][0] == seen[-1][1]
    seen.clear()
    monkeypatch.setattr(encoder, "GENES_AT_ONCE", 30)
    engine.decode(np.zeros((100, 64), np.float32), on_tile=lambda done, total: seen.append((done, total)))
    assert len(seen) == 7
    assert seen[-1] == (100 * 200, 100 * 200)


def test_head_decodes_the_genes_asked_for_in_tiles(engine, slide, monkeypatch):
    embedding = engine.embed(slide)
    everything = engine.decode(embedding)
    assert everything.shape == (len(slide), 200)
    monkeypatch.setattr(encoder, "GENES_AT_ONCE", 7)
    monkeypatch.setattr(encoder, "MOST_BYTES", 200)
    names = ["GENE5", "ALIAS3", "ENSG00000000199.2", "GENE0"] + [f"GENE{i}" for i in range(10, 30)]
    panel = engine.decode(embedding, names)
    columns = [5, 3, 199, 0, *range(10, 30)]
    np.testing.assert_allclose(panel, everything[:, columns], rtol=1e-5, atol=1e-5)


def test_prediction_keeps_the_conventions(engine, tiny):
    _, slide, context = tiny.slides()[0]
    adata = engine.predict(slide, genes=["GENE3", "ALIAS7"], context=context, embeddings=True)
    assert adata.X.dtype == np.float32
    assert list(adata.obs_names) == slide.barcodes
    assert list(adata.var_names) == ["GENE3", "ALIAS7"]
    assert list(adata.var["gene_ids"]) == ["ENSG00000000003", "ENSG00000000007"]
    np.testing.assert_array_equal(adata.obsm["spatial"], slide.coords)
    assert adata.obsm["spatial"].dtype == slide.coords.dtype
    assert adata.obsm["stpath_embedding"].shape == (61, 64)
    facts = adata.uns["stpath"]
    assert len(facts["engine"]) == 64
    assert (facts["attention"], facts["precision"], facts["units"]) == ("global", "fp32", "log1p raw counts")
    assert (facts["organ"], facts["technology"]) == ("Brain", "")
    everything = engine.predict(slide)
    assert everything.shape == (61, 200)
    assert everything.var_names[0] == "GENE0"


def test_inputs_are_left_as_they_are(engine, tiny):
    _, slide, context = tiny.slides()[0]
    before = [np.array(a, copy=True) for a in (slide.coords, slide.features, context.counts)]
    adata = engine.predict(slide, genes=["GENE1"], context=context)
    adata.obsm["spatial"][:] = -1
    for a, b in zip((slide.coords, slide.features, context.counts), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("coords", [[[5, 5]], [[0, 7], [10, 7], [20, 7]], [[3, 0], [3, 10]], [[1, 1], [1, 1]]])
def test_one_spot_row_or_column_works(engine, coords):
    slide = Slide(np.array(coords), np.ones((len(coords), 96), np.float32))
    assert np.isfinite(engine.predict(slide).X).all()


@settings(max_examples=15, deadline=None)
@given(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    coords_dtype=st.sampled_from([np.int32, np.int64, np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_types_of_features_and_coordinates_do_not_matter(tiny_engine, dtype, coords_dtype, seed):
    engine = Engine.load(tiny_engine)
    rng = np.random.default_rng(seed)
    features = rng.integers(-4, 5, (9, 96)) / 4  # exact in float16
    coords = rng.integers(0, 1000, (9, 2))
    expected = engine.embed(Slide(coords, features.astype(np.float32)))
    found = engine.embed(Slide(coords.astype(coords_dtype), features.astype(dtype)))
    np.testing.assert_array_equal(found, expected)


def test_sparse_context_equals_dense(engine, tiny):
    _, slide, context = tiny.slides()[0]
    thin = Context(context.ids, sparse.csr_matrix(context.counts), context.genes)
    np.testing.assert_array_equal(engine.embed(slide, context=thin), engine.embed(slide, context=context))


def test_context_without_spots_is_no_context(engine, slide):
    nothing = Context([], np.zeros((0, 1)), ["GENE0"])
    np.testing.assert_array_equal(engine.embed(slide, context=nothing), engine.embed(slide))


def test_a_gene_asked_for_twice_by_whichever_name_is_given_once(engine, slide):
    twice = ["ALIAS3", "GENE2", "ALIAS3", "GENE3"]
    with pytest.warns(InputWarning, match=r"more than once; each is given once \(ALIAS3, GENE3\)"):
        adata = engine.predict(slide, genes=twice)
    assert list(adata.var_names) == ["ALIAS3", "GENE2"]
    with pytest.warns(InputWarning, match="more than once"):
        np.testing.assert_array_equal(engine.decode(engine.embed(slide), twice), adata.X)


def test_memory_may_be_text(engine, slide):
    np.testing.assert_array_equal(engine.embed(slide, memory="1.5G"), engine.embed(slide))
    for wrong in ("much", 0, -1, "0G", True):
        with pytest.raises(InputError, match="is not a size; give a number with K, M, G or T, such as 6G"):
            engine.embed(slide, memory=wrong)


def test_an_engine_is_closed_after_its_block_even_when_that_fails(tiny_engine, slide):
    with suppress(ZeroDivisionError), Engine.load(tiny_engine) as engine:
        assert len(engine.embed(slide)) == len(slide) / 0
    engine.close()  # a second time does nothing
    with pytest.raises(InputError, match="closed"):
        engine.embed(slide)


def test_the_hash_is_that_of_the_engine_that_was_loaded(engine_copy, slide):
    engine = Engine.load(engine_copy)
    before = engine.hash()
    (engine_copy / "engine.json").write_bytes((engine_copy / "engine.json").read_bytes() + b" ")
    assert engine.predict(slide, genes=["GENE1"]).uns["stpath"]["engine"] == engine.hash() == before
    assert Engine.load(engine_copy).hash() != before


def test_warnings_point_at_the_callers_line(engine, slide):
    with pytest.warns(InputWarning) as caught:
        engine.predict(slide, genes=["GENE1", "GENE1"])
    assert [warning.filename for warning in caught] == [__file__]


def test_bad_calls_are_refused(engine, slide):
    with pytest.raises(InputError, match="unknown gene: 'GENE77777' .did you mean GENE"):
        engine.predict(slide, genes=["GENE1", "GENE77777"])
    with pytest.raises(InputError, match="no gene"):
        engine.predict(slide, genes=[])
    with pytest.raises(InputError, match="features are 3 wide; the engine expects 96"):
        engine.predict(Slide(np.ones((2, 2)), np.ones((2, 3), np.float32)))
    with pytest.raises(InputError, match=r"float64 of shape \[2, 3\]; this engine's is float \[N, 64\]"):
        engine.decode(np.ones((2, 3)))


def test_features_of_the_right_width_elsewhere_in_the_file_are_named(engine, tmp_path):
    adata = AnnData(np.ones((4, 500), np.float32), obsm={"spatial": np.eye(4, 2), "mine": np.ones((4, 96), "f4")})
    adata.write_h5ad(tmp_path / "counts.h5ad")
    with pytest.raises(InputError, match="500 wide; the engine expects 96 .*'mine' in the file has that width"):
        engine.predict(read_slide(tmp_path / "counts.h5ad"))
    assert engine.predict(read_slide(tmp_path / "counts.h5ad", features_key="mine"), genes=["GENE1"]).n_obs == 4


def test_features_beyond_the_model_are_refused_and_not_predicted_as_nan(engine):
    huge = Slide(np.arange(6).reshape(3, 2), np.array([[1.0], [3.4e38], [1.0]], np.float32).repeat(96, axis=1))
    with pytest.raises(InputError, match="gives NaN or infinity"):
        engine.predict(huge, genes=["GENE1"])


def test_calls_of_the_wrong_type_are_refused(engine, slide):
    with pytest.raises(InputError, match="must be a list"):
        engine.predict(slide, genes="GENE1")
    with pytest.raises(InputError, match="expected a Slide, not str"):
        engine.predict("slide.h5")


def test_backends_and_devices_that_are_not_there_are_refused(tiny_engine):
    with pytest.raises(InputError, match="unknown backend 'tflite'"):
        Engine.load(tiny_engine, backend="tflite")
    with pytest.raises(InputError, match=r"stpath-engine\[gpu\]"):
        Engine.load(tiny_engine, device="cuda:0")
    with pytest.raises(InputError, match="unknown device 'gpu'"):
        Engine.load(tiny_engine, device="gpu")


def test_no_engine(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        Engine.load(tmp_path / "missing")
    with pytest.raises(InputError, match="without engine.json"):
        Engine.load(tmp_path)


@pytest.mark.parametrize("name", ["weights.bin", "block_1.onnx", "genes.tsv.gz"])
def test_an_altered_truncated_or_missing_file_is_refused(engine_copy, name):
    path = engine_copy / name
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:50] + bytes([whole[50] ^ 1]) + whole[51:]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"{name}: truncated or altered"):
            Engine.load(engine_copy)
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        Engine.load(engine_copy)


def test_a_file_altered_after_its_hash_was_kept_is_refused(engine_copy, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "WORTH_KEEPING", 1)
    Engine.load(engine_copy)
    path = engine_copy / "weights.bin"
    times, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:50] + bytes([whole[50] ^ 1]) + whole[51:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(InputError, match=r"weights.bin: truncated or altered"):
        Engine.load(engine_copy)


@pytest.mark.parametrize(("schema", "told"), [(99, "schema 99 is newer"), (1, "schema 1 is older than .* export the")])
def test_another_schema_is_refused(engine_copy, schema, told):
    path = engine_copy / "engine.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": schema, "sharding": "new"}))
    with pytest.raises(InputError, match=told):
        Engine.load(engine_copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("schema", value) for value in (0, True, "1", None)),
        *(("precision", value) for value in ("int4", None)),
        *(("files", value) for value in ({}, [], {"weights.bin": "x"})),
        *(("checkpoint", value) for value in ({}, "x", {"name": 3})),
        *(("parity", value) for value in (None, {"passed": False})),
        ("versions", None),
        ("created", 5),
        *(("model", change) for change in ({"n_layers": 0}, {"n_layers": 9}, {"n_heads": 7}, {"d_model": -1})),
        *(("model", change) for change in ({"attention": "local"}, {"attention": "knn"}, {"neighbors": 4})),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(engine_copy, field, value):
    path = engine_copy / "engine.json"
    found = json.loads(path.read_text())
    found[field] = {**found["model"], **value} if field == "model" else value
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match="damaged engine manifest"):
        Engine.load(engine_copy)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', '{"schema": "2"}', "null"])
def test_a_damaged_manifest_is_refused(engine_copy, text):
    (engine_copy / "engine.json").write_text(text)
    with pytest.raises(InputError, match="damaged engine manifest"):
        Engine.load(engine_copy)
