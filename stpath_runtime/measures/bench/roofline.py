"""What a machine would allow: the model's operations and bytes, and the peaks that both meet, measured now.

A slide of N spots, model width d, L layers, mlp width m, F features, G genes. A multiplication and an addition are two
operations; norms, softmax, GELU and distances are not counted.

    encode, a spot : 2 F d  +  L (2 (4 d d + 2 d m) + 4 K d)     K keys: N, or what its dense block holds (kNN)
    decode, a spot : 2 d G

Bytes are those that must move at least, float32, each number once: the weights; a spot's features; x after each
stage and before it; k and v as they are made and as they are read. What a backend moves beyond that (scores, a key more
than once) is what it loses. Time cannot be below max(operations / matrix peak, bytes / bandwidth).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ...encoding.neighbors import plan_blocks
from ...machine import available_on_host, cores
from ...manifest import ModelConfig
from .timing import seconds_of

SIDES = (1024, 2048, 3072)  # of the matrices whose product is timed
COPIED = 512 << 20  # bytes: far above any cache
REPEATS = 6
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Peaks:
    """What this machine does at most."""

    operations: float  # of float32 matrix products, a second
    bytes: float  # read and written by copies, a second
    by: str  # what measured them

    def seconds(self, operations: float, moved: float) -> float:
        """The least time for so many operations and bytes."""
        return max(operations / self.operations, moved / self.bytes)

    def facts(self) -> dict[str, Any]:
        """As results keep them."""
        return {"gflops": self.operations / 1e9, "gbytes": self.bytes / 1e9, "by": self.by}


def measure_peaks() -> Peaks:
    """Measure both by numpy: products of float32 matrices by its BLAS, and copies by a thread a core."""
    built: Any = np.show_config(mode="dicts")
    blas = built["Build Dependencies"]["blas"]
    threads = cores()
    by = f"numpy {np.__version__}: {blas['name']} {blas['version']}, and copies by {threads} threads"
    return Peaks(max(_products(side) for side in SIDES), _copies(threads), by)


def _products(side: int) -> float:
    """Operations a second of a product of square matrices, the best of a few."""
    a, b = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    out = np.empty_like(a)
    return 2 * side**3 / min(seconds_of(lambda: np.matmul(a, b, out=out)) for _ in range(REPEATS))


def _copies(threads: int) -> float:
    """Bytes read and written a second by copies of large arrays, the best of a few."""
    size = min(COPIED, available_on_host() // 8) // (8 * threads)
    pairs = [(np.ones(size), np.empty(size)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))

        copy()  # the pages of what is written are made
        return 2 * 8 * size * threads / min(seconds_of(copy) for _ in range(REPEATS))


def keys_of_a_spot(coords: npt.NDArray[np.generic], attention: str, neighbors: int) -> float:
    """To how many keys a spot is multiplied in a layer: all spots, or those of its dense block, in the mean."""
    if attention == "global":
        return len(coords)
    plan = plan_blocks([coords], neighbors)
    return len(plan.key_row) / plan.blocks


def encoder_operations(model: ModelConfig, spots: int, keys: float) -> float:
    """Operations of the encoder for a slide, each spot of which attends to so many keys a layer."""
    d = model.d_model
    layer = 2 * (4 * d**2 + 2 * d * model.d_mlp) + 4 * keys * d
    return spots * (2 * model.n_features * d + model.n_layers * layer)


def encoder_bytes(model: ModelConfig, spots: int) -> float:
    """Bytes that the encoder must move at least for a slide."""
    d, layers = model.d_model, model.n_layers
    weights = model.n_features * d + layers * (4 * d**2 + 2 * d * model.d_mlp)
    spot = model.n_features + (1 + 2 * layers) * d + 4 * layers * d  # features; x; k and v
    return FLOAT * (weights + spots * spot)


def decoder_operations(model: ModelConfig, spots: int, genes: int) -> float:
    """Operations of the head for so many genes of a slide."""
    return 2.0 * spots * model.d_model * genes


def decoder_bytes(model: ModelConfig, spots: int, genes: int) -> float:
    """Bytes that the head must move at least: its weights, the embedding, and the expression."""
    d = model.d_model
    return FLOAT * (genes * d + spots * (d + genes))
