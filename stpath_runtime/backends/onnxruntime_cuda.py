"""ONNX Runtime on an NVIDIA GPU: graphs are queued in one stream, on arrays that stay on the GPU.

CUDA graphs are not used: a recording is tied to its memory, which the graphs of an engine share; otherwise each would
keep the scores of its largest tile.

Source: https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html and
https://onnxruntime.ai/docs/performance/tune-performance/iobinding.html.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import Arrays
from ..encoding.sizes import MOST_ROWS
from ..errors import DeviceError, InstallError, first_line
from .cuda import DeviceArray, Gpu
from .onnxruntime import OnnxRuntimeBackend, is_out_of_memory
from .workspace import GpuWorkspace, gpu_workspace

BFLOAT16 = 16  # in onnx.TensorProto.DataType
_ARENA: Counter[int] = Counter()  # bytes that the arena of each GPU has taken; it gives none back


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    """Runs graphs with ONNX Runtime's CUDA provider, and never falls back to the CPU.

    Raises
    ------
    InputError
        If ONNX Runtime or its provider is not installed, the device is no "cuda:N" or not there, or the provider does
        not start.
    """

    # A kernel of a small tile ends before the next can be queued.
    most_rows = 8 * MOST_ROWS
    provider = "CUDAExecutionProvider"

    def __init__(self, engine: Path, device: str) -> None:
        if not re.fullmatch(r"cuda(:\d+)?", device):
            raise DeviceError(f"unknown device {device!r} for ONNX Runtime; give cpu or cuda:N")
        super().__init__(engine)
        self.tiles_at_once = 1
        if self.provider not in self._ort.get_available_providers():
            raise InstallError(
                f"device {device}: the installed ONNX Runtime runs on the CPU only; run: pip uninstall "
                "onnxruntime && pip install 'stpath-engine[gpu]', or give device cpu"
            )
        self._gpu = Gpu(device)
        self.device = self._gpu.device
        self._missing = _preload_libraries(self._ort)  # before anything of the provider is loaded
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
        """Bytes available: free on the GPU, plus what ONNX Runtime's arena holds for reuse."""
        return self._gpu.free_memory() + _ARENA[self._gpu.index]

    def close(self) -> None:
        """Free the sessions, and what they and the engine hold on the GPU."""
        with self._gpu.alone:
            super().close()
            self._gpu.close()

    def _launch(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        session, free = self._session(graph), self._gpu.unused_memory()
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_input(name, "cuda", self._gpu.index, _type(array), array.shape, array.address)
        for name, array in outputs.items():
            binding.bind_output(name, "cuda", self._gpu.index, _type(array), array.shape, array.address)
        try:
            session.run_with_iobinding(binding, self._queued)
        except Exception as error:  # ONNX Runtime's own exceptions share no base of their own
            self._require_memory(error, graph)
            raise
        _ARENA[self._gpu.index] += max(0, free - self._gpu.unused_memory())

    def _options(self) -> tuple[Any, dict[str, str]]:
        options, _ = super()._options()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        # Weights stay for as long as the session; the arena is what tiles use again.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        return options, {
            "device_id": str(self._gpu.index),
            "user_compute_stream": str(self._gpu.stream),
            "use_tf32": "0",  # float32 is float32
        }

    def _load(self, graph: str) -> Any:
        session = super()._load(graph)
        running = session.get_providers()[0]
        if running != self.provider:  # ONNX Runtime only logs that it leaves out a provider
            raise self._not_started(f"ONNX Runtime chose {running}")
        return session

    def _failed_start(self, path: Path, error: Exception) -> Exception:
        return super()._failed_start(path, error) if is_out_of_memory(error) else self._not_started(first_line(error))

    def _not_started(self, why: str) -> DeviceError:
        missing = f"; {self._missing}" if self._missing else ""
        return DeviceError(
            f"device {self.device}: {self.provider} did not start ({why}{missing}); check the GPU's driver, run pip "
            "install 'stpath-engine[gpu]' for CUDA's libraries, or give device cpu"
        )


def _type(array: DeviceArray) -> np.dtype[Any] | int:
    """The type of an array as ONNX Runtime takes it: bfloat16, which is bits to NumPy, by its number in ONNX."""
    return BFLOAT16 if array.dtype == np.uint16 else array.dtype


@cache
def _preload_libraries(ort: ModuleType) -> str:
    """Load CUDA's libraries from where pip installs them; returns what ONNX Runtime prints about missing ones."""
    said = StringIO()
    with redirect_stdout(said):
        ort.preload_dlls()
    return "; ".join(line for line in said.getvalue().splitlines() if line.startswith("Failed"))[:300]


@cache
def _share_gpu_memory(ort: ModuleType, index: int) -> None:
    """Let all sessions share one arena on a GPU."""
    gpu = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, index, ort.OrtMemType.DEFAULT)
    as_requested = 1  # and not the next power of two
    arena = ort.OrtArenaCfg(0, as_requested, -1, -1)
    ort.create_and_register_allocator_v2("CUDAExecutionProvider", gpu, {"device_id": str(index)}, arena)
