"""ONNX Runtime on the CPU, and what its execution providers share."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import ON_ONE_THREAD, Arrays, Workspace
from ..encoding.sizes import MOST_ROWS
from ..errors import BackendError, InstallError, MemoryLimitError, first_line
from ..machine import available_on_host, cores, installed
from .workspace import HostWorkspace, require_open

OUT_OF_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc", "CUDA failure 2:", "out of memory")
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # which install into one folder


class OnnxRuntimeBackend:
    """Runs graphs with ONNX Runtime on the CPU; a graph is loaded when it is first run.

    Raises
    ------
    InputError
        If ONNX Runtime is not installed, or both of its packages are.
    """

    name = "onnxruntime"
    device = "cpu"
    most_rows = MOST_ROWS
    keeps_tiles = False  # all graphs share one arena
    provider = "CPUExecutionProvider"

    def __init__(self, engine: Path) -> None:
        self._ort = _import_onnxruntime()
        self._engine = engine
        self.tiles_at_once = cores()
        self._sessions: dict[str, Any] = {}
        self._loading = threading.Lock()
        self._closed = False
        _share_host_memory(self._ort)

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        session = self._session(graph)
        try:
            outputs: list[npt.NDArray[np.generic]] = session.run(None, dict(inputs))
        except Exception as error:  # ONNX Runtime's own exceptions share no base of their own
            self._require_memory(error, graph)
            raise
        return outputs

    def workspace(self) -> AbstractContextManager[Workspace]:
        """Host memory, for any number of threads."""
        return nullcontext(HostWorkspace(self.run))

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        return available_on_host()

    def close(self) -> None:
        """Free the sessions and their weights."""
        self._closed = True
        self._sessions.clear()

    def _require_memory(self, error: Exception, graph: str) -> None:
        """Raise MemoryLimitError if an error of a run means that memory ran out."""
        if is_out_of_memory(error):
            raise MemoryLimitError(
                f"{self.device}: not enough memory for a tile of {graph}; give less with --memory"
            ) from error

    def _options(self) -> tuple[Any, dict[str, str]]:
        """Of a session, and of its provider."""
        options = self._ort.SessionOptions()
        options.log_severity_level = 3  # errors
        # By a pattern of the first tile, the next would take all its memory in one piece, beside those of the first.
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Each graph has its own threads, and they run in turn: spinning threads of one would take the next one's cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options, {}

    def _session(self, graph: str) -> Any:
        require_open(self._closed, self._engine)
        with self._loading:  # once, whichever of the tiles at once comes first
            if graph not in self._sessions:
                self._sessions[graph] = self._load(graph)
            return self._sessions[graph]

    def _load(self, graph: str) -> Any:
        options, provider_options = self._options()
        if self.tiles_at_once > 1 and graph.startswith(ON_ONE_THREAD):
            options.intra_op_num_threads = 1  # no operator waits for the threads of another
        path = self._engine / f"{graph}.onnx"
        try:
            # No fallback: if the provider fails, ONNX Runtime's Python API would silently use the CPU.
            session = self._ort.InferenceSession(
                path, options, providers=[(self.provider, provider_options)], enable_fallback=0
            )
            session.disable_fallback()  # in a run, too
        except Exception as error:  # ONNX Runtime's own exceptions share no base of their own
            raise self._failed_start(path, error) from error
        return session

    def _failed_start(self, path: Path, error: Exception) -> Exception:
        """The error to raise if a session does not start."""
        if is_out_of_memory(error):
            return MemoryLimitError(f"{self.device}: not enough memory for the weights of {path}")
        return BackendError(f"{path}: ONNX Runtime cannot run it on {self.device}: {first_line(error)}")


def _import_onnxruntime() -> Any:
    """ONNX Runtime.

    Raises
    ------
    InputError
        If it is not installed, or both of its packages are.
    """
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
    return onnxruntime


@cache
def _share_host_memory(ort: ModuleType) -> None:
    """Let all sessions of the process share one arena; otherwise each would keep its largest tile in its own."""
    host = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    as_requested = 1  # grow by what is requested, not to the next power of two
    ort.create_and_register_allocator(host, ort.OrtArenaCfg(0, as_requested, -1, -1))


def is_out_of_memory(error: Exception) -> bool:
    """Whether ONNX Runtime ran out of memory: an allocation of C++, of its arena, or of CUDA.

    Only the first has its own exception type; the others are recognised by texts fixed in its sources.
    Source: https://github.com/microsoft/onnxruntime, core/framework/bfc_arena.cc and
    core/providers/cuda/cuda_call.cc.
    """
    if isinstance(error, MemoryError):
        return True
    ours = type(error).__module__.startswith("onnxruntime")
    return ours and any(words in str(error) for words in OUT_OF_MEMORY)
