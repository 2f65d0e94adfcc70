"""What every backend that runs on a CPU must give: the published numbers, whatever the tile, slide or thread."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers import load_golden, relative_l2, require_bf16
from stpath_export.proof import random_slide
from stpath_runtime import Engine, InputError, Slide
from stpath_runtime.backends import choice, open_backend
from stpath_runtime.backends import onnxruntime as onnxruntime_backend
from stpath_runtime.encoding import encoder
from stpath_runtime.encoding.attention import Attention, Spots, keys_of

# Of published outputs in float32 and, for bfloat16, a bound that only catches blunders: the proof measures the error.
BARS = {"fp32": 1e-5, "bf16": 2e-2}
WAYS = [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]


@pytest.fixture(scope="module")
def copied(made_once, tiny_engine):
    """An engine of these tests alone: OpenVINO keeps compiled graphs in it."""
    return made_once("tiny_engine_openvino", lambda folder: shutil.copytree(tiny_engine, folder / "engine")) / "engine"


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch, tmp_path):
    """What one test keeps as measured is not found by the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(params=WAYS, ids=" ".join)
def way(request):
    if request.param[1] == "bf16":
        require_bf16()
    return request.param


@pytest.fixture
def engine(copied, way):
    return Engine.load(copied, backend=way[0], precision=way[1])


@pytest.fixture(scope="module")
def exact(copied):
    return Engine.load(copied)


def test_published_outputs(way, made_once, golden, golden_engine):
    name, precision = way
    fill = lambda folder: shutil.copytree(golden_engine, folder / "engine")  # noqa: E731
    path = made_once(f"{golden.name}_openvino", fill) / "engine"
    loaded = Engine.load(path, backend=name, precision=precision)
    embedding, expression = (
        np.empty((len(golden.prediction), golden.model.config.d_model)),
        np.empty_like(golden.prediction),
    )
    for spots, slide, context in golden.slides():
        adata = loaded.predict(slide, genes=golden.genes, context=context, embeddings=True)
        assert adata.X.dtype == np.float32
        assert adata.uns["stpath"]["precision"] == precision
        assert adata.uns["stpath"]["backend"] == name
        embedding[spots], expression[spots] = adata.obsm["stpath_embedding"], adata.X
    assert relative_l2(embedding[golden.embedded], golden.arrays["embedding"]) <= BARS[precision]
    assert relative_l2(expression, golden.prediction) <= BARS[precision]


@pytest.mark.parametrize("how", [{}, {"attention": "knn", "neighbors": 8}], ids=["global", "knn"])
@pytest.mark.filterwarnings("ignore::stpath_runtime.errors.InputWarning")
def test_attention_is_that_of_onnxruntime(engine, exact, way, how):
    slide = random_slide(700, 96, 1)
    assert relative_l2(engine.embed(slide, **how), exact.embed(slide, **how)) <= BARS[way[1]]


def test_an_engine_as_the_hub_keeps_it_runs(way, tiny_engine, exact, tmp_path):
    """Every file is a link into a folder of blobs, by way of another link."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(path for path in tiny_engine.iterdir() if path.is_file()):
        shutil.copyfile(file, blobs / f"{number}.real")
        (blobs / str(number)).symlink_to(f"{number}.real")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    slide = random_slide(90, 96, 3)
    with Engine.load(snapshot, backend=way[0], precision=way[1]) as engine:
        assert relative_l2(engine.predict(slide).X, exact.predict(slide).X) <= BARS[way[1]]


def test_a_closed_engine_is_refused(engine):
    slide = random_slide(9, 96, 3)
    engine.embed(slide)
    for _ in range(2):
        engine.close()
        with pytest.raises(InputError, match="the engine was closed; load it again"):
            engine.embed(slide)


@pytest.mark.parametrize("tile", [1, 7, 61])
def test_result_does_not_depend_on_the_tile(engine, way, tile):
    (_, slide, context), *_ = load_golden("tiny_context").slides()
    spots = Spots.of([slide], [context.resolve(slide, engine.vocabulary)])
    keys = keys_of([slide], spots, engine.manifest.model, engine.precision, Attention("global"))
    tiled = encoder.encode(engine.backend, engine.manifest.model, way[1], spots, keys, tile=tile)
    # bfloat16 rounds what float32 sums in another order: a last bit now and then.
    assert relative_l2(tiled, engine.embed(slide, context=context)) <= (1e-6 if way[1] == "fp32" else 4e-3)


def test_slides_of_a_batch_do_not_see_each_other(engine, way):
    slides = [random_slide(n, 96, n, "Brain") for n in (1, 37, 64, 130)]
    together = engine.predict_many(slides, embeddings=True, genes=["GENE1"])
    for slide, found in zip(slides, together, strict=True):
        alone = engine.embed(slide)
        assert relative_l2(found.embedding, alone) <= (1e-6 if way[1] == "fp32" else 4e-3)


def test_calls_from_several_threads_give_what_each_gives_alone(copied, way):
    """As a cohort does: one thread encodes, one decodes; here several do both, on graphs that are not loaded yet."""
    slides = [random_slide(200 + 50 * i, 96, i) for i in range(6)]
    loaded = Engine.load(copied, backend=way[0], precision=way[1])

    def predict(slide):
        embedding = loaded.embed(slide)
        return embedding, loaded.decode(embedding)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predict, slides * 2))
    for slide, (embedding, expression) in zip(slides * 2, found, strict=True):
        np.testing.assert_array_equal(embedding, predict(slide)[0])
        np.testing.assert_array_equal(expression, predict(slide)[1])


def test_results_are_not_overwritten_by_later_calls(engine):
    first, second = random_slide(50, 96, 1), random_slide(50, 96, 2)
    found = engine.embed(first)
    before = found.copy()
    engine.embed(second)
    np.testing.assert_array_equal(found, before)


def test_features_of_any_type(engine):
    rng = np.random.default_rng(0)
    features, coords = rng.integers(-4, 5, (9, 96)) / 4, rng.integers(0, 1000, (9, 2))
    expected = engine.embed(Slide(coords, features.astype(np.float32)))
    for dtype in (np.float16, np.float64):
        np.testing.assert_array_equal(engine.embed(Slide(coords, features.astype(dtype))), expected)


def test_a_precision_that_a_backend_lacks_is_refused(copied):
    for backend in ("onnxruntime", "tensorrt", "tensorrt_rtx"):
        with pytest.raises(InputError, match="precision bf16: .* computes in the engine's own, fp32; .*openvino"):
            Engine.load(copied, backend=backend, precision="bf16")
    with pytest.raises(InputError, match="precision fp16: .* export an engine with --precision fp16"):
        Engine.load(copied, precision="fp16")
    with pytest.raises(InputError, match="unknown precision 'int8'; known: fp32, fp16, bf16"):
        Engine.load(copied, precision="int8")
    with pytest.raises(InputError, match="unknown backend 'tflite'"):
        Engine.load(copied, backend="tflite", precision="bf16")


def test_both_packages_of_onnxruntime_are_refused(copied, monkeypatch):
    monkeypatch.setattr(onnxruntime_backend, "installed", lambda package: "1.31.1")
    with pytest.raises(
        InputError, match=r"both onnxruntime and onnxruntime-gpu .*pip uninstall -y.*stpath-engine\[cpu\]"
    ):
        Engine.load(copied)


def test_auto_is_the_same_on_every_call_and_says_why(copied):
    assert choice.choose_backend(copied, "cpu", None) == choice.choose_backend(copied, "cpu", None)
    name, why = choice.choose_backend(copied, "cpu", None)
    assert (name, why) == ("onnxruntime", "backend auto: onnxruntime, fp32 on cpu (the engine was proven so)")
    require_bf16()
    name, why = choice.choose_backend(copied, "cpu", "bf16")
    assert name == "openvino"
    assert "stpath verify proves it; not onnxruntime: precision bf16" in why
    with pytest.raises(InputError, match="backend auto: none runs fp32 on cuda:0; tensorrt: .*onnxruntime: "):
        choice.choose_backend(copied, "cuda:0", None)


@pytest.mark.parametrize(
    ("seconds", "taken"),
    [
        ({"onnxruntime": 2.0, "openvino": 1.5}, "openvino"),
        ({"onnxruntime": 2.0, "openvino": 1.95}, "onnxruntime"),  # not worth it
        ({"onnxruntime": 2.0, "openvino": 3.0}, "onnxruntime"),
        ({"openvino": 1.0, "onnxruntime": -1.0}, "onnxruntime"),  # not what was written
        ({"openvino": 1.0}, "onnxruntime"),  # compared with nothing
    ],
)
def test_auto_takes_what_bench_measured_to_be_faster_here(copied, seconds, taken):
    choice.keep_seconds(copied, "cpu", "fp32", seconds)
    name, why = choice.choose_backend(copied, "cpu", None)
    assert name == taken
    assert ("stpath verify proves it; stpath bench measured 0.75 times the seconds of onnxruntime here" in why) == (
        taken == "openvino"
    )


@pytest.mark.parametrize("changed", ["engine", "cpu", "library", "precision"])
def test_what_bench_measured_of_another_engine_machine_or_library_tells_nothing(copied, monkeypatch, changed):
    choice.keep_seconds(
        copied, "cpu", "fp16" if changed == "precision" else "fp32", {"onnxruntime": 2.0, "openvino": 1.0}
    )
    if changed == "engine":
        (copied / "engine.json").write_text((copied / "engine.json").read_text() + "\n")
    if changed == "cpu":
        monkeypatch.setattr(choice, "cpu_name", lambda: "another")
    if changed == "library":
        monkeypatch.setattr(choice, "installed", lambda package: "99")
    assert choice.choose_backend(copied, "cpu", None)[0] == "onnxruntime"


def test_auto_takes_openvino_where_onnxruntime_is_not_installed(copied, monkeypatch):
    def absent(name, *rest):
        if name == "onnxruntime":
            raise InputError("ONNX Runtime is not installed; run: pip install it")
        return open_backend(name, *rest)

    monkeypatch.setattr(choice, "open_backend", absent)
    name, why = choice.choose_backend(copied, "cpu", None)
    assert name == "openvino"
    assert why.endswith("(stpath verify proves it; not onnxruntime: ONNX Runtime is not installed)")
