"""The head of an engine as one matrix, so that any gene, and statistics of all genes, come straight from embeddings.

The head is a LayerNorm and a Linear. With n the standardised embedding (its mean taken away, divided by its standard
deviation), gamma and beta of the norm, and W and b of the Linear, the expression is

    W (gamma n + beta) + b = A n + c,   A = W diag(gamma),  c = W beta + b

The rows of n sum to zero, so A may be taken with rows that sum to zero, too. N spots, d width, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..engine import Engine

EPSILON = 1e-5  # of the head's LayerNorm, as in PyTorch
PROBED = 16.0  # what the probes hold: its square is far from the limits of float16, and its variance far above EPSILON
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Head:
    """expression [N, G] = standardised embedding [N, d] @ weights.T + offsets."""

    weights: Floats  # [G, d], A; each row sums to zero
    offsets: Floats  # [G], c

    @classmethod
    def of(cls, engine: Engine) -> Head:
        """The head of an engine, from what it gives for d embeddings that hold one number each, and for one of zeros.

        The standardised form of zeros is zeros: f(0) = c. That of a probe p is s (p - mean): f(p) = s A p + c. So no
        file of weights is read, whatever the backend keeps them in, and it errs by what the precision errs by.
        """
        d = engine.manifest.model.d_model
        probes = np.concatenate([np.eye(d, dtype=np.float32) * PROBED, np.zeros((1, d), np.float32)])
        scale = PROBED / np.sqrt(PROBED**2 * (1 / d - 1 / d**2) + EPSILON)  # s, times what a probe holds
        found = engine.decode(probes)  # [d + 1, G]
        weights = np.ascontiguousarray((found[:d] - found[d]).T) / np.float32(scale)
        return cls(weights - weights.mean(axis=1, keepdims=True), found[d].copy())

    def __len__(self) -> int:
        return len(self.offsets)
