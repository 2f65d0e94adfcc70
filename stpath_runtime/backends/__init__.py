"""Backends, which run the graphs of an engine: one small file each, behind one Protocol."""

from __future__ import annotations

from pathlib import Path

from ..encoding.backend import Backend
from ..errors import BackendError
from ..manifest import PRECISIONS, is_encoder

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt_rtx")


def open_backend(name: str, engine: Path, device: str, stored: str = "fp32", precision: str | None = None) -> Backend:
    """Open an engine's graphs with exactly this backend, device and precision.

    Parameters
    ----------
    stored
        The engine's own precision: the type of its weights.
    precision
        What to compute in; None means the engine's own.

    Raises
    ------
    InputError
        If the backend is unknown or not installed, the device is not there, or either lacks the precision.
    """
    if precision is not None and precision not in PRECISIONS:
        raise BackendError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if name == "openvino":
        from .openvino import OpenVinoBackend

        bf16 = (stored, precision or stored) == ("bf16", "bf16") and is_encoder(engine)  # whose graph OpenVINO reads
        if stored != "fp32" and not bf16:
            raise BackendError(
                f"{engine}: an {stored} engine; the backend openvino takes fp32 engines only, and rounds by itself: "
                "export one with --precision fp32, then give --precision bf16"
            )
        return OpenVinoBackend(engine, device, precision or stored)
    if precision not in (None, stored) and name in BACKENDS:
        raise BackendError(
            f"precision {precision}: the backend {name} computes in the engine's own, {stored}; "
            + ("give --backend openvino" if precision == "bf16" else f"export an engine with --precision {precision}")
        )
    if (name, device, stored) == ("onnxruntime", "cpu", "bf16") and is_encoder(engine):
        raise BackendError(
            f"{engine}: a bf16 encoder; ONNX Runtime computes in bfloat16 on GPUs only: give --backend openvino on a "
            "CPU that has it, or --device cuda:0"
        )
    if (name, device, stored) == ("onnxruntime", "cpu", "bf16"):
        raise BackendError(
            f"{engine}: a bf16 engine; ONNX Runtime computes in bfloat16 on GPUs only: give --device cuda:0, or "
            "export one with --precision fp32 and give --backend openvino --precision bf16"
        )
    if name == "onnxruntime" and device == "cpu":
        from .onnxruntime import OnnxRuntimeBackend

        return OnnxRuntimeBackend(engine)
    if name == "onnxruntime":
        from .onnxruntime_cuda import OnnxRuntimeCudaBackend

        return OnnxRuntimeCudaBackend(engine, device)
    if name in ("tensorrt", "tensorrt_rtx"):
        from .tensorrt import TensorRtBackend

        return TensorRtBackend(engine, device, name)
    raise BackendError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
