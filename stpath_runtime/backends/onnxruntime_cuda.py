"""ONNX Runtime on an NVIDIA GPU: graphs are queued in one stream, on arrays that stay on the GPU.

CUDA graphs are not used: what they replay is tied to the memory that it was recorded on, and all graphs of an engine
share theirs, or each would keep the scores of its largest tile.

Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and
https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cuda import DeviceArray, Gpu
from ..errors import DeviceError, InstallError, MemoryLimitError
from . import ENOUGH_ROWS, Arrays
from .onnxruntime import OnnxRuntimeBackend
from .workspace import GpuWorkspace, gpu_workspace

BFLOAT16 = 16  # in onnx.TensorProto.DataType


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Runs graphs with ONNX Runtime's provider for CUDA, or not at all.

    Raises
    ------
    InputError
        If ONNX Runtime or its provider is not installed, the device is no "cuda:N" or not there, or the provider does
        not start.
    """

    # A kernel of a small tile ends sooner than the next can be queued.
    enough_rows = 8 * ENOUGH_ROWS
    provider = "CUDAExecutionProvider"

    def __init__(self, engine: Path, device: str) -> None:
        if not re.fullmatch(r"cuda(:\d+)?", device):
            raise DeviceError(f"unknown device {device!r} for ONNX Runtime; give cpu or cuda:N")
        super().__init__(engine)
        if self.provider not in self._ort.get_available_providers():
            raise InstallError(
                f"device {device}: the installed ONNX Runtime runs on the CPU only; run: pip uninstall "
                "onnxruntime && pip install 'stpath-engine[gpu]', or give device cpu"
            )
        self._gpu = Gpu(device)
        self.device = self._gpu.device
        _share_gpu_memory(self._ort, self._gpu.index)
        self._queued = self._ort.RunOptions()
        self._queued.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        with self._gpu.alone:
            return super().run(graph, inputs)

    def workspace(self) -> AbstractContextManager[GpuWorkspace]:
        """Memory of the GPU, for one thread at a time."""
        return gpu_workspace(self._gpu, self._launch)

    def available_memory(self) -> int:
        """Bytes that the GPU has to give."""
        return self._gpu.free_memory()

    def _launch(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        session = self._session(graph)
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", self._gpu.index, _type(array), array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", self._gpu.index, _type(array), array.shape, array.address)
        try:
            session.run_with_iobinding(binding, self._queued)
        except Exception as error:  # ONNX Runtime's own exceptions share no base of their own
            if "allocate" not in str(error):
                raise
            raise MemoryLimitError(
                f"{self.device}: not enough GPU memory for a tile of {graph}; give less with --memory"
            ) from error

    def _options(self) -> tuple[Any, dict[str, str]]:
        options, _ = super()._options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return options, {
            "device_id": str(self._gpu.index),
            "user_compute_stream": str(self._gpu.stream),
            "use_tf32": "0",  # float32 is float32
        }

    def _load(self, graph: str) -> Any:
        told = _preload_libraries(self._ort)
        session = super()._load(graph)
        running = session.get_providers()[0]
        if running != self.provider:
            # ONNX Runtime falls back to the CPU with a mere log line when CUDA fails to start.
            raise DeviceError(
                f"device {self.device}: {self.provider} did not start, ONNX Runtime chose {running}"
                f"{f' ({told})' if told else ''}; check the GPU's driver, run pip install 'stpath-engine[gpu]' for "
                "CUDA's libraries, or give device cpu"
            )
        return session


def _type(array: DeviceArray) -> np.dtype[Any] | int:
    """The type of an array as ONNX Runtime takes it: bfloat16, which is bits to NumPy, by its number in ONNX."""
    return BFLOAT16 if array.dtype == np.uint16 else array.dtype


@cache
def _preload_libraries(ort: ModuleType) -> str:
    """Load CUDA's libraries from where pip puts them; returns what ONNX Runtime says of those that it did not find."""
    said = StringIO()
    with redirect_stdout(said):
        ort.preload_dlls()
    return "; ".join(line for line in said.getvalue().splitlines() if line.startswith("Failed"))[:300]


@cache
def _share_gpu_memory(ort: ModuleType, index: int) -> None:
    """Let all sessions take their memory on a GPU from one arena."""
    gpu = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT)
    as_requested = 1  # and not the next power of two
    arena = ort.OrtArenaCfg(0, as_requested, -1, -1)
    ort.create_and_register_allocator_v2("CUDAExecutionProvider", gpu, {"device_id": str(index)}, arena)
