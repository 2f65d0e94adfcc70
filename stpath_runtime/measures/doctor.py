"""What each backend needs on this machine, what it finds, and whether those that work agree on an engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import BackendError, InputError, InputWarning, ParityError
from ..machine import cores, cpu_features, installed, nvidia_gpus
from ..manifest import is_encoder, read_manifest
from ..progress import report_console
from .agreement import relative_l2

SPOTS, KNN = 300, 8  # spots of the slide that backends are compared on
TILES = 3  # of noise, on which those of a tile encoder are compared
BARS = {
    "fp32": 2e-5,
    "fp16": 2e-2,
    "bf16": 5e-2,
}  # both sides have errors: 1e-5 in float32; roundings to 11 and 8 bits add up


@dataclass(frozen=True)
class Way:
    """A way to run an engine: a backend, on a device, in a precision."""

    backend: str
    device: str
    precision: str | None  # None: the engine's own
    package: str  # on the package index
    extra: str  # of stpath-engine
    needs: str


WAYS = (
    Way("onnxruntime", "cpu", None, "onnxruntime", "cpu", "any CPU"),
    Way("onnxruntime", "cuda:0", None, "onnxruntime-gpu", "gpu", "an NVIDIA GPU"),
    Way("openvino", "cpu", "fp32", "openvino", "openvino", "any CPU"),
    Way("openvino", "cpu", "bf16", "openvino", "openvino", "a CPU with AMX or AVX-512-BF16"),
    Way("tensorrt", "cuda:0", None, "tensorrt", "tensorrt", "an NVIDIA GPU; stpath build"),
    Way("tensorrt_rtx", "cuda:0", None, "tensorrt-rtx-cu13", "tensorrt-rtx", "an NVIDIA RTX GPU; stpath build"),
)
DEFAULT = WAYS[0]


def examine(engine: Path | None) -> None:
    """Print what each backend needs and finds here and, with an engine, how far the results of those that work differ.

    Without PyTorch, backends are compared with ONNX Runtime on the CPU. `stpath verify` proves them against PyTorch.

    Raises
    ------
    InputError
        If the default backend, ONNX Runtime on the CPU, does not work.
    ParityError
        If a backend's results differ by more than its precision allows.
    """
    if engine is not None:
        read_manifest(engine).check_files(engine)
    gpus = nvidia_gpus()
    faults = {way: fault_of(way, gpus, engine) for way in WAYS}
    differs = compare(engine, [way for way in WAYS if faults[way] is None]) if engine is not None else {}
    _print(gpus, faults, differs, engine)
    if (fault := faults[DEFAULT]) is not None:
        raise BackendError(f"the default backend does not work: {fault}")
    wrong = [f"{way.backend} {way.precision or ''}".strip() for way, (_, passed) in differs.items() if not passed]
    if wrong:
        raise ParityError(
            f"{', '.join(wrong)} differs from ONNX Runtime on the CPU by more than rounding; do not use it"
        )


def compare(engine: Path, ways: list[Way]) -> dict[Way, tuple[float, bool]]:
    """How far each way is from ONNX Runtime on the CPU, and whether that is within BARS.

    By relative L2 of all genes on one random slide from a seed; of STPath the larger of global and kNN attention. Of a
    tile encoder by that of the features of a few tiles.
    """
    if DEFAULT not in ways:
        return {}
    exact = _expressions(engine, DEFAULT)
    found = {}
    for way in ways:
        pairs = zip(_expressions(engine, way), exact, strict=True)
        error = max(relative_l2(a, b) for a, b in pairs)
        bar = BARS[way.precision or read_manifest(engine).precision]
        found[way] = (error, error <= bar)  # NaN is not
    return found


def _expressions(engine: Path, way: Way) -> list[np.ndarray]:
    from ..engine import Engine
    from ..flow_engine import FlowEngine
    from ..images.encoder import TileEncoder, noise
    from ..slides.slide import Slide

    if is_encoder(engine):
        encoder = TileEncoder.load(engine, backend=way.backend, device=way.device, precision=way.precision)
        return [encoder(noise(TILES, encoder.size))]
    loaded = Engine.load(engine, backend=way.backend, device=way.device, precision=way.precision)
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(SPOTS), int(np.sqrt(SPOTS)))
    coords = np.stack([200 * column + 100 * (row % 2), 173 * row], axis=1)
    slide = Slide(coords, rng.standard_normal((SPOTS, loaded.manifest.model.n_features), np.float32))
    if isinstance(loaded, FlowEngine):
        return [np.asarray(loaded.predict(slide).X)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # that kNN may be an approximation is no matter here
        embeddings = (loaded.embed(slide, attention="global"), loaded.embed(slide, attention="knn", neighbors=KNN))
    return [loaded.decode(embedding) for embedding in embeddings]


def fault_of(way: Way, gpus: list[str], engine: Path | None) -> str | None:
    """Why this way does not work here; None if it does."""
    if way.device != "cpu" and not gpus:
        missing = "" if installed(way.package) else f", and {way.package} is not installed"
        return f"no NVIDIA GPU (its driver finds none){missing}"
    try:
        _openers()[way.backend](way)
        if engine is not None:
            from ..backends import open_backend

            open_backend(way.backend, engine, way.device, read_manifest(engine).precision, way.precision)
    except InputError as error:
        return str(error)
    return None


def _openers() -> dict[str, Callable[[Way], object]]:
    """What each backend can check without an engine."""
    from ..backends import open_backend
    from ..backends.cuda import Gpu
    from ..backends.plans import import_tensorrt

    def tensorrt(way: Way) -> object:
        return import_tensorrt(way.backend), Gpu(way.device)

    def graphs(way: Way) -> object:
        return open_backend(way.backend, Path(), way.device, precision=way.precision)

    return {"onnxruntime": graphs, "openvino": graphs, "tensorrt": tensorrt, "tensorrt_rtx": tensorrt}


def _print(
    gpus: list[str],
    faults: dict[Way, str | None],
    differs: dict[Way, tuple[float, bool]],
    engine: Path | None,
) -> None:
    from rich.table import Table

    console = report_console()
    console.print(f"CPU: {cores()} cores; {', '.join(cpu_features()) or 'no AVX2'}")
    console.print(f"GPU: {'; '.join(gpus) or 'none (by the driver)'}")
    table = Table("backend", "device", "precision", "needs", "installed", "differs by", "state", title="stpath doctor")
    for way, fault in faults.items():
        error, passed = differs.get(way, (None, True))
        state = "[red]WRONG[/]" if not passed else "[green]works[/]" if fault is None else fault.replace("[", r"\[")
        found = installed(way.package) or f"no: pip install 'stpath-engine\\[{way.extra}]'"
        names = (way.backend, way.device.split(":")[0], way.precision or "the engine's", way.needs, found)
        table.add_row(*names, "-" if error is None else f"{error:.1e}", state)
    console.print(table)
    if engine is not None and is_encoder(engine):
        console.print(
            f"Differs by: relative L2 of the features of {TILES} tiles of noise against ONNX Runtime on the CPU. The "
            "proof against timm: stpath verify ENCODER --checkpoint MODEL --backend ..."
        )
    elif engine is not None:
        console.print(
            f"Differs by: relative L2 of all genes against ONNX Runtime on the CPU, on a random slide of {SPOTS} spots "
            "from a seed; of STPath the larger of global and kNN attention. The proof against PyTorch: stpath verify "
            "ENGINE --backend ..."
        )
