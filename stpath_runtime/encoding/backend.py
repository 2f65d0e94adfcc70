"""What the encoder asks of a backend: to run the graphs of an engine, and to hold the arrays of a slide meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = Any  # NumPy's, or one in the memory of a device; rows of it are taken by slices
Arrays = Mapping[str, npt.NDArray[np.generic]]


class Workspace(Protocol):
    """Arrays of one slide by name, and what runs graphs on them."""

    takes_all_keys: bool  # a tile is handed k and v of all rows: it costs nothing to name rows of them

    def zeros(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Any:
        """An array of zeros, to be written by `run`."""
        ...

    def keep(self, name: str, array: npt.NDArray[Any]) -> Any:
        """An array that several calls of `run` take."""
        ...

    def run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Any]) -> None:
        """Run a graph and write what it gives, by name, to rows of arrays; those may be rows that it takes, too."""
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
    most_rows: int  #: in a tile: more do not make the device busier
    keeps_tiles: bool  #: each graph keeps the memory that its largest tile took, for as long as it is loaded

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph, by its name without `.onnx`, on the inputs by their names."""
        ...

    def workspace(self) -> AbstractContextManager[Workspace]:
        """Where a slide runs through the stages."""
        ...

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        ...

    def close(self) -> None:
        """Free what it holds on its device; what is run afterwards is refused, and closing again does nothing."""
        ...
