"""ONNX Runtime, on the CPU or an NVIDIA GPU."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DeviceError, InstallError
from ..memory import available_on_gpu, available_on_host
from . import Arrays, installed

PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # that write one folder


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime; a graph is loaded when it is first run.

    Raises
    ------
    InputError
        If ONNX Runtime is not installed, or both of its packages are, the device is not one of "cpu", "cuda" and
        "cuda:N", or its provider is not the one that runs.
    """

    name = "onnxruntime"

    def __init__(self, engine: Path, device: str) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise InstallError(
                "ONNX Runtime is not installed; run: pip install 'stpath-engine[cpu]' (or [gpu], never both)"
            ) from error
        if both := [found for package in PACKAGES if (found := installed(package)) is not None][1:]:
            raise InstallError(
                f"both {' and '.join(PACKAGES)} ({both[0]}) are installed, over each other; run: pip uninstall -y "
                f"{' '.join(PACKAGES)} && pip install 'stpath-engine[cpu]' (or [gpu], never both)"
            )
        self._ort = onnxruntime
        self._engine = engine
        self.device = "cuda:0" if device == "cuda" else device
        self._provider, self._provider_options = self._find_provider()
        self._sessions: dict[str, Any] = {}
        _share_host_memory(onnxruntime)

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        if graph not in self._sessions:
            self._sessions[graph] = self._load(graph)
        outputs: list[npt.NDArray[np.generic]] = self._sessions[graph].run(None, dict(inputs))
        return outputs

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        return available_on_host() if self.device == "cpu" else available_on_gpu(self.device.removeprefix("cuda:"))

    def _find_provider(self) -> tuple[str, dict[str, str]]:
        if self.device == "cpu":
            return "CPUExecutionProvider", {}
        match = re.fullmatch(r"cuda:(\d+)", self.device)
        if match is None:
            raise DeviceError(f"unknown device {self.device!r} for ONNX Runtime; give cpu or cuda:N")
        if "CUDAExecutionProvider" not in self._ort.get_available_providers():
            raise InstallError(
                f"device {self.device}: the installed ONNX Runtime runs on the CPU only; run: pip uninstall "
                "onnxruntime && pip install 'stpath-engine[gpu]', or give device cpu"
            )
        return "CUDAExecutionProvider", {"device_id": match[1]}

    def _load(self, graph: str) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors
        options.add_session_config_entry("session.use_env_allocators", "1")
        if self._provider != "CPUExecutionProvider":
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        path = self._engine / f"{graph}.onnx"
        try:
            session = self._ort.InferenceSession(path, options, providers=[(self._provider, self._provider_options)])
        except Exception as error:  # ONNX Runtime's own exceptions share no base of their own
            raise BackendError(f"{path}: ONNX Runtime cannot run it on {self.device}: {_first_line(error)}") from error
        running = session.get_providers()[0]
        if running != self._provider:
            # ONNX Runtime falls back to the CPU with a mere log line when CUDA fails to start.
            raise DeviceError(
                f"device {self.device}: {self._provider} did not start, ONNX Runtime chose {running}; check the GPU "
                "driver and CUDA libraries, or give device cpu"
            )
        return session


@cache
def _share_host_memory(ort: ModuleType) -> None:
    """Let all sessions of the process take their memory from one arena; each would keep the largest tile in its own."""
    host = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = 1  # and not the next power of two
    ort.create_and_register_allocator(host, ort.OrtArenaCfg(0, as_requested, -1, -1))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
