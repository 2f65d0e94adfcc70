"""One NVIDIA GPU, through CUDA's runtime: its properties, memory, and copies to it and back.

Source: https://nvidia.github.io/cuda-python/cuda-bindings/latest/module/runtime.html; every call returns its error code
first.
"""

from __future__ import annotations

import ctypes
import re
import weakref
from dataclasses import dataclass
from math import prod
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DeviceError, InstallError, MemoryLimitError


@dataclass(frozen=True)
class DeviceArray:
    """An array in the memory of a GPU; slicing its rows gives a view, as in NumPy."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: slice) -> DeviceArray:
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.address + start * row_bytes, (stop - start, *self.shape[1:]), self.dtype)

    def overlaps(self, other: DeviceArray) -> bool:
        """Whether the two arrays overlap in memory."""
        return self.address < other.address + other.nbytes and other.address < self.address + self.nbytes


PIECE = 16 << 20  # bytes of a pinned buffer: enough to keep the bus busy
BUFFERS = 4  # of the ring: some are filled while others are read
PINNED_BYTES = BUFFERS * PIECE  # of host memory, whatever is uploaded


@dataclass(frozen=True)
class _Pinned:
    """A pinned host buffer, which the GPU reads directly, and the event that marks that it has done so."""

    address: int
    read: Any


class Gpu:
    """A GPU, named buffers on it, and one stream in which all work runs in order.

    One thread at a time may use it: hold the lock `alone`.

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
            raise DeviceError(f"device {device!r}: no NVIDIA GPU; give cuda:N, such as cuda:0")
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise InstallError("CUDA's Python bindings are not installed; run: pip install cuda-bindings") from error
        self._cuda: Any = runtime
        self.alone = RLock()
        self.index = int(match[1] or 0)
        self.device = f"cuda:{self.index}"
        failure, count = runtime.cudaGetDeviceCount()
        if failure or self.index >= count:
            why = f"there are {count}, from cuda:0" if not failure else f"CUDA finds no GPU: {_name(failure)}"
            raise DeviceError(f"device {self.device}: not there ({why}); check the driver with stpath doctor")
        self.use()
        facts = self._call("cudaGetDeviceProperties", self.index)
        self.target = f"sm_{facts.major}{facts.minor}"  # its generation, as compilers name it
        self.name = facts.name.decode() if isinstance(facts.name, bytes) else str(facts.name)
        self.stream = int(self._call("cudaStreamCreate"))
        self._memory: dict[str, tuple[int, int]] = {}  # name -> address, bytes
        self._ring: list[_Pinned] = []  # the one to use next is the first, once all are there
        # Also frees the memory of an object that nobody closes; not at exit, when the driver frees everything anyway.
        self.close = weakref.finalize(self, _free, runtime, self.index, self.stream, self._memory, self._ring)
        self.close.atexit = False

    def use(self) -> None:
        """Make this the calling thread's current GPU."""
        self._call("cudaSetDevice", self.index)

    def unused_memory(self) -> int:
        """Bytes free on the GPU."""
        return int(self._call("cudaMemGetInfo")[0])

    def free_memory(self) -> int:
        """Bytes free on the GPU, plus those held here for reuse."""
        self.use()
        return self.unused_memory() + sum(size for _, size in self._memory.values())

    def reserve(self, name: str, size: int) -> int:
        """Address of a named buffer of at least `size` bytes, reused by later calls and grown if they need more.

        Raises
        ------
        InputError
            If the GPU does not have that much.
        """
        address, held = self._memory.get(name, (0, 0))
        if size > held:
            if address:
                del self._memory[name]
                self._call("cudaFree", address)
            address, held = int(self._call("cudaMalloc", size)), size
            self._memory[name] = address, held
        return address

    def empty(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """The named buffer as an array, not initialised."""
        size = prod(shape) * np.dtype(dtype).itemsize
        return DeviceArray(self.reserve(name, max(1, size)), shape, np.dtype(dtype))

    def zeros(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """The named buffer as an array of zeros."""
        array = self.empty(name, shape, dtype)
        if array.nbytes:
            self._call("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)
        return array

    def upload(self, name: str, array: npt.NDArray[Any]) -> DeviceArray:
        """Copy an array to the named buffer, through pinned memory: the caller may change it right away."""
        uploaded = self.empty(name, array.shape, array.dtype)
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        for start in range(0, len(raw), PIECE):
            piece, pinned = raw[start : start + PIECE], self._next_pinned()
            ctypes.memmove(pinned.address, piece.ctypes.data, len(piece))
            self._call("cudaMemcpyAsync", uploaded.address + start, pinned.address, len(piece), kind, self.stream)
            self._call("cudaEventRecord", pinned.read, self.stream)
        return uploaded

    def copy(self, source: DeviceArray, to: DeviceArray) -> None:
        """Copy an array within the GPU."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if source.nbytes:
            self._call("cudaMemcpyAsync", to.address, source.address, source.nbytes, kind, self.stream)

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """A copy of the array in host memory, complete after the next `synchronize`."""
        downloaded = np.empty(array.shape, array.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        if array.nbytes:
            self._call("cudaMemcpyAsync", downloaded.ctypes.data, array.address, array.nbytes, kind, self.stream)
        return downloaded

    def synchronize(self) -> None:
        """Wait until all queued work is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def _next_pinned(self) -> _Pinned:
        """A buffer of the ring that the GPU has finished reading."""
        if len(self._ring) < BUFFERS:
            read = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventDisableTiming)
            self._ring.append(_Pinned(int(self._call("cudaHostAlloc", PIECE, 0)), read))
            return self._ring[-1]
        self._ring.append(self._ring.pop(0))
        self._call("cudaEventSynchronize", self._ring[-1].read)
        return self._ring[-1]

    def _call(self, function: str, *arguments: Any) -> Any:
        error, *found = getattr(self._cuda, function)(*arguments)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            asked = f"{arguments[0] / 2**20:,.0f} MiB" if function == "cudaMalloc" else "what it needs"
            if function == "cudaHostAlloc":
                raise MemoryLimitError(
                    f"{self.device}: no {arguments[0] / 2**20:,.0f} MiB of host memory can be pinned"
                )
            raise MemoryLimitError(f"{self.device}: not enough GPU memory for {asked}; give less with --memory")
        if error:
            raise RuntimeError(f"{self.device}: {function} failed with {_name(error)}")
        return found[0] if len(found) == 1 else tuple(found)


def _free(cuda: Any, index: int, stream: int, memory: dict[str, tuple[int, int]], ring: list[_Pinned]) -> None:
    """Free everything that a Gpu holds, once queued work is done; errors are ignored, as nobody could act on them."""
    cuda.cudaSetDevice(index)
    cuda.cudaStreamSynchronize(stream)
    for address, _ in memory.values():
        cuda.cudaFree(address)
    for pinned in ring:
        cuda.cudaEventDestroy(pinned.read)
        cuda.cudaFreeHost(pinned.address)
    cuda.cudaStreamDestroy(stream)
    memory.clear()
    ring.clear()


def _name(error: Any) -> str:
    return str(getattr(error, "name", error))
