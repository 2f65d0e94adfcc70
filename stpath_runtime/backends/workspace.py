"""Workspaces: they hold x, k and v of a slide in the memory of the device that runs the stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..encoding.backend import Array, Arrays
from ..errors import BackendError
from .cuda import DeviceArray, Gpu


class HostWorkspace:
    """A workspace in host memory: arrays are NumPy's, and results are copied into them."""

    # A graph may copy or convert its inputs, so a tile is given only the rows that it needs.
    takes_all_keys = False

    def __init__(self, run: Callable[[str, Arrays], list[npt.NDArray[Any]]]) -> None:
        self._run = run

    def zeros(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array of zeros."""
        return np.zeros(shape, dtype)

    def keep(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array itself."""
        return array

    def run(self, graph: str, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run a graph, and copy its results."""
        for rows, values in zip(outputs.values(), self._run(graph, inputs), strict=True):
            rows[...] = values

    def put(self, values: npt.NDArray[Any], rows: npt.NDArray[Any]) -> None:
        """Write values to rows of an array."""
        rows[...] = values

    def fetch(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The array itself."""
        return array


Launch = Callable[[str, Mapping[str, DeviceArray], Mapping[str, DeviceArray]], None]


class GpuWorkspace:
    """A workspace on a GPU, reused by the next slide: features are uploaded once, the embedding is downloaded once.

    Parameters
    ----------
    launch
        Queues a graph in the GPU's stream: its name, inputs and outputs.
    """

    takes_all_keys = True

    def __init__(self, gpu: Gpu, launch: Launch) -> None:
        self._gpu, self._launch = gpu, launch

    def zeros(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """An array of zeros."""
        return self._gpu.zeros(f"kept {name}", shape, dtype)

    def keep(self, name: str, array: npt.NDArray[Any]) -> DeviceArray:
        """A copy of the array."""
        return self._gpu.upload(f"kept {name}", array)

    def run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, DeviceArray]) -> None:
        """Queue a graph; inputs that are not on the GPU are uploaded."""
        given = {
            name: array if isinstance(array, DeviceArray) else self._gpu.upload(name, array)
            for name, array in inputs.items()
        }
        # A graph may write before it has read everything, so outputs must not overlap its inputs.
        taken = [name for name, rows in outputs.items() if any(rows.overlaps(array) for array in given.values())]
        apart = {name: self._gpu.empty(name, outputs[name].shape, outputs[name].dtype) for name in taken}
        self._launch(graph, given, {**outputs, **apart})
        for name, array in apart.items():
            self._gpu.copy(array, outputs[name])

    def put(self, values: npt.NDArray[Any], rows: DeviceArray) -> None:
        """Queue a copy of the values to rows of an array."""
        self._gpu.copy(self._gpu.upload("put", values), rows)

    def fetch(self, array: DeviceArray) -> npt.NDArray[Any]:
        """The array in host memory, after all queued work is done."""
        found = self._gpu.download(array)
        self._gpu.synchronize()
        return found


@contextmanager
def gpu_workspace(gpu: Gpu, launch: Launch) -> Iterator[GpuWorkspace]:
    """The GPU's workspace, for one thread at a time."""
    with gpu.alone:
        gpu.use()
        yield GpuWorkspace(gpu, launch)


def require_open(closed: bool, engine: Path) -> None:
    """Check that a backend was not closed.

    Raises
    ------
    InputError
        If it was.
    """
    if closed:
        raise BackendError(f"{engine}: the engine was closed; load it again with Engine.load")
