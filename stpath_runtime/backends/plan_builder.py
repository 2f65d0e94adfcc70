"""Builds the TensorRT plans of an engine from its ONNX stages; see `stpath_runtime.backends.plans` for what is written.

The networks are strongly typed: every type is the one in the ONNX graph, so a plan has the precision of its engine.
Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/_static/python-api/.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256 as new_sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import InputError, OptionError, PlanError
from ..files import require_writable, written_whole
from ..manifest import WEIGHTS, EncoderManifest, FlowManifest, Manifest, read_manifest
from ..progress import OnTile
from .cuda import Gpu
from .plans import (
    FOLDER,
    LIBRARIES,
    SCHEMA,
    TIMING_CACHE,
    Plan,
    Plans,
    Range,
    check_plans,
    import_tensorrt,
    last_error,
    planned,
    plans_folder,
    quiet_logger,
)

STEPS = 100  # of progress, for a graph
# What is said of the time where no plans of the engine tell it.
EXPECTED = {
    "tensorrt": "minutes, perhaps: TensorRT measures kernels on the GPU; not measured for this model yet",
    "tensorrt_rtx": "about 10 s, by what the published sizes took on 2 CPU cores",
}


@dataclass(frozen=True)
class Build:
    """What is to be built, checked; make one with `Build.of`."""

    engine: Path
    manifest: Manifest | FlowManifest | EncoderManifest
    trt: ModuleType
    library: str
    target: str
    gpu: str  # its name; "" where it is built for a GPU of another machine
    max_spots: int
    ranges: dict[str, dict[str, Range]]  # graph -> input -> shapes

    @classmethod
    def of(cls, engine: Path, library: str, device: str, target: str | None, max_spots: int) -> Build:
        """Check an engine, TensorRT and the GPU before the work.

        Parameters
        ----------
        library
            "tensorrt" or "tensorrt_rtx".
        device
            "cuda:N", the GPU to build for, and with TensorRT on.
        target
            A generation of GPUs, such as "sm_89", to build for without one, with TensorRT-RTX; None means the device's.
        max_spots
            The largest slide that plans for global attention take.

        Raises
        ------
        InputError
            If one of them is not what it has to be, or is not there.
        """
        if library not in LIBRARIES:
            raise OptionError(f"--backend {library}: no plans are built for it; give {' or '.join(LIBRARIES)}")
        manifest = read_manifest(engine)
        ranges = planned(manifest, max_spots)
        manifest.check_files(engine)
        trt = import_tensorrt(library)
        chosen, gpu = _target(trt, library, device, target)
        return cls(engine, manifest, trt, library, chosen, gpu, max_spots, ranges)

    @property
    def folder(self) -> Path:
        """Where the plans go."""
        return plans_folder(self.engine, self.library, self.trt.__version__, self.target)

    def up_to_date(self) -> bool:
        """Whether whole plans of the same graphs and ranges are there."""
        try:
            plans = check_plans(self.engine, self.library, self.trt.__version__, self.target, "")
        except InputError:
            return False
        return all(plans.ranges(graph) == ranges for graph, ranges in self.ranges.items())

    def expected(self) -> str:
        """How long the build may take, and how that is known."""
        for path in sorted((self.engine / FOLDER).glob(f"{self.library}-*")):
            with contextlib.suppress(ValueError):
                earlier = Plans.read(path)
                return f"{earlier.seconds():,.0f} s the last time, for {earlier.target}"
        return EXPECTED[self.library]

    def run(self, on_step: OnTile | None = None) -> Plans:
        """Build the plans; their folder appears when all are built, and takes the place of an earlier one.

        Parameters
        ----------
        on_step
            Called with (done, total) as the work goes on; what it raises stops the build.

        Raises
        ------
        InputError
            If the engine's folder cannot be written, or TensorRT cannot build a graph.
        """
        require_writable(self.folder)
        try:
            with written_whole(self.folder) as partial:
                partial.mkdir()
                return self._build(partial, on_step)
        finally:
            with contextlib.suppress(OSError):  # it holds plans
                self.folder.parent.rmdir()

    def _build(self, folder: Path, on_step: OnTile | None) -> Plans:
        cache = TimingCache(self.library, self.folder / TIMING_CACHE)
        built, total = {}, STEPS * len(self.ranges)
        for i, (graph, ranges) in enumerate(self.ranges.items()):
            done = i * STEPS

            def tell(share: float, done: int = done) -> None:
                if on_step is not None:
                    on_step(done + int(share * STEPS), total)

            start = time.perf_counter()
            tell(0)
            plan = build_plan(self.trt, self.engine / f"{graph}.onnx", ranges, self.target, cache, tell)
            (folder / f"{graph}.plan").write_bytes(plan)
            tell(1)
            built[graph] = Plan(
                sha256=new_sha256(plan).hexdigest(),
                onnx=self.manifest.files[f"{graph}.onnx"],
                seconds=round(time.perf_counter() - start, 3),
                ranges={name: tuple(shapes) for name, shapes in ranges.items()},
            )
        if cache.data:
            (folder / TIMING_CACHE).write_bytes(cache.data)
        plans = Plans(
            schema=SCHEMA,
            library=self.library,
            version=self.trt.__version__,
            target=self.target,
            gpu=self.gpu,
            max_spots=self.max_spots,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            weights=self.manifest.files[WEIGHTS],
            plans=built,
        )
        plans.write(folder)
        return plans


class TimingCache:
    """TensorRT's timings of earlier builds, to be reused. TensorRT-RTX measures nothing."""

    def __init__(self, library: str, path: Path) -> None:
        self.used = library == "tensorrt"
        self.data = path.read_bytes() if self.used and path.is_file() else b""

    def give(self, config: Any) -> None:
        """Let a build use it."""
        if self.used:
            # One of another driver is refused, and leaves an empty one.
            cache = config.create_timing_cache(self.data)
            if not config.set_timing_cache(cache, ignore_mismatch=False):
                config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def take(self, config: Any) -> None:
        """Keep what a build measured."""
        if self.used:
            self.data = bytes(memoryview(config.get_timing_cache().serialize()))


def parse(trt: ModuleType, builder: Any, onnx: Path, log: Any) -> Any:
    """The network of an ONNX graph, strongly typed, its attention allowed in parts.

    Raises
    ------
    InputError
        If TensorRT cannot read the graph.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx)):
        raise PlanError(f"{onnx}: {_named(trt)} cannot read it: {parser.get_error(0).desc()}")
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # There is no fused kernel for float32, and without this no plan. Where there is one, it is used.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True
    return network


def build_plan(
    trt: ModuleType,
    onnx: Path,
    ranges: dict[str, Range],
    target: str,
    cache: TimingCache,
    tell: Callable[[float], None],
) -> bytes:
    """Build one plan.

    Parameters
    ----------
    ranges
        Input -> its least, usual and largest shape.
    target
        The generation of GPUs; TensorRT itself builds for the GPU in use.
    tell
        Called with the share that is done; what it raises stops the build.

    Raises
    ------
    InputError
        If TensorRT cannot read or build the graph.
    """
    log = quiet_logger(trt)
    builder = trt.Builder(log)
    network = parse(trt, builder, onnx, log)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    # TensorFloat-32 keeps 10 bits of a float32: an engine that was proven in float32 must not be run in it.
    config.clear_flag(trt.BuilderFlag.TF32)
    if trt.__name__ == "tensorrt_rtx":
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[target.replace("sm_", "SM")], 0)
    for name, shapes in ranges.items():
        profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    cache.give(config)
    with _signals_wait() as waiting:
        monitor = config.progress_monitor = new_monitor(trt, tell, waiting)
        plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise PlanError(f"{onnx}: {_named(trt)} cannot build it: {last_error(log)}")
    cache.take(config)
    return bytes(memoryview(plan))


@contextlib.contextmanager
def _signals_wait() -> Iterator[list[int]]:
    """Collect Ctrl-C and other signals until the block ends: an exception inside TensorRT's callback would be lost."""
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield waiting  # signals go to the main thread
        return
    kept = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda number, frame: waiting.append(number)) for number in kept}
    try:
        yield waiting
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for caught in waiting:
            signal.raise_signal(caught)


def new_monitor(trt: ModuleType, tell: Callable[[float], None], waiting: Sequence[int] = ()) -> Any:
    """What TensorRT reports its progress to: the outermost phase counts.

    The build stops when `tell` raises, which is kept as `stopped`, or a signal is waiting.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outermost, self.steps = "", 1
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.outermost, self.steps = phase_name, num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                if phase_name == self.outermost:
                    tell(min(1, (step + 1) / self.steps))
            except BaseException as error:  # nothing may be raised through TensorRT
                self.stopped = error
            return self.stopped is None and not waiting

        def phase_finish(self, phase_name: str) -> None: ...

    return Monitor()


def _target(trt: ModuleType, library: str, device: str, target: str | None) -> tuple[str, str]:
    """The generation of GPUs to build for, and the name of the GPU that is built on."""
    if target is None:
        try:
            gpu = Gpu(device)
        except InputError as error:
            without = "; or give --target sm_89, to build for a GPU of another machine"
            raise type(error)(f"{error}{without if library == 'tensorrt_rtx' else ''}") from error
        target, name = gpu.target, gpu.name
    elif library == "tensorrt":
        raise OptionError(f"--target {target}: TensorRT builds for the GPU that it runs on; build there, with --device")
    else:
        name = ""
    if library == "tensorrt_rtx":
        known = [f"sm_{each[2:]}" for each in trt.ComputeCapability.__members__ if each.startswith("SM")]
        if target not in known:
            raise OptionError(
                f"{target}{f' ({name})' if name else ''}: {_named(trt)} builds for {', '.join(known)}; "
                "for other GPUs build with --backend tensorrt"
            )
    return target, name


def _named(trt: ModuleType) -> str:
    return f"{LIBRARIES[trt.__name__]} {trt.__version__}"
