"""TensorRT, or TensorRT-RTX, on an NVIDIA GPU: runs the plans that `stpath build` made, and builds none.

Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/infer/Core/ExecutionContext.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import Arrays
from ..encoding.sizes import MOST_ROWS
from ..errors import MemoryLimitError, PlanError
from .cuda import DeviceArray, Gpu
from .plans import LIBRARIES, Range, check_plans, import_tensorrt, last_error, plans_folder, quiet_logger
from .workspace import GpuWorkspace, gpu_workspace, require_open


@dataclass(frozen=True)
class _Loaded:
    """A plan on the GPU."""

    context: Any  # trt.IExecutionContext, which keeps its engine
    inputs: dict[str, type[np.generic]]  # types by name
    outputs: dict[str, type[np.generic]]
    ranges: dict[str, Range]


class TensorRtBackend:
    """Runs plans with TensorRT; a plan is loaded when it is first run, and its hash checked before.

    Parameters
    ----------
    library
        "tensorrt" or "tensorrt_rtx".

    Raises
    ------
    InputError
        If TensorRT is not installed, the device is not "cuda:N" or not there, or there are no plans for it that were
        built from this engine's graphs by this TensorRT.
    """

    most_rows = MOST_ROWS  # which plans are built for
    tiles_at_once = 1
    keeps_tiles = False  # all graphs share one piece of memory

    def __init__(self, engine: Path, device: str, library: str = "tensorrt") -> None:
        self.name = library
        self._trt = import_tensorrt(library)
        self._gpu = Gpu(device)
        self.device = self._gpu.device
        self._fix = f"run: stpath build {engine} --backend {library} --device {self.device}"
        version, target = self._trt.__version__, self._gpu.target
        self._plans = check_plans(engine, library, version, target, self._fix)
        self._folder = plans_folder(engine, library, version, target)
        self._log = quiet_logger(self._trt)
        self._runtime = self._trt.Runtime(self._log)
        self._loaded: dict[str, _Loaded] = {}
        self._engine, self._closed = engine, False

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names.

        Raises
        ------
        InputError
            If a shape is out of the range that the plan was built for, or the GPU has too little memory.
        """
        gpu = self._gpu
        with gpu.alone:
            gpu.use()
            plan = self._plan(graph)
            given = {name: gpu.upload(name, np.asarray(inputs[name], dtype)) for name, dtype in plan.inputs.items()}
            self._take(graph, given)
            shapes = {name: tuple(plan.context.get_tensor_shape(name)) for name in plan.outputs}
            outputs = {name: gpu.empty(name, shapes[name], dtype) for name, dtype in plan.outputs.items()}
            self._queue(graph, outputs)
            found = [gpu.download(array) for array in outputs.values()]
            gpu.synchronize()
        return found

    def workspace(self) -> AbstractContextManager[GpuWorkspace]:
        """Memory of the GPU, for one thread at a time."""
        return gpu_workspace(self._gpu, self._launch)

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        return self._gpu.free_memory()

    def close(self) -> None:
        """Free the plans, and what they and the engine hold on the GPU."""
        with self._gpu.alone:
            self._closed = True
            self._loaded.clear()
            self._gpu.close()

    def _launch(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        self._take(graph, inputs)
        self._queue(graph, outputs)

    def _take(self, graph: str, inputs: Mapping[str, DeviceArray]) -> None:
        plan = self._plan(graph)
        for name, array in inputs.items():
            self._require_in_range(graph, name, array.shape)
            self._require(plan.context.set_input_shape(name, array.shape), graph, f"{name} of {list(array.shape)}")
            self._require(plan.context.set_tensor_address(name, array.address), graph, f"the address of {name}")

    def _queue(self, graph: str, outputs: Mapping[str, DeviceArray]) -> None:
        plan, gpu = self._plan(graph), self._gpu
        for name, array in outputs.items():
            self._require(plan.context.set_tensor_address(name, array.address), graph, f"the address of {name}")
        # Activations for these shapes, not the largest, in memory that all plans share, as they run one at a time.
        size = plan.context.update_device_memory_size_for_shapes()
        plan.context.set_device_memory(gpu.reserve("activations", max(1, size)), size)
        self._require(plan.context.execute_async_v3(gpu.stream), graph, "what is queued")

    def _require(self, taken: bool, graph: str, what: str) -> None:
        """Check the return value of a TensorRT call, which raises nothing when it fails."""
        if not taken:
            raise RuntimeError(f"{graph}: {LIBRARIES[self.name]} refuses {what}: {last_error(self._log)}")

    def _plan(self, graph: str) -> _Loaded:
        require_open(self._closed, self._engine)
        if graph not in self._loaded:
            self._loaded[graph] = self._load(graph)
        return self._loaded[graph]

    def _load(self, graph: str) -> _Loaded:
        if graph not in self._plans.plans:
            raise PlanError(f"{graph}: TensorRT runs the stages only, {', '.join(self._plans.plans)}")
        path, trt = self._folder / f"{graph}.plan", self._trt
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            why = last_error(self._log)
            raise PlanError(f"{path}: {LIBRARIES[self.name]} cannot load it on {self._gpu.name}: {why}; {self._fix}")
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise MemoryLimitError(
                f"{path}: {LIBRARIES[self.name]} makes no context for it on {self._gpu.name} "
                f"({last_error(self._log)}); free memory of the GPU"
            )
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        types = {name: _numpy_type(trt, engine.get_tensor_dtype(name)) for name in names}
        inputs = {name: types[name] for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT}
        outputs = {name: types[name] for name in names if name not in inputs}
        return _Loaded(context, inputs, outputs, self._plans.ranges(graph))

    def _require_in_range(self, graph: str, name: str, shape: tuple[int, ...]) -> None:
        least, _, largest = self._loaded[graph].ranges[name]
        if all(low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)):
            return
        more = max((size for size, high in zip(shape, largest, strict=True) if size > high), default=0)
        raise PlanError(
            f"{graph}: {name} of shape {list(shape)}, and the plan was built for {list(least)} to {list(largest)}, "
            f"slides up to {self._plans.max_spots:,} spots; {self._fix}{f' --max-spots {more}' if more else ''}"
        )


def _numpy_type(trt: Any, dtype: Any) -> type[np.generic]:
    """The type of an array: of bfloat16, which NumPy does not have, its bits."""
    found: type[np.generic] = np.uint16 if dtype == trt.bfloat16 else trt.nptype(dtype)
    return found
