"""What the encoder needs of a backend: to run an engine's graphs, and to hold a slide's arrays meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# They begin the names of the graphs of which several tiles run at once.
ON_ONE_THREAD = ("embed", "block_", "knn_block_", "image", "edges_", "layer_")
Array = Any  # NumPy's, or one in the memory of a device; rows of it are taken by slices
Arrays = Mapping[str, npt.NDArray[np.generic]]


class Workspace(Protocol):
    """Arrays of one slide by name, and what runs graphs on them."""

    takes_all_keys: bool  # tiles are given k and v of all rows, because selecting rows would cost a copy

    def zeros(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An array of zeros, to be written by `run`."""
        ...

    def keep(self, name: str, array: npt.NDArray[Any]) -> Any:
        """The array as `run` takes it, in the memory of the device; for inputs that several calls share."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Any]) -> None:
        """Run a graph and write its outputs, by name, to rows of arrays; those rows may be among its inputs."""
        ...

    def put(self, values: npt.NDArray[Any], rows: Any) -> None:
        """Write values to rows of an array."""
        ...

    def fetch(self, array: Any) -> npt.NDArray[Any]:
        """The array, in host memory."""
        ...


class Backend(Protocol):
    """Runs the graphs of one engine on one device."""

    name: str  #: as in BACKENDS
    device: str  #: "cpu" or "cuda:N"
    most_rows: int  #: in all tiles that run at once: more do not make the device busier
    tiles_at_once: int  #: of a stage, each on a thread of its own
    keeps_tiles: bool  #: whether each graph keeps the memory of its largest tile for as long as it is loaded

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        ...

    def workspace(self) -> AbstractContextManager[Workspace]:
        """A workspace for one slide at a time."""
        ...

    def available_memory(self) -> int:
        """Bytes that the device has free."""
        ...

    def close(self) -> None:
        """Free what it holds on its device. Running afterwards raises; closing again does nothing."""
        ...
