"""One NVIDIA GPU, through CUDA's runtime: what it is, memory on it, copies to it and back.

Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html; every call returns its error code
first.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DeviceError, InstallError, MemoryLimitError


class Gpu:
    """A GPU, its memory by name, and one stream in which all work is done in order.

    Parameters
    ----------
    device
        "cuda:N"; "cuda" is "cuda:0".

    Raises
    ------
    InputError
        If the device is no such name or is not there, or CUDA's Python bindings are not installed.
    """

    def __init__(self, device: str) -> None:
        match = re.fullmatch(r"cuda(?::(\d+))?", device)
        if match is None:
            raise DeviceError(f"device {device!r}: TensorRT runs on NVIDIA GPUs only; give cuda:N, such as cuda:0")
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise InstallError("CUDA's Python bindings are not installed; run: pip install cuda-bindings") from error
        self._cuda: Any = runtime
        self._index = int(match[1] or 0)
        self.device = f"cuda:{self._index}"
        failure, count = runtime.cudaGetDeviceCount()
        if failure or self._index >= count:
            why = f"there are {count}, from cuda:0" if not failure else f"CUDA finds no GPU: {_name(failure)}"
            raise DeviceError(f"device {self.device}: not there ({why}); check nvidia-smi")
        self.use()
        facts = self._call("cudaGetDeviceProperties", self._index)
        self.target = f"sm_{facts.major}{facts.minor}"  # its generation, as compilers name it
        self.name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.stream = int(self._call("cudaStreamCreate"))
        self._memory: dict[str, tuple[int, int]] = {}  # name -> address, bytes

    def use(self) -> None:
        """Make it the GPU of the calling thread."""
        self._call("cudaSetDevice", self._index)

    def free_memory(self) -> int:
        """Bytes that are free on it."""
        self.use()
        return int(self._call("cudaMemGetInfo")[0])

    def reserve(self, name: str, size: int) -> int:
        """Address of at least `size` bytes under a name, reused by later calls and grown when they ask for more.

        Raises
        ------
        InputError
            If the GPU has not that much.
        """
        address, held = self._memory.get(name, (0, 0))
        if size > held:
            if address:
                del self._memory[name]
                self._call("cudaFree", address)
            address, held = int(self._call("cudaMalloc", size)), size
            self._memory[name] = address, held
        return address

    def upload(self, name: str, array: npt.NDArray[Any]) -> int:
        """Copy an array, which must live on until `synchronize`, to the memory of that name; returns its address."""
        address = self.reserve(name, max(1, array.nbytes))
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)
        return address

    def download(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The memory of that name as an array, which is filled at the next `synchronize`."""
        array = np.empty(shape, dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", array.ctypes.data, self._memory[name][0], array.nbytes, kind, self.stream)
        return array

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *found = getattr(self._cuda, function)(*arguments)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            asked = f"{arguments[0] / 2**20:,.0f} MiB" if function == "cudaMalloc" else "what it needs"
            raise MemoryLimitError(f"{self.device}: not enough GPU memory for {asked}; give less with --memory")
        if error:
            raise RuntimeError(f"{self.device}: {function} failed with {_name(error)}")
        return found[0] if len(found) == 1 else tuple(found)


def _name(error: Any) -> str:
    return str(getattr(error, "name", error))
