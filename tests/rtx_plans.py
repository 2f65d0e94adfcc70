"""Plans of TensorRT-RTX, and a TensorRT that runs them on a GPU made of the host.

No test runs a kernel: the last step, `execute_async_v3`, is ONNX Runtime here, on the very bytes that were uploaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import tensorrt_rtx as trt
from host_gpu import ALIGNED, HostGpu

from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide

SM_89 = f"tensorrt_rtx-{trt.__version__}-sm_89"
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


def a_slide(tiny, n=200, seed=0) -> Slide:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, tiny.model.config.n_features)).astype(np.float32)
    return Slide(rng.integers(0, 4_000, (n, 2)), features, [f"b{i}" for i in range(n)], "Kidney", "Visium", "made up")


def a_context(tiny, spots: range, genes: int) -> Context:
    counts = np.random.default_rng(1).poisson(2, (len(spots), genes))
    return Context([f"b{i}" for i in spots], counts, tiny.vocabulary.symbols[:genes])
