"""TensorRT-RTX builds a plan of every stage, which needs no GPU."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tensorrt_rtx as trt
from rtx_plans import RTX, SM_89, a_context, a_slide

from helpers import load_golden
from stpath_runtime.backends import plan_builder
from stpath_runtime.backends.onnxruntime import OnnxRuntimeBackend
from stpath_runtime.backends.plan_builder import Build, build_plan, new_monitor, parse
from stpath_runtime.backends.plans import SIDECAR, Plans, input_ranges, quiet_logger, stage_graphs
from stpath_runtime.encoding.sizes import DECODED_ROWS
from stpath_runtime.engine import Engine
from stpath_runtime.errors import InputError
from stpath_runtime.files import sha256
from stpath_runtime.manifest import MANIFEST, Manifest

STAGES = ["tokens", "embed", "block_1", "block_2", "block_3", "knn_block_1", "knn_block_2", "knn_block_3", "head"]


@pytest.fixture(scope="session", params=["tiny_engine", "tiny_fp16_engine", "tiny_bf16_engine"])
def either_engine(request) -> Path:
    return request.getfixturevalue(request.param)


def test_every_stage_is_built(either_engine, tmp_path):
    engine = Path(shutil.copytree(either_engine, tmp_path / "engine"))
    shutil.rmtree(engine / "plans", ignore_errors=True)
    told = []
    build = Build.of(engine, "tensorrt_rtx", "cuda:0", "sm_89", 2_000)
    build.run(lambda done, total: told.append((done, total)))

    folder = engine / "plans" / SM_89
    manifest, plans = Manifest.read(engine), Plans.read(folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{stage}.plan" for stage in STAGES), SIDECAR])
    assert list(plans.plans) == STAGES == stage_graphs(manifest.model)
    facts = (plans.library, plans.version, plans.target, plans.gpu, plans.max_spots)
    assert facts == ("tensorrt_rtx", trt.__version__, "sm_89", "", 2_000)
    assert plans.weights == manifest.files["weights.bin"]
    for stage in STAGES:
        assert plans.plans[stage].sha256 == sha256(folder / f"{stage}.plan")
        assert plans.plans[stage].onnx == manifest.files[f"{stage}.onnx"]
        assert plans.plans[stage].seconds > 0
        assert plans.ranges(stage) == input_ranges(stage, manifest.model, 2_000)
    done = [done for done, _ in told]
    assert done == sorted(done)
    assert told[-1] == (900, 900)
    assert len(set(done)) > 3 * len(STAGES)  # within the stages, too
    assert list((engine / "plans").iterdir()) == [folder]
    manifest.check_files(engine)  # plans are no files of the engine: its manifest holds


def test_networks_have_the_types_of_the_engine(either_engine):
    precision = Manifest.read(either_engine).precision
    own = {"fp32": trt.float32, "fp16": trt.float16, "bf16": trt.float32}[precision]
    others = dict.fromkeys(("organ", "technology", "token_ids", "gene_row", "key_index"), trt.int64)
    others |= dict.fromkeys(("coords", "key_coords", "key_bias", "expression"), trt.float32) | {"mask": trt.bool}
    if precision == "bf16":
        others |= dict.fromkeys(("k", "v", "k_next", "v_next"), trt.bfloat16)
    log = quiet_logger(trt)
    for stage in STAGES:
        builder = trt.Builder(log)
        network = parse(trt, builder, either_engine / f"{stage}.onnx", log)
        assert network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        ends = [*inputs, *(network.get_output(i) for i in range(network.num_outputs))]
        assert {end.name: end.dtype for end in ends} == {end.name: others.get(end.name, own) for end in ends}
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        attention = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        assert len(attention) == ("block" in stage)
        for layer in attention:
            layer.__class__ = trt.IAttentionInputLayer
            assert layer.attention.decomposable


def test_float32_attention_is_built_in_parts_only(tiny_engine, monkeypatch):
    graph = tiny_engine / "block_1.onnx"
    ranges = input_ranges("block_1", Manifest.read(tiny_engine).model, 2_000)

    def whole(*words):
        network = parse(*words)
        for i in range(network.num_layers):
            layer = network.get_layer(i)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = False
        return network

    monkeypatch.setattr(plan_builder, "parse", whole)
    cache = plan_builder.TimingCache("tensorrt_rtx", graph)
    with pytest.raises(InputError, match=r"block_1.onnx: TensorRT-RTX .* cannot build it: .*decompos"):
        build_plan(trt, graph, ranges, "sm_89", cache, lambda share: None)


def test_float32_is_not_shortened_to_tensorfloat(tiny_engine, monkeypatch):
    cleared = []
    monkeypatch.setattr(trt.IBuilderConfig, "clear_flag", lambda config, flag: cleared.append(flag))
    ranges = input_ranges("head", Manifest.read(tiny_engine).model, 2_000)
    cache = plan_builder.TimingCache("tensorrt_rtx", tiny_engine)
    build_plan(trt, tiny_engine / "head.onnx", ranges, "sm_89", cache, lambda share: None)
    assert cleared == [trt.BuilderFlag.TF32]


def test_inputs_have_the_names_of_the_graphs(tiny_engine):
    model = Manifest.read(tiny_engine).model
    for stage in STAGES:
        graph = onnx.load(tiny_engine / f"{stage}.onnx", load_external_data=False).graph
        assert list(input_ranges(stage, model, 2_000)) == [end.name for end in graph.input]


@pytest.mark.parametrize(
    ("spots", "attention"), [(1, "global"), (63, "knn"), (65, "knn"), (2_000, "global"), (2_500, "knn")]
)
def test_ranges_cover_what_the_encoder_asks_for(tiny, tiny_engine, monkeypatch, spots, attention):
    model, asked = Manifest.read(tiny_engine).model, set()
    run = OnnxRuntimeBackend.run

    def in_range(backend, graph, inputs):
        asked.add(graph.rstrip("_123"))
        ranges = input_ranges(graph, model, 2_000)
        for name, array in inputs.items():
            least, _, largest = ranges[name]
            assert all(a <= b <= c for a, b, c in zip(least, array.shape, largest, strict=True)), (graph, name)
        return run(backend, graph, inputs)

    monkeypatch.setattr(OnnxRuntimeBackend, "run", in_range)
    engine, slide = Engine.load(tiny_engine), a_slide(tiny, spots)
    neighbors = {"neighbors": 32} if attention == "knn" else {}
    monkeypatch.setattr(engine, "_warned_of_approximation", True)
    for genes in (1, 200):
        context = a_context(tiny, range(min(spots, 1_500)), genes)
        embedding = engine.embed(slide, context=context, attention=attention, **neighbors)
    engine.decode(np.resize(embedding, (DECODED_ROWS + 1, model.d_model)), genes=["GENE0"])
    engine.decode(embedding)
    assert asked == {"tokens", "embed", "block" if attention == "global" else "knn_block", "head"}


def test_ranges_end_where_tensorrt_stops_counting(tiny_engine):
    published = replace(Manifest.read(tiny_engine).model, d_model=512)
    assert input_ranges("knn_block_1", published, 262_080)["key_index"][2] == (16, 262_080)
    for wrong in (0, -1, 262_081):
        with pytest.raises(InputError, match=r"--max-spots .*: give 1 to 262,080"):
            input_ranges("block_1", published, wrong)


# Building again


def test_what_is_up_to_date_is_not_built_again(mine, stpath):
    before = {path: path.stat().st_mtime_ns for path in mine.glob("plans/*/*")}
    build = ("build", mine, *RTX, "--target", "sm_89", "--max-spots", 2_000)
    code, out, err = stpath(*build)
    assert (code, err) == (0, "")
    assert out == f"{mine / 'plans' / SM_89}: 9 plans for sm_89, slides up to 2,000 spots, up to date\n"
    assert {path: path.stat().st_mtime_ns for path in mine.glob("plans/*/*")} == before


@pytest.mark.parametrize("stale", ["plan", "range"])
def test_what_is_not_up_to_date_is_built_again(mine, stpath, stale):
    if stale == "plan":
        (mine / "plans" / SM_89 / "head.plan").write_bytes(b"cut off")
    spots = 2_000 if stale == "plan" else 3_000
    code, out, err = stpath("build", mine, *RTX, "--target", "sm_89", "--max-spots", spots)
    assert code == 0
    assert err.startswith(f"building 9 plans for sm_89, slides up to {spots:,} spots; time: ")
    assert "s the last time, for sm_89" in err
    assert out.startswith(f"{mine / 'plans' / SM_89}: 9 plans for sm_89, slides up to {spots:,} spots (")
    assert Build.of(mine, "tensorrt_rtx", "cuda:0", "sm_89", spots).up_to_date()
    assert [path.name for path in (mine / "plans").iterdir()] == [SM_89]


@pytest.mark.parametrize(("earlier", "by"), [(False, "error"), (True, "error"), (True, "signal")])
def test_an_interrupted_build_leaves_what_was(mine, earlier, by):
    if not earlier:
        shutil.rmtree(mine / "plans")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}

    def stop(done, total):
        assert done < 300  # a graph is not built to its end
        if done > 250 and by == "error":
            raise KeyboardInterrupt
        if done > 250:
            signal.raise_signal(signal.SIGINT)

    build = Build.of(mine, "tensorrt_rtx", "cuda:0", "sm_89", 3_000)
    with pytest.raises(KeyboardInterrupt):
        build.run(stop)
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before
    assert (mine / "plans").exists() == earlier
    assert not list(mine.rglob("*partial*"))


def test_nothing_is_raised_through_tensorrt():
    def stop(share):
        raise KeyboardInterrupt

    monitor = new_monitor(trt, stop)
    monitor.phase_start("outer", None, 4)
    monitor.phase_start("inner", "outer", 2)
    assert monitor.step_complete("inner", 0)
    assert not monitor.step_complete("outer", 0)
    assert not monitor.step_complete("inner", 1)
    assert isinstance(monitor.stopped, KeyboardInterrupt)


def test_tensorrt_keeps_its_timings(tiny_engine, tmp_path, monkeypatch, gpu):
    """The builder of TensorRT-RTX under the name of TensorRT, whose timings it reads and writes but does not fill."""
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(trt, "__name__", "tensorrt")
    gpu.capability = (9, 0)
    read = []
    create = trt.IBuilderConfig.create_timing_cache
    record = lambda config, data: (read.append(data), create(config, data))[1]  # noqa: E731
    monkeypatch.setattr(trt.IBuilderConfig, "create_timing_cache", record)
    build = Build.of(engine, "tensorrt", "cuda:0", None, 2_000)
    assert (build.target, build.gpu) == ("sm_90", "NVIDIA Made Up")
    assert "not measured" in build.expected()
    build.run()
    cache = build.folder / "timing.cache"
    assert build.folder.name == f"tensorrt-{trt.__version__}-sm_90"
    assert cache.stat().st_size > 0
    assert read[0] == b""
    cache.write_bytes(b"of another driver")
    read.clear()
    Build.of(engine, "tensorrt", "cuda:0", None, 3_000).run()
    assert read[0] == b"of another driver"
    assert cache.read_bytes() != b"of another driver"

    gpu.plans_of(engine)
    loaded = Engine.load(engine, backend="tensorrt", device="cuda")
    assert repr(loaded) == f"Engine({str(engine)!r}, fp32, tensorrt on cuda:0)"
    slide = a_slide(load_golden("tiny_context"))
    np.testing.assert_allclose(loaded.embed(slide), Engine.load(engine).embed(slide), rtol=0, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--target", "sm_89"], "TensorRT builds for the GPU that it runs on; build there, with --device"),
        ([*RTX, "--target", "sm_90"], "TensorRT-RTX 1.7.1.116 builds for sm_75, sm_80, sm_86, sm_89, sm_120, sm_121; "),
        ([*RTX, "--target", "hopper"], "hopper: TensorRT-RTX"),
        ([*RTX, "--target", "sm_89", "--max-spots", 0], "--max-spots 0: give 1 to"),
        (
            ["--backend", "onnxruntime"],
            "--backend onnxruntime: no plans are built for it; give tensorrt or tensorrt_rtx",
        ),
    ],
)
def test_builds_that_cannot_be_are_refused(built, stpath, monkeypatch, words, told):
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    code, out, err = stpath("build", built, *words)
    assert (code, out) == (2, "")
    assert err.startswith("error[")
    assert err.count("\n") == 1
    assert told in err


def test_tensorrt_not_installed_says_how_to_get_it(built, stpath, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    code, _, err = stpath("build", built)
    assert code == 2
    assert "run: pip install 'stpath-engine[tensorrt]'" in err
    assert "--extra-index-url https://pypi.nvidia.com, or use NVIDIA's TensorRT container" in err
    with pytest.raises(InputError, match=r"TensorRT-RTX cannot be imported .*'stpath-engine\[tensorrt-rtx\]'"):
        Engine.load(built, backend="tensorrt_rtx", device="cuda:0")


def test_engines_that_cannot_be_written_are_refused(mine, stpath, monkeypatch):
    def read_only(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    code, _, err = stpath("build", mine, *RTX, "--target", "sm_86")
    assert code == 2
    assert f"sm_86: cannot be written ({mine / 'plans'}: Read-only file system)" in err
    assert [path.name for path in (mine / "plans").iterdir()] == [SM_89]


def test_a_graph_that_tensorrt_cannot_read_is_refused(mine):
    manifest = json.loads((mine / MANIFEST).read_text())
    (mine / "head.onnx").write_bytes(b"no graph")
    manifest["files"]["head.onnx"] = sha256(mine / "head.onnx")
    (mine / MANIFEST).write_text(json.dumps(manifest))
    build = Build.of(mine, "tensorrt_rtx", "cuda:0", "sm_89", 2_000)
    with pytest.raises(InputError, match=r"head.onnx: TensorRT-RTX .* cannot read it: "):
        build.run()
    assert [path.name for path in (mine / "plans").iterdir()] == [SM_89]
