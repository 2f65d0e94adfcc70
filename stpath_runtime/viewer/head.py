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
        """The head of an engine, from what it gives for d embeddings, each of one number, and for their opposites.

        A probe p has n = s (p - mean), so that f(p) = s A p + c and f(-p) = -s A p + c. This reads no file of weights,
        whatever the backend keeps them in, and errs by what the engine's precision errs by.
        """
        d = engine.manifest.model.d_model
        probes = np.eye(d, dtype=np.float32) * PROBED
        scale = PROBED / np.sqrt(PROBED**2 * (1 / d - 1 / d**2) + EPSILON)  # of p, in its standardised form
        up, down = engine.decode(probes), engine.decode(-probes)  # [d, G]
        return cls(((up - down) / (2 * scale)).T.copy(), ((up + down) / 2).mean(axis=0))

    def __len__(self) -> int:
        return len(self.offsets)
