"""TensorRT-RTX's plans run slides, on a GPU made of the host."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import cuda.bindings
import numpy as np
import pytest
import tensorrt_rtx as trt
from cuda.bindings import runtime as cudart
from host_gpu import HostGpu
from rtx_plans import RTX, SM_89, OnnxRuntimePlan, a_context, a_slide

from stpath_runtime.backends import open_backend
from stpath_runtime.backends.cuda import Gpu
from stpath_runtime.backends.plan_builder import Build
from stpath_runtime.backends.plans import SIDECAR
from stpath_runtime.engine import Engine
from stpath_runtime.errors import InputError
from stpath_runtime.files import sha256
from stpath_runtime.manifest import MANIFEST


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


def edit_sidecar(engine: Path, **changes) -> None:
    path = engine / "plans" / SM_89 / SIDECAR
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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
