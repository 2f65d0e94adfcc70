"""`--backend auto`: what `stpath bench` found to be the fastest here or, unmeasured, the first of a fixed order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import BackendError, InputError
from ..files import user_cache, written_whole
from ..machine import cores, cpu_name, installed, nvidia_gpus
from ..manifest import manifest_path, read_manifest
from . import BACKENDS, open_backend

AUTO = "auto"
# The fastest first on a GPU. On a CPU the one that engines are proven with when they are exported; then OpenVINO, where
# bfloat16 is asked for or ONNX Runtime is not installed.
ORDER = {"cuda": ("tensorrt", "tensorrt_rtx", "onnxruntime"), "cpu": ("onnxruntime", "openvino")}
WORTH = 0.95  # of the first backend's seconds: what is not below this is no reason for another backend
LIBRARIES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")


def choose_backend(engine: Path, device: str, precision: str | None) -> tuple[str, str]:
    """The backend to take, and one line that says which and why; the same until `stpath bench` measures anew.

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
    names = ORDER.get(device.partition(":")[0], tuple(BACKENDS))
    measured = kept_seconds(engine, device, precision or manifest.precision)
    first = next((name for name in names if name in measured), None)
    fastest = _fastest(first, measured)
    against: list[str] = []
    for name in sorted(names, key=lambda name: name != fastest):
        try:
            open_backend(name, engine, device, manifest.precision, precision)
        except InputError as error:
            against.append(f"{name}: {error}")
            continue
        proven = manifest.parity.get("backend") == f"{name} on {device}" and precision in (None, manifest.precision)
        why = ["the engine was proven so" if proven else "stpath verify proves it"]
        if name == fastest:
            ratio = measured[fastest] / measured[str(first)]
            why.append(f"stpath bench measured {ratio:.2f} times the seconds of {first} here")
        passed_over = [f"not {reason.split(';')[0]}" for reason in against]
        return name, f"backend auto: {name}, {what} ({'; '.join([*why, *passed_over])})"
    raise BackendError(f"backend auto: none runs {what}; " + "; ".join(against))


def keep_seconds(engine: Path, device: str, precision: str, seconds: Mapping[str, float]) -> None:
    """Keep what backends took for the same work here, for `choose_backend`; without a cache that can be written, not.

    Parameters
    ----------
    seconds
        By the name of the backend; measured in turn, in one run.
    """
    if (path := _kept_at(engine, device, precision)) is not None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                partial.write_text(json.dumps(dict(seconds)))


def kept_seconds(engine: Path, device: str, precision: str) -> dict[str, float]:
    """What `keep_seconds` kept on this machine, with these libraries; empty where there is nothing."""
    path = _kept_at(engine, device, precision)
    with suppress(OSError, ValueError):
        found = json.loads(path.read_text()) if path is not None else {}
        if isinstance(found, dict) and all(type(each) is float and each > 0 for each in found.values()):
            return found
    return {}


def _kept_at(engine: Path, device: str, precision: str) -> Path | None:
    """The file for this engine, machine and libraries: where one of them is another, the seconds would be, too."""
    if (cache := user_cache()) is None:
        return None
    manifest = manifest_path(engine).read_bytes()
    hardware = (cpu_name(), cores(), nvidia_gpus() if device.startswith("cuda") else [])
    facts = (hashlib.sha256(manifest).digest(), device, precision, hardware, [installed(name) for name in LIBRARIES])
    return cache / "seconds" / hashlib.sha256(repr(facts).encode()).hexdigest()


def _fastest(first: str | None, measured: Mapping[str, float]) -> str | None:
    """The backend that is worth leaving the order for, whose first among those measured is `first`; None if none is."""
    if first is None:
        return None
    fastest = min(measured, key=lambda name: measured[name])
    return fastest if measured[fastest] < WORTH * measured[first] else None
