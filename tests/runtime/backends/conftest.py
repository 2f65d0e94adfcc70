"""What the tests of TensorRT share: an engine with plans, and a GPU made of the host."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import cuda.bindings
import pytest
import tensorrt_rtx as trt
from host_gpu import HostGpu
from rtx_plans import OnnxRuntimePlan

from stpath_runtime.backends.plan_builder import Build


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
