"""TensorRT: TensorRT-RTX builds every stage, which needs no GPU; what runs the plans runs on a GPU made of the host.

No test runs a kernel: the last step, `execute_async_v3`, is ONNX Runtime here, on the very bytes that were uploaded.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda.bindings
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx as trt
from cuda.bindings import runtime as cudart
from host_gpu import ALIGNED, HostGpu

from helpers import load_golden
from stpath_runtime.backends import open_backend, plan_builder
from stpath_runtime.backends.cuda import Gpu
from stpath_runtime.backends.onnxruntime import OnnxRuntimeBackend
from stpath_runtime.backends.plan_builder import Build, build_plan, new_monitor, parse
from stpath_runtime.backends.plans import SIDECAR, Plans, input_ranges, quiet_logger, stage_graphs
from stpath_runtime.cli.app import main
from stpath_runtime.encoding.sizes import DECODED_ROWS
from stpath_runtime.engine import Engine
from stpath_runtime.errors import InputError
from stpath_runtime.files import sha256
from stpath_runtime.manifest import MANIFEST, Manifest
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide

SM_89 = f"tensorrt_rtx-{trt.__version__}-sm_89"
STAGES = ["tokens", "embed", "block_1", "block_2", "block_3", "knn_block_1", "knn_block_2", "knn_block_3", "head"]
RTX = ("--backend", "tensorrt_rtx")


class OnnxRuntimePlan:
    """A plan as TensorRT loads it, and its context, that runs the ONNX graph that the plan was built from."""

    def __init__(self, graph: Path, gpu: HostGpu):
        self.session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        self.gpu, self.shapes, self.addresses = gpu, {}, {}
        self.inputs = {end.name: end.type for end in self.session.get_inputs()}
        self.types = self.inputs | {end.name: end.type for end in self.session.get_outputs()}
        self.num_io_tensors = len(self.types)

    def get_tensor_name(self, i):
        return list(self.types)[i]

    def get_tensor_mode(self, name):
        return trt.TensorIOMode.INPUT if name in self.inputs else trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name):
        types = {"float": trt.float32, "float16": trt.float16, "int64": trt.int64, "bool": trt.bool}
        return types[self.types[name].removeprefix("tensor(").removesuffix(")")]

    def create_execution_context(self, strategy):
        assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self

    def set_input_shape(self, name, shape):
        if name not in self.inputs or min(shape, default=1) < 0:
            return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        if name not in self.types or address % ALIGNED:
            return False
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        zeros = {end: np.zeros(shape, self._dtype(end)) for end, shape in self.shapes.items()}
        return trt.Dims(self.session.run([name], zeros)[0].shape)

    def update_device_memory_size_for_shapes(self):
        return 4096

    def set_device_memory(self, memory, size):
        self.gpu.require_held(memory, size)

    def execute_async_v3(self, stream):
        shapes, addresses = dict(self.shapes), dict(self.addresses)  # as they are now: the next call changes them
        self.gpu.queue.append(lambda: self._execute(shapes, addresses))
        return True

    def _execute(self, shapes, addresses):
        def at(name, shape):
            return self.gpu.array(addresses[name], shape, self._dtype(name))

        outputs = [name for name in self.types if name not in self.inputs]
        found = self.session.run(outputs, {name: at(name, shape) for name, shape in shapes.items()})
        for name, values in zip(outputs, found, strict=True):
            at(name, values.shape)[:] = values

    def _dtype(self, name):
        return trt.nptype(self.get_tensor_dtype(name))


@pytest.fixture(scope="session", params=["tiny_engine", "tiny_fp16_engine", "tiny_bf16_engine"])
def either_engine(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def built(tiny_engine, made_once) -> Path:
    """The tiny engine with plans for sm_89, not to be changed."""

    def fill(folder: Path) -> None:
        shutil.copytree(tiny_engine, folder / "engine")
        Build.of(folder / "engine", "tensorrt_rtx", "cuda:0", "sm_89", 2_000).run()

    return made_once("tiny_plans", fill) / "engine"


@pytest.fixture
def mine(built, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(built, tmp_path / "engine"))


@pytest.fixture
def gpu(monkeypatch) -> HostGpu:
    """A GPU of this machine, and a TensorRT-RTX that runs plans on it."""
    gpu = HostGpu()
    monkeypatch.setattr(cuda.bindings, "runtime", gpu)
    graph_of = {}

    def load(plan: bytes):
        return OnnxRuntimePlan(graph_of[plan], gpu)

    def plans_of(engine: Path) -> None:
        for plan in engine.glob("plans/*/*.plan"):
            graph_of[plan.read_bytes()] = engine / f"{plan.stem}.onnx"

    monkeypatch.setattr(trt, "Runtime", lambda log: SimpleNamespace(deserialize_cuda_engine=load))
    gpu.plans_of = plans_of
    return gpu


@pytest.fixture
def stpath(capsys):
    def run(*words) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run


def a_slide(tiny, n=200, seed=0) -> Slide:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, tiny.model.config.n_features)).astype(np.float32)
    return Slide(rng.integers(0, 4_000, (n, 2)), features, [f"b{i}" for i in range(n)], "Kidney", "Visium", "made up")


def a_context(tiny, spots: range, genes: int) -> Context:
    counts = np.random.default_rng(1).poisson(2, (len(spots), genes))
    return Context([f"b{i}" for i in spots], counts, tiny.vocabulary.symbols[:genes])


def edit_sidecar(engine: Path, **changes) -> None:
    path = engine / "plans" / SM_89 / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# What is built


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


# Running


@pytest.mark.parametrize("how", [{}, {"attention": "knn", "neighbors": 16}])
def test_plans_run_slides(tiny, built, gpu, how):
    gpu.plans_of(built)
    engine, reference = Engine.load(built, backend="tensorrt_rtx", device="cuda:0"), Engine.load(built)
    engine._warned_of_approximation = reference._warned_of_approximation = True
    sizes = (70, 2_500 if how else 1_500, 5)  # memory grows, and is used again; kNN is for slides of any size
    for spots in sizes:
        slide, context = a_slide(tiny, spots), a_context(tiny, range(3), 20)
        found = engine.predict(slide, context=context, **how)
        np.testing.assert_allclose(found.X, reference.predict(slide, context=context, **how).X, rtol=0, atol=1e-5)
    assert (found.uns["stpath"]["backend"], found.uns["stpath"]["device"]) == ("tensorrt_rtx", "cuda:0")
    assert not gpu.queue
    assert engine.backend.available_memory() == gpu.size  # what is held is used again
    asked = len(gpu.asked)
    engine.predict(a_slide(tiny, sizes[1]), context=context, **how)
    assert len(gpu.asked) == asked


def test_float16_plans_run_slides(tiny, tiny_fp16_engine, tmp_path, gpu):
    engine = Path(shutil.copytree(tiny_fp16_engine, tmp_path / "engine"))
    Build.of(engine, "tensorrt_rtx", "cuda:0", None, 2_000).run()
    gpu.plans_of(engine)
    slide = a_slide(tiny)
    found = Engine.load(engine, backend="tensorrt_rtx", device="cuda:0").predict(slide)
    np.testing.assert_array_equal(found.X, Engine.load(engine).predict(slide).X)


def test_what_is_called_is_in_tensorrt():
    used = {name for name in vars(OnnxRuntimePlan) if not name.startswith("_")}
    assert used <= set(dir(trt.ICudaEngine)) | set(dir(trt.IExecutionContext))
    assert hasattr(trt.ICudaEngine, "num_io_tensors")
    calls = {name for name in vars(HostGpu) if name.startswith("cuda")}
    assert calls <= set(dir(cudart))
    assert hasattr(trt.Runtime, "deserialize_cuda_engine")


@pytest.mark.parametrize(
    ("function", "arguments", "gives"),
    [
        ("cudaGetDeviceCount", (), 1),
        ("cudaSetDevice", (0,), 0),
        ("cudaGetDeviceProperties", (0,), 1),
        ("cudaStreamCreate", (), 1),
        ("cudaMemGetInfo", (), 2),
        ("cudaMalloc", (16,), 1),
        ("cudaFree", (0,), 0),
        ("cudaHostAlloc", (16, 0), 1),
        ("cudaFreeHost", (0,), 0),
        ("cudaMemsetAsync", (0, 0, 0, 0), 0),
        ("cudaEventCreateWithFlags", (cudart.cudaEventDisableTiming,), 1),
        ("cudaEventRecord", (0, 0), 0),
        ("cudaEventSynchronize", (0,), 0),
        ("cudaEventDestroy", (0,), 0),
        ("cudaStreamDestroy", (0,), 0),
        ("cudaMemcpyAsync", (0, 0, 0, cudart.cudaMemcpyKind.cudaMemcpyHostToDevice, 0), 0),
        ("cudaStreamSynchronize", (0,), 0),
    ],
)
def test_cuda_takes_what_it_is_given(function, arguments, gives):
    """The types of what is passed and what comes back; without a GPU each call answers with an error."""
    error, *found = getattr(cudart, function)(*arguments)
    assert isinstance(error, cudart.cudaError_t)
    assert len(found) == gives
    assert {"major", "minor", "name"} <= set(dir(cudart.cudaDeviceProp))


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_what_tensorrt_refuses_is_no_result(mine, gpu, tiny, monkeypatch, call):
    gpu.plans_of(mine)
    engine = Engine.load(mine, backend="tensorrt_rtx", device="cuda:0")
    monkeypatch.setattr(OnnxRuntimePlan, call, lambda *_: False)
    with pytest.raises(RuntimeError, match="TensorRT-RTX refuses"):
        engine.embed(a_slide(tiny))


def test_what_plans_hold_is_freed(mine, gpu, tiny):
    gpu.plans_of(mine)
    with Engine.load(mine, backend="tensorrt_rtx", device="cuda:0") as engine:
        engine.embed(a_slide(tiny))
        assert gpu.held
    assert not gpu.held
    with pytest.raises(InputError, match="the engine was closed"):
        engine.embed(a_slide(tiny))


# Refusals


@pytest.fixture
def refused(mine, gpu):
    """Load the copy with TensorRT-RTX, and give the one line that refuses it."""

    def load() -> str:
        with pytest.raises(InputError) as caught:
            Engine.load(mine, backend="tensorrt_rtx", device="cuda:0")
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith(f"; run: stpath build {mine} --backend tensorrt_rtx --device cuda:0")
        return str(caught.value)

    return load


def test_plans_for_another_gpu_are_refused(refused, gpu):
    gpu.capability = (12, 0)
    assert f"no plans for TensorRT-RTX {trt.__version__} on sm_120; it has {SM_89}; " in refused()


def test_plans_of_another_tensorrt_are_refused(refused, monkeypatch):
    monkeypatch.setattr(trt, "__version__", "1.9.9")
    assert f"no plans for TensorRT-RTX 1.9.9 on sm_89; it has {SM_89}; " in refused()


def test_an_engine_without_plans_is_refused(refused, mine):
    shutil.rmtree(mine / "plans")
    assert "it has none; " in refused()


def test_renamed_plans_are_refused(refused, mine):
    edit_sidecar(mine, target="sm_120")
    assert f"built for TensorRT-RTX {trt.__version__} on sm_120, and this is TensorRT-RTX" in refused()


@pytest.mark.parametrize("name", ["block_2.onnx", "weights.bin"])
def test_plans_of_other_graphs_are_refused(refused, mine, name):
    was = sha256(mine / name)
    with (mine / name).open("ab") as file:
        file.write(b"\x00" * 64)
    manifest = json.loads((mine / MANIFEST).read_text())
    manifest["files"][name] = sha256(mine / name)
    (mine / MANIFEST).write_text(json.dumps(manifest))
    told = f"built from another {name} (SHA-256 {was[:12]}…; the engine's is {manifest['files'][name][:12]}…)"
    if name.endswith(".bin"):
        assert told in refused()
    else:
        with pytest.raises(InputError) as caught:
            open_backend("tensorrt_rtx", mine, "cuda:0")
        assert told in str(caught.value)


def test_damaged_plans_are_refused(refused, mine):
    plan = mine / "plans" / SM_89 / "block_1.plan"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{plan}: truncated or altered (its SHA-256 is not the one in plans.json)" in refused()
    plan.unlink()
    assert f"{plan}: missing; " in refused()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 1}', '{"plans": 3}', "null"])
def test_damaged_sidecars_are_refused(refused, mine, text):
    (mine / "plans" / SM_89 / SIDECAR).write_text(text)
    assert f"{SIDECAR}: damaged (" in refused()


@pytest.mark.parametrize("changes", [{"schema": 2}, {"plans": {}}, {"plans": {"head": {}}}, {"plans": []}])
def test_altered_sidecars_are_refused(refused, mine, changes):
    edit_sidecar(mine, **changes)
    assert refused()


def test_a_plan_that_does_not_load_is_refused(built, gpu, monkeypatch):
    monkeypatch.setattr(trt, "Runtime", lambda log: SimpleNamespace(deserialize_cuda_engine=lambda plan: None))
    backend = open_backend("tensorrt_rtx", built, "cuda:0")
    with pytest.raises(
        InputError, match=r"tokens.plan: TensorRT-RTX cannot load it on NVIDIA Made Up: .*; run: stpath"
    ):
        backend.run("tokens", {})
    with pytest.raises(InputError, match=r"fused: TensorRT runs the stages only, tokens, embed, "):
        backend.run("fused", {})


def test_shapes_out_of_range_are_refused(tiny, built, gpu):
    gpu.plans_of(built)
    engine = Engine.load(built, backend="tensorrt_rtx", device="cuda:0")
    with pytest.raises(InputError) as caught:
        engine.embed(a_slide(tiny, 2_100))
    assert str(caught.value) == (
        "block_1: k of shape [2104, 64], and the plan was built for [1, 64] to [2048, 64], slides up to 2,000 spots; "
        f"run: stpath build {built} --backend tensorrt_rtx --device cuda:0 --max-spots 2104"
    )


def test_too_little_gpu_memory_is_refused(tiny, built, gpu):
    gpu.plans_of(built)
    gpu.size = 1 << 16
    engine = Engine.load(built, backend="tensorrt_rtx", device="cuda:0")
    with pytest.raises(InputError, match="of memory cannot hold one tile of 1,000 spots"):
        engine.embed(a_slide(tiny, 1_000))
    with pytest.raises(InputError, match="cuda:0: not enough GPU memory for .* MiB; give less with --memory"):
        engine.embed(a_slide(tiny, 1_000), memory=1 << 30)


def test_gpus_that_are_not_there_are_refused(built, stpath, gpu, monkeypatch):
    with pytest.raises(InputError, match=r"device cuda:1: not there \(there are 1, from cuda:0\)"):
        Gpu("cuda:1")
    with pytest.raises(InputError, match="device 'cpu': no NVIDIA GPU; give cuda:N"):
        Engine.load(built, backend="tensorrt_rtx")
    monkeypatch.setattr(cuda.bindings, "runtime", cudart)
    with pytest.raises(InputError, match=r"device cuda:0: not there \(CUDA finds no GPU: cudaError"):
        Engine.load(built, backend="tensorrt_rtx", device="cuda:0")
    code, _, err = stpath("build", built, *RTX)
    assert code == 2
    assert "device cuda:0: not there" in err
    assert "or give --target sm_89, to build for a GPU of another machine" in err
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(InputError, match="CUDA's Python bindings are not installed; run: pip install cuda-bindings"):
        Gpu("cuda:0")


def test_a_failure_of_cuda_is_named(gpu):
    device = Gpu("cuda:0")
    gpu.cudaStreamSynchronize = lambda stream: (cudart.cudaError_t.cudaErrorIllegalAddress,)
    with pytest.raises(RuntimeError, match="cuda:0: cudaStreamSynchronize failed with cudaErrorIllegalAddress"):
        device.synchronize()


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
