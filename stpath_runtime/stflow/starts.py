"""The states that STFlow's samples begin with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import SlideError
from ..manifest import FlowConfig

Floats = npt.NDArray[np.float32]


def draw_start(config: FlowConfig, spots: int, seed: int, sample: int) -> Floats:
    """The start of a sample, [N, G]; it depends on the seed and the sample's number, not on how many there are.

    By default log1p of counts of a zero-inflated negative binomial distribution: a Poisson count whose mean is drawn
    from a Gamma distribution, and 0 in its place with a probability. Source: STFlow (Huang et al., ICML 2025).

    Examples
    --------
    >>> draw_start(FlowConfig(n_genes=3, start="zero"), 2, seed=0, sample=0).tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    rng, shape = np.random.default_rng([seed, sample]), (spots, config.n_genes)
    if config.start == "zero":
        return np.zeros(shape, np.float32)
    if config.start == "gaussian":
        return rng.standard_normal(shape, np.float32)
    if config.start == "uniform":
        return rng.random(shape, np.float32)
    counts = rng.poisson(rng.gamma(config.start_dispersion, math.exp(config.start_log_mean), shape))
    counts[rng.random(shape) < 1 / (1 + math.exp(-config.start_zero_logit))] = 0
    return np.log1p(counts).astype(np.float32)


def checked_start(start: npt.NDArray[Any], spots: int, genes: int, samples: int) -> Floats:
    """Starts that a user gives, [samples, N, G]; of one sample [N, G] will do.

    Raises
    ------
    InputError
        If they are of another shape, or hold NaN or infinity.
    """
    given = np.asarray(start)
    if given.ndim == 2 and samples == 1:
        given = given[None]
    if given.shape != (samples, spots, genes) or given.dtype.kind not in "fiu":
        wanted = [spots, genes] if samples == 1 else [samples, spots, genes]
        raise SlideError(f"start: {given.dtype} of shape {list(np.shape(start))}; expected numbers {wanted}")
    if not np.isfinite(given).all():
        sample, spot, _ = (int(i[0]) for i in np.nonzero(~np.isfinite(given)))
        which = f" of sample {sample}" if samples > 1 else ""
        raise SlideError(f"start: NaN or infinity at spot {spot}{which}; give log1p of counts")
    return given.astype(np.float32)
