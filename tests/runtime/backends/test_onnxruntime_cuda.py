"""ONNX Runtime for CUDA, on a GPU made of the host: the provider is the CPU's, on the memory and in the order of a GPU.

No test runs a kernel of CUDA.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cuda.bindings
import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from host_gpu import ALIGNED, HostGpu
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from helpers import relative_l2
from stpath_export.proof import Case, compare, random_slide, reference
from stpath_export.trace import trace
from stpath_runtime import Context, Engine, InputError
from stpath_runtime.backends import cuda as cuda_backend
from stpath_runtime.backends import onnxruntime_cuda
from stpath_runtime.backends.openvino import process_core
from stpath_runtime.backends.workspace import GpuWorkspace

WAYS = [{"attention": "global"}, {"attention": "knn", "neighbors": 9}]


class CudaSession:
    """A session that says it runs on CUDA, and does when the GPU comes to it."""

    def __init__(self, gpu, real, path, options, provider_options):
        self.options = provider_options
        assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        self.gpu = gpu
        self.session = real(path, providers=["CPUExecutionProvider"])
        self.run = self.session.run

    def get_providers(self):
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def disable_fallback(self):
        pass

    def io_binding(self):
        return Binding(self.session.io_binding(), self.gpu)

    def run_with_iobinding(self, binding, options):
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        self.gpu.queue.append(lambda: self.session.run_with_iobinding(binding.real))


class Binding:
    """Ends of a graph on the GPU's memory, which is the host's."""

    def __init__(self, real, gpu):
        self.real, self.gpu = real, gpu

    def bind_input(self, name, device, index, dtype, shape, address):
        self._require_on_gpu(device, index, dtype, shape, address)
        self.real.bind_input(name, "cpu", 0, dtype, shape, address)

    def bind_output(self, name, device, index, dtype, shape, address):
        self._require_on_gpu(device, index, dtype, shape, address)
        self.real.bind_output(name, "cpu", 0, dtype, shape, address)

    def _require_on_gpu(self, device, index, dtype, shape, address):
        assert (device, index) == ("cuda", 0)
        assert address % ALIGNED == 0
        self.gpu.require_held(address, int(np.prod(shape)) * np.dtype(dtype).itemsize)


class BfloatSession(CudaSession):
    """The same by OpenVINO, in products of float32: ONNX Runtime has no bfloat16 on a CPU."""

    def __init__(self, gpu, real, path, options, provider_options):
        core = process_core()
        self.graph = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self.gpu, self.ends = gpu, {}

    def run(self, outputs, inputs):
        tensors = {name: self._tensor(array) for name, array in inputs.items()}
        return list(self.graph(tensors).values())

    def io_binding(self):
        return self

    def bind_input(self, name, device, index, dtype, shape, address):
        self.ends[name] = self.gpu.array(address, shape, np.uint16 if dtype == onnx.TensorProto.BFLOAT16 else dtype)

    bind_output = bind_input

    def run_with_iobinding(self, binding, options):
        ends = dict(self.ends)
        self.gpu.queue.append(lambda: self._execute(ends))

    def _execute(self, ends):
        names = [next(name for name in end.names if name in ends) for end in self.graph.outputs]  # one may have several
        found = self.run(None, {name: ends[name] for end in self.graph.inputs for name in end.names if name in ends})
        for name, array in zip(names, found, strict=True):
            assert array.itemsize == ends[name].itemsize
            ends[name][...] = array.view(ends[name].dtype)

    def _tensor(self, array):
        if array.dtype == np.uint16:
            return openvino.Tensor(array, openvino.Shape(array.shape), openvino.Type.bf16)
        return openvino.Tensor(np.ascontiguousarray(array))


@pytest.fixture
def gpu(monkeypatch):
    gpu = HostGpu()
    real, made = onnxruntime.InferenceSession, []

    def session(path, options, providers, enable_fallback=1):
        ((provider, provider_options),) = providers
        assert enable_fallback == 0  # or Python's part of ONNX Runtime takes the CPU where CUDA fails
        if provider == "CPUExecutionProvider":
            return real(path, options, providers=providers)
        assert gpu.streams, "the provider starts after the stream that it is given"
        kind = CudaSession if "bf16" not in str(path) else BfloatSession
        made.append(kind(gpu, real, path, options, provider_options))
        return made[-1]

    gpu.sessions = made
    monkeypatch.setattr(cuda.bindings, "runtime", gpu)
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    loaded = []
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: loaded.append("CUDA's libraries"))

    def allocator(*_):  # loads the provider, which needs them
        assert loaded, "CUDA's libraries are loaded before the provider's"

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator_v2", allocator)
    onnxruntime_cuda._preload_libraries.cache_clear()
    onnxruntime_cuda._share_gpu_memory.cache_clear()
    monkeypatch.setattr(onnxruntime_cuda, "_ARENA", Counter())
    return gpu


@pytest.fixture
def engine(tiny_engine, gpu):
    loaded = Engine.load(tiny_engine, device="cuda")
    loaded._warned_of_approximation = True
    return loaded


@pytest.fixture
def exact(tiny_engine):
    loaded = Engine.load(tiny_engine)
    loaded._warned_of_approximation = True
    return loaded


def a_context(slide, genes):
    counts = np.random.default_rng(1).poisson(2, (5, 20))
    return Context(slide.barcodes[:5], counts, genes[:20])


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how["attention"])
@pytest.mark.parametrize("rows", [64, 4096])
def test_slides_run_on_the_gpu(engine, exact, gpu, tiny, how, rows, monkeypatch):
    monkeypatch.setattr(engine.backend, "most_rows", rows)
    for spots in (70, 1_501, 5):  # memory grows, and is used again; 1,501 keys are padded
        slide = random_slide(spots, tiny.model.config.n_features, spots, "Kidney", "Visium")
        context = a_context(slide, tiny.vocabulary.symbols)
        found = engine.predict(slide, context=context, **how)
        assert relative_l2(found.X, exact.predict(slide, context=context, **how).X) < 1e-6
    assert (found.uns["stpath"]["backend"], found.uns["stpath"]["device"]) == ("onnxruntime", "cuda:0")
    assert not gpu.queue
    assert gpu.sessions[0].options["user_compute_stream"] == "7"


def test_memory_is_kept_and_counted(engine, gpu, tiny):
    slide = random_slide(1_000, tiny.model.config.n_features, 0)
    first = engine.embed(slide)
    asked = len(gpu.asked)
    np.testing.assert_array_equal(engine.embed(slide), first)
    assert len(gpu.asked) == asked
    assert engine.backend.available_memory() == gpu.size


def test_features_go_up_once_and_the_embedding_comes_down_once(engine, gpu, tiny, monkeypatch):
    moved = {"up": 0, "down": 0}
    real = HostGpu.cudaMemcpyAsync

    def counted(self, to, source, size, kind, stream):
        moved["up"] += size * (kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice)
        moved["down"] += size * (kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost)
        return real(self, to, source, size, kind, stream)

    monkeypatch.setattr(HostGpu, "cudaMemcpyAsync", counted)
    slide = random_slide(1_000, tiny.model.config.n_features, 0)
    embedding = engine.embed(slide)
    assert moved["down"] == embedding.nbytes
    assert slide.features.nbytes <= moved["up"] < slide.features.nbytes + 100 * len(slide)


def test_threads_take_turns(engine, exact, tiny):
    slides = [random_slide(spots, tiny.model.config.n_features, spots) for spots in (300, 310, 320, 330)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.embed, slides))
    for slide, embedding in zip(slides, found, strict=True):
        assert relative_l2(embedding, exact.embed(slide)) < 1e-6


def test_rows_that_a_graph_takes_are_not_those_that_it_writes(gpu):
    from stpath_runtime.backends.cuda import Gpu

    seen = {}

    def launch(graph, inputs, outputs):
        seen.update(inputs=inputs, outputs=outputs)

    at = GpuWorkspace(Gpu("cuda:0"), launch)
    x = at.zeros("x", (8, 4), np.float32)
    at.run("block_1", {"x": x[2:4]}, {"x_next": x[2:4], "k_next": at.zeros("k", (8, 4), np.float32)[2:4]})
    assert not seen["outputs"]["x_next"].overlaps(seen["inputs"]["x"])
    at.fetch(x)
    gpu.array(seen["outputs"]["x_next"].address, (2, 4), np.float32)[...] = 3
    at.run("block_1", {"x": x[2:4]}, {"x_next": x[2:4]})
    np.testing.assert_array_equal(at.fetch(x)[:, 0], [0, 0, 3, 3, 0, 0, 0, 0])


@pytest.mark.parametrize("neighbors", [None, 9])
def test_bfloat16(tiny, tiny_bf16_engine, gpu, neighbors):
    """The graphs of an engine in bfloat16; the kernels that run them on a GPU are held to the bar by its proof."""
    slide = random_slide(70, tiny.model.config.n_features, 0, "Kidney", "Visium")
    case = Case("made up", slide, a_context(slide, tiny.vocabulary.symbols))
    exact, low = (
        reference(copy.deepcopy(tiny.model).to(dtype), case, tiny.vocabulary, neighbors)
        for dtype in (torch.float64, torch.bfloat16)
    )
    engine = Engine.load(tiny_bf16_engine, device="cuda:0")
    engine._warned_of_approximation = True
    how = {} if neighbors is None else {"attention": "knn", "neighbors": neighbors}
    embedding = engine.embed(slide, context=case.context, **how)
    row = compare((embedding, engine.decode(embedding)), exact, low, None)
    assert row["passed"], row


@pytest.mark.parametrize("neighbors", [None, 9])
@pytest.mark.parametrize("fixture", ["tiny_engine", "tiny_bf16_engine"])
def test_stages_are_traced_on_the_gpu(request, tiny, gpu, fixture, neighbors):
    engine = Engine.load(request.getfixturevalue(fixture), device="cuda:0")
    slide = random_slide(70, tiny.model.config.n_features, 0, "Kidney", "Visium")
    case = Case("made up", slide, a_context(slide, tiny.vocabulary.symbols))
    dtype = torch.float32 if engine.precision == "fp32" else torch.bfloat16
    models = (copy.deepcopy(tiny.model).to(kind) for kind in (torch.float64, dtype))
    found = trace(engine, *models, case, neighbors)
    assert found.enters() is None
    assert all(row["accumulated_passed"] for row in found.rows)


# Refusals


def test_bfloat16_is_not_for_the_cpu(tiny_bf16_engine):
    with pytest.raises(InputError, match="a bf16 engine; ONNX Runtime computes in bfloat16 on GPUs only"):
        Engine.load(tiny_bf16_engine)


def test_too_little_memory_for_one_tile(engine, gpu, tiny):
    gpu.size = 1 << 16
    slide = random_slide(1_000, tiny.model.config.n_features, 0)
    with pytest.raises(InputError, match="of memory cannot hold one tile of 1,000 spots; the least that works is"):
        engine.embed(slide)
    with pytest.raises(InputError, match="cuda:0: not enough GPU memory for .* MiB; give less with --memory"):
        engine.embed(slide, memory=1 << 30)


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            "Failed to allocate memory for requested buffer of size 123",
            InputError,
            "cuda:0: not enough memory for a tile of embed; give less with --memory",
        ),
        ("illegal memory access", RuntimeException, "^illegal memory access$"),  # a fault of ours, not of the input
    ],
)
def test_what_onnxruntime_says_of_a_graph_that_fails(engine, tiny, monkeypatch, said, kind, told):
    def fail(self, binding, options):
        raise RuntimeException(said)  # ONNX Runtime's own

    monkeypatch.setattr(CudaSession, "run_with_iobinding", fail)
    with pytest.raises(kind, match=told):
        engine.embed(random_slide(10, tiny.model.config.n_features, 0))


def test_a_provider_that_is_not_installed(tiny_engine):
    with pytest.raises(InputError, match=r"runs on the CPU only; .*'stpath-engine\[gpu\]'"):
        onnxruntime_cuda.OnnxRuntimeCudaBackend(tiny_engine, "cuda:0")


def test_a_device_that_is_not_there(tiny_engine, gpu):
    with pytest.raises(InputError, match=r"device cuda:1: not there \(there are 1, from cuda:0\)"):
        Engine.load(tiny_engine, device="cuda:1")


def test_a_session_that_fell_back_to_the_cpu_is_refused(tiny_engine, gpu, monkeypatch):
    monkeypatch.setattr(CudaSession, "get_providers", lambda self: ["CPUExecutionProvider"])
    said = lambda: print("Failed to load libcudnn.so.9: no such file")  # noqa: E731, T201
    monkeypatch.setattr(onnxruntime, "preload_dlls", said)
    monkeypatch.setattr(onnxruntime, "create_and_register_allocator_v2", lambda *_: None)
    engine = Engine.load(tiny_engine, device="cuda:0")
    why = r"did not start \(ONNX Runtime chose CPUExecutionProvider; Failed to load libcudnn"
    with pytest.raises(InputError, match=why):
        engine.decode(np.ones((1, 64)))


def test_the_reason_of_a_failed_start_is_told(engine, monkeypatch):
    def fail(*_, **__):
        raise RuntimeException("CUDA failure 35: CUDA driver version is insufficient ; GPU=0")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(InputError, match="did not start .CUDA failure 35: CUDA driver version is insufficient"):
        engine.decode(np.ones((1, 64)))


def test_what_the_engine_holds_is_freed_by_close_or_with_it(tiny_engine, gpu, tiny):
    slide = random_slide(100, tiny.model.config.n_features, 0)
    with Engine.load(tiny_engine, device="cuda:0") as engine:
        engine.embed(slide)
        assert gpu.held
    assert not gpu.held
    with pytest.raises(InputError, match="the engine was closed; load it again"):
        engine.embed(slide)
    engine = Engine.load(tiny_engine, device="cuda:0")
    engine.embed(slide)
    del engine
    gc.collect()
    assert not gpu.held


def test_pinned_memory_is_one_ring_whatever_goes_up(gpu, monkeypatch):
    monkeypatch.setattr(cuda_backend, "PIECE", 1 << 10)
    device = cuda_backend.Gpu("cuda:0")
    arrays = [
        np.ones(n, dtype=dtype).cumsum(dtype=dtype)
        for n, dtype in [(0, "f4"), (1, "i8"), (5_000, "f4"), (700, "f2"), (9, "?")]
    ]
    arrays.append(np.arange(600, dtype=np.float32).reshape(20, 30).T)
    on_gpu = [device.upload(str(i), array) for i, array in enumerate(arrays)]
    downloaded = [device.download(array) for array in on_gpu]
    device.synchronize()
    for array, found in zip(arrays, downloaded, strict=True):
        np.testing.assert_array_equal(found, array)
    assert len(gpu.pinned) == cuda_backend.BUFFERS


def test_the_arena_of_onnxruntime_is_free_memory(engine, gpu, tiny, monkeypatch):
    slide = random_slide(100, tiny.model.config.n_features, 0)
    engine.embed(slide)
    run = CudaSession.run_with_iobinding

    def grown(self, binding, options):
        gpu.size -= 1 << 20  # an arena that takes more of the GPU
        return run(self, binding, options)

    before = engine.backend.available_memory()
    monkeypatch.setattr(CudaSession, "run_with_iobinding", grown)
    engine.embed(slide)
    assert engine.backend.available_memory() == before
