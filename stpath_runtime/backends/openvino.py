"""OpenVINO, on CPUs: float32, or bfloat16 where the CPU computes in it (AMX, AVX-512-BF16).

Both run the graphs of a float32 engine; OpenVINO rounds what enters a product. Three things stay as they are, or it
would err more than PyTorch does in bfloat16 (measured on the trained demo model, 12,000 spots: 7.9e-3 of the embedding,
PyTorch 4.1e-3, so 2.7e-3):

- Positions. bfloat16 has 8 bits: two spots 0.3 apart near 100 become one. Distances are taken of whole numbers,
  coordinates times 2^24, whose differences are exact, and then rounded.
- STFlow's edges, whose pixels are thousands.
- The head. Genes that hardly vary over the spots vary less than bfloat16 rounds.

k and v, which a product in bfloat16 gives, pass between the stages as the bits that they are (`KV_DTYPES`): no number
changes, and half the bytes move. x stays in float32.

Source: https://docs.openvino.ai/2026/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import Arrays
from ..encoding.sizes import MOST_ROWS
from ..errors import BackendError, DeviceError, InstallError, OutputError
from ..files import link_or_copy, written_whole
from ..machine import available_on_host
from ..manifest import ENCODER_GRAPH, WEIGHTS, manifest_path
from .workspace import HostWorkspace, require_open

if TYPE_CHECKING:
    import openvino

HINTS = {"fp32": "f32", "bf16": "bf16"}  # OpenVINO's names of the precisions
POSITIONS = ("coords", "key_coords")
STEPS = 2.0**24  # in one unit of normalised coordinates: 100 of them are below 2^31
SUBTRACTIONS = 2  # of positions, along x and along y, in a block
IN_FLOAT32 = ("head", "edges_")  # begin the names of graphs that are so whatever the precision
# One table of all genes each, or gigabytes of a tile encoder: read back no faster than compiled.
NOT_CACHED = ("head", "tokens", ENCODER_GRAPH)
OLDEST = (2026, 3)  # 2026.2 gives wrong numbers of ONNX Attention, without an error; 2026.0 does not know it
DIGEST = 32  # bytes of SHA-256 before a cached graph
_STARTING = threading.Lock()


class OpenVinoBackend:
    """Runs graphs with OpenVINO on the CPU; a graph is compiled when it is first run, or read from the engine's cache.

    Calls may come from several threads: each has a request of its own.

    Parameters
    ----------
    engine
        An engine directory, float32. Compiled graphs are kept in its folder `cache`, where that can be written.
    device
        "cpu".
    precision
        "fp32" or "bf16".

    Raises
    ------
    InputError
        If OpenVINO is not installed, the device is not the CPU, or the CPU lacks the precision.
    """

    name = "openvino"
    device = "cpu"
    most_rows = MOST_ROWS
    tiles_at_once = 1  # two, with a thread each, are slower (NUM_STREAMS)
    keeps_tiles = True  # release_memory() frees nothing of what dynamic shapes took

    def __init__(self, engine: Path, device: str, precision: str) -> None:
        if device != "cpu":
            raise DeviceError(f"device {device}: the backend openvino runs on the CPU; give --device cpu")
        self._ov = _import_openvino()
        self._core = process_core()
        if precision not in HINTS:
            raise BackendError(f"precision {precision}: the backend openvino has {' and '.join(HINTS)}")
        if precision == "bf16" and "BF16" not in self.capabilities():
            raise BackendError(
                "precision bf16: this CPU has neither AMX nor AVX-512-BF16, as OpenVINO reports; give --precision fp32"
            )
        self._engine, self._precision = engine, precision
        self._graphs: dict[str, openvino.CompiledModel] = {}
        self._latest = ""  # the graph that was run last
        self._loading = threading.Lock()
        self._closed = False
        self._unlinked: TemporaryDirectory[str] | None = None

    def capabilities(self) -> list[str]:
        """What OpenVINO says that this CPU computes in, such as FP32 and BF16."""
        found: list[str] = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return found

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        with self._loading:
            require_open(self._closed, self._engine)
            if graph not in self._graphs:
                self._graphs[graph] = self._load(graph)
            if self._latest not in ("", graph):  # each graph would keep the scores of its largest tile
                with suppress(RuntimeError):  # another thread is running it
                    self._graphs[self._latest].release_memory()
            self._latest = graph
        request = self._graphs[graph].create_infer_request()
        given = {name: self._tensor(graph, name, array) for name, array in inputs.items()}
        outputs = request.infer(given, share_inputs=True, share_outputs=True)  # no copies: the request is ours alone
        return [_bits(array) for array in outputs.values()]

    def workspace(self) -> AbstractContextManager[HostWorkspace]:
        """Host memory, for any number of threads."""
        return nullcontext(HostWorkspace(self.run))

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        return available_on_host()

    def close(self) -> None:
        """Free the compiled graphs."""
        with self._loading:
            self._closed = True
            self._graphs.clear()
            if self._unlinked is not None:
                self._unlinked.cleanup()

    def _tensor(self, graph: str, name: str, array: npt.NDArray[Any]) -> openvino.Tensor:
        array = np.require(array, requirements=("C", "W"))  # memory that is shared must be one that can be written
        if array.dtype == np.uint16:  # the bits of bfloat16
            return self._ov.Tensor(array, self._ov.Shape(array.shape), self._ov.Type.bf16)
        if name in POSITIONS and self._reduced(graph):
            array = np.rint(array.astype(np.float64) * STEPS).astype(np.int32)
        return self._ov.Tensor(array, shared_memory=True)

    def _reduced(self, graph: str) -> bool:
        return self._precision != "fp32" and not graph.startswith(IN_FLOAT32)

    def _load(self, graph: str) -> openvino.CompiledModel:
        hint = HINTS[self._precision if self._reduced(graph) else "fp32"]
        # One stream: a tile takes all cores. The precision is always given: with AMX OpenVINO takes bfloat16 by itself.
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        kept = self._cached(graph, options)
        compiled = self._read(kept, options)
        if compiled is None:
            path = self._engine / f"{graph}.onnx"
            try:
                model = self._core.read_model(self._readable(path))
                if self._reduced(graph):
                    model = self._reduce(model)
                compiled = self._core.compile_model(model, "CPU", options)
            except RuntimeError as error:
                raise BackendError(f"{path}: OpenVINO cannot run it: {_last_line(error)}") from error
            _keep(kept, compiled)
        running = compiled.get_property("INFERENCE_PRECISION_HINT")
        if running != getattr(self._ov.Type, hint):
            raise BackendError(
                f"precision {self._precision}: OpenVINO chose {running} for {graph}; give --precision fp32"
            )
        return compiled

    def _readable(self, path: Path) -> Path:
        """A graph where OpenVINO reads it: it refuses weights that a link takes out of the folder, as the Hub's do."""
        weights = path.with_name(WEIGHTS)
        if not path.is_symlink() and not weights.is_symlink():
            return path
        if self._unlinked is None:
            self._unlinked = TemporaryDirectory(prefix="stpath-")
            link_or_copy(weights, Path(self._unlinked.name) / WEIGHTS)
        plain = Path(self._unlinked.name) / path.name
        link_or_copy(path, plain)
        return plain

    def _reduce(self, model: openvino.Model) -> openvino.Model:
        """Positions as whole numbers, and k and v in bfloat16, in a graph that is to run in bfloat16."""
        positions = [end for end in model.get_parameters() if end.get_friendly_name() in POSITIONS]
        if positions:
            _subtract_whole_numbers(model, positions, self._ov)
        steps = self._ov.preprocess.PrePostProcessor(model)
        for end in model.inputs:
            if end.any_name in ("k", "v"):
                steps.input(end.any_name).tensor().set_element_type(self._ov.Type.bf16)
        for end in model.outputs:
            if end.any_name in ("k", "v", "k_next", "v_next"):
                steps.output(end.any_name).tensor().set_element_type(self._ov.Type.bf16)
        built: openvino.Model = steps.build()
        return built

    def _cached(self, graph: str, options: dict[str, str]) -> Path | None:
        """Where a compiled graph is kept: under all that it depends on."""
        if graph in NOT_CACHED:
            return None
        cpu = (self._core.get_property("CPU", "FULL_DEVICE_NAME"), *self.capabilities(), os.cpu_count())
        facts = (cpu, self._precision, *options.items(), hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
        key = hashlib.sha256(repr(facts).encode() + manifest_path(self._engine).read_bytes()).hexdigest()[:16]
        version = self._ov.__version__.split("-")[0]
        return self._engine / "cache" / f"openvino-{version}" / f"{graph}.{self._precision}.{key}"

    def _read(self, kept: Path | None, options: dict[str, str]) -> openvino.CompiledModel | None:
        """A compiled graph, if there is one that is whole: OpenVINO itself would run an altered one."""
        if kept is None or not kept.is_file():
            return None
        content = kept.read_bytes()
        if hashlib.sha256(content[DIGEST:]).digest() != content[:DIGEST]:
            return None
        try:
            return self._core.import_model(BytesIO(content[DIGEST:]), "CPU", options)
        except RuntimeError:  # of an OpenVINO that calls itself the same
            return None


def _keep(kept: Path | None, compiled: openvino.CompiledModel) -> None:
    """Keep a compiled graph, whole or not at all; an engine that cannot be written, or a full disk, does without."""
    if kept is None:
        return
    with suppress(OSError, OutputError), written_whole(kept) as partial:
        content = compiled.export_model().getvalue()
        partial.write_bytes(hashlib.sha256(content).digest() + content)


def _subtract_whole_numbers(model: openvino.Model, positions: list[Any], ov: Any) -> None:
    """Let a graph take positions in whole numbers of 1 / STEPS, and subtract those."""
    from openvino import opset13

    for end in positions:
        end.set_element_type(ov.Type.i32)
    whole = {end.get_name() for end in positions}
    found = 0
    for node in model.get_ordered_ops():
        if any(given.get_source_output().get_node().get_name() in whole for given in node.inputs()):
            if node.get_type_name() != "Subtract":  # picks and shapes of positions
                whole.add(node.get_name())
                continue
            takers = node.output(0).get_target_inputs()
            difference = opset13.multiply(opset13.convert(node, "f32"), np.float32(1 / STEPS))
            for taker in takers:
                taker.replace_source_output(difference.output(0))
            found += 1
    if found == 0 or found % SUBTRACTIONS:
        raise BackendError("this OpenVINO reads distances in a way that is not known here; give --precision fp32")
    model.validate_nodes_and_infer_types()


def _bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """OpenVINO gives bfloat16 as NumPy's float16, which it is not: its bits."""
    return array.view(np.uint16) if array.dtype == np.float16 else array


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise InstallError("OpenVINO is not installed; run: pip install 'stpath-engine[openvino]'") from error
    if tuple(int(part) for part in openvino.__version__.split(".")[:2]) < OLDEST:
        raise InstallError(
            f"OpenVINO {openvino.__version__} computes attention wrong or not at all; run: pip install 'openvino>="
            f"{OLDEST[0]}.{OLDEST[1]}'"
        )
    return openvino


def process_core() -> openvino.Core:
    """The one Core of this process, which is never freed: for all engines, in all threads.

    A Core gives the thread that starts it a stack for signal handlers (sigaltstack), and unmaps it when it is freed. Of
    several, or freed by another thread, the thread is left with a stack that is gone, and its next signal, such as
    Ctrl-C or the end of a child process, is a segmentation fault.

    Source: `SigAltStackSetup` in https://github.com/openvinotoolkit/openvino/pull/11894.
    """
    with _STARTING:
        return _started()


@cache
def _started() -> openvino.Core:
    core: openvino.Core = _import_openvino().Core()
    return core


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
