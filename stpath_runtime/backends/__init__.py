"""What runs the graphs of an engine: one small file a backend, behind one Protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import InputError

Arrays = Mapping[str, npt.NDArray[np.generic]]
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")


class Backend(Protocol):
    """Runs the graphs of one engine on one device."""

    name: str  # as in BACKENDS
    device: str  # "cpu" or "cuda:N"

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        ...

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        ...


def open_backend(name: str, engine: Path, device: str) -> Backend:
    """Open an engine's graphs with the backend and on the device that are asked for, and no other.

    Raises
    ------
    InputError
        If the backend is unknown or not installed, or the device is not there.
    """
    if name == "onnxruntime":
        from .onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(engine, device)
    if name in ("tensorrt", "tensorrt_rtx"):
        from .tensorrt import TensorRtBackend

        return TensorRtBackend(engine, device, name)
    raise InputError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
