"""A GPU made of the host, for tests of what runs on one: its memory is the host's, and its work waits in a queue.

What the real one would refuse, or would answer with wrong numbers, fails: memory that was freed or is too short, a
stream or an event that was destroyed, a buffer that is written again before it was read (the copy waits in the queue).
"""

from __future__ import annotations

import ctypes
from itertools import count
from types import SimpleNamespace

import numpy as np
from cuda.bindings import runtime as cudart

OK = cudart.cudaError_t.cudaSuccess
ALIGNED = 256  # bytes: as cudaMalloc gives memory, and TensorRT wants it


class HostGpu:
    """CUDA's runtime for one GPU, whose memory is the host's and whose work waits until somebody waits for it."""

    cudaError_t, cudaMemcpyKind = cudart.cudaError_t, cudart.cudaMemcpyKind
    cudaEventDisableTiming = cudart.cudaEventDisableTiming

    def __init__(self, capability=(8, 9), size=1 << 30):
        self.capability, self.size = capability, size
        self.memory, self.pinned, self.queue, self.asked = {}, {}, [], []
        self.names, self.events, self.streams = count(7), set(), set()

    @property
    def held(self):
        """What was made and not given back."""
        return [*self.memory, *self.pinned, *self.events, *self.streams]

    def cudaGetDeviceCount(self):
        return OK, 1

    def cudaSetDevice(self, index):
        return (OK,)

    def cudaGetDeviceProperties(self, index):
        major, minor = self.capability
        return OK, SimpleNamespace(major=major, minor=minor, name=b"NVIDIA Made Up")

    def cudaStreamCreate(self):
        stream = next(self.names)
        self.streams.add(stream)
        return OK, stream

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (OK,)

    def cudaMemGetInfo(self):
        return OK, self.size - sum(len(held) - ALIGNED for held in self.memory.values()), self.size

    def cudaMalloc(self, size):
        assert size > 0
        self.asked.append(size)
        if size > self.cudaMemGetInfo()[1]:
            return cudart.cudaError_t.cudaErrorMemoryAllocation, None
        return OK, self._hold(self.memory, size)

    def cudaFree(self, address):
        while self.queue:  # it waits for all that was queued
            self._go_on()
        del self.memory[address]
        return (OK,)

    def cudaHostAlloc(self, size, flags):
        return OK, self._hold(self.pinned, size)

    def cudaFreeHost(self, address):
        assert not self.queue, "pinned memory is freed while the GPU may read it"
        del self.pinned[address]
        return (OK,)

    def cudaMemsetAsync(self, address, value, size, stream):
        assert stream in self.streams
        self.require_held(address, size)
        self.queue.append(lambda: ctypes.memset(address, value, size))
        return (OK,)

    def cudaMemcpyAsync(self, to, source, size, kind, stream):
        assert stream in self.streams
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:  # of memory that is not pinned it would wait
            self.require_held(source, size, self.pinned)
        else:
            self.require_held(source, size)
        if kind != self.cudaMemcpyKind.cudaMemcpyDeviceToHost:
            self.require_held(to, size)
        self.queue.append(lambda: ctypes.memmove(to, source, size))
        return (OK,)

    def cudaEventCreateWithFlags(self, flags):
        event = next(self.names)
        self.events.add(event)
        return OK, event

    def cudaEventDestroy(self, event):
        self.events.remove(event)
        return (OK,)

    def cudaEventRecord(self, event, stream):
        assert event in self.events
        assert stream in self.streams
        self.queue = [waiting for waiting in self.queue if waiting != event] + [event]
        return (OK,)

    def cudaEventSynchronize(self, event):
        assert event in self.events
        while event in self.queue:
            self._go_on()
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        assert stream in self.streams
        while self.queue:
            self._go_on()
        return (OK,)

    def require_held(self, address, size, pieces=None):
        """Fail unless the bytes are part of one piece of the GPU's memory."""
        held = self.memory if pieces is None else pieces
        pieces = ((start, len(piece) - ALIGNED) for start, piece in held.items())
        assert any(start <= address and address + size <= start + length for start, length in pieces)

    def array(self, address, shape, dtype):
        """Memory of the GPU as an array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.require_held(address, size)
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def _hold(self, pieces, size):
        held = (ctypes.c_char * (size + ALIGNED))()
        address = -(-ctypes.addressof(held) // ALIGNED) * ALIGNED
        ctypes.memset(address, 0xFF, size)  # NaN, where nothing is written
        pieces[address] = held
        return address

    def _go_on(self):
        work = self.queue.pop(0)
        if callable(work):
            work()
