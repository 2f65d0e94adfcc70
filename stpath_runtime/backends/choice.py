"""`--backend auto`: the first backend, in a fixed order, that can run an engine on a device in a precision."""

from __future__ import annotations

from pathlib import Path

from ..errors import BackendError, InputError
from ..manifest import read_manifest
from . import BACKENDS, open_backend

AUTO = "auto"
# The fastest first on a GPU. On a CPU the one that engines are proven with when they are exported; then OpenVINO, where
# bfloat16 is asked for or ONNX Runtime is not installed.
ORDER = {"cuda": ("tensorrt", "tensorrt_rtx", "onnxruntime"), "cpu": ("onnxruntime", "openvino")}


def choose_backend(engine: Path, device: str, precision: str | None) -> tuple[str, str]:
    """The backend to take, and one line that says which and why; the same on every call on one machine.

    Parameters
    ----------
    device, precision
        As for `Engine.load`. Neither is chosen here: a precision below the engine's own changes numbers.

    Raises
    ------
    InputError
        If no backend can run the engine so; the message says of each why not.
    """
    manifest = read_manifest(engine)
    what = f"{precision or manifest.precision} on {device}"
    against: list[str] = []
    for name in ORDER.get(device.partition(":")[0], BACKENDS):
        try:
            open_backend(name, engine, device, manifest.precision, precision)
        except InputError as error:
            against.append(f"{name}: {error}")
            continue
        proven = manifest.parity.get("backend") == f"{name} on {device}" and precision in (None, manifest.precision)
        why = "the engine was proven so" if proven else "stpath verify proves it"
        passed_over = [f"not {reason.split(';')[0]}" for reason in against]
        return name, f"backend auto: {name}, {what} ({'; '.join([why, *passed_over])})"
    raise BackendError(f"backend auto: none runs {what}; " + "; ".join(against))
