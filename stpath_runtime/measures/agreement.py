"""How far results are from those of a reference: relative L2, and the correlation of each gene."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def relative_l2(values: Floats, exact: Floats) -> float:
    """||values - exact|| / ||exact||, in float64.

    Examples
    --------
    >>> relative_l2(np.array([3.0, 4.5]), np.array([3.0, 4.0]))
    0.1
    """
    exact = exact.astype(np.float64, copy=False)
    return float(np.linalg.norm(values - exact) / max(float(np.linalg.norm(exact)), 1e-300))


def gene_pearson(values: Floats, exact: Floats, flat: float = 0.0) -> npt.NDArray[np.float64]:
    """Pearson r over the spots, in float64, of each gene (column) that varies; 0 where only `exact` does.

    Parameters
    ----------
    values, exact
        [N, G].
    flat
        A gene varies if its standard deviation in `exact` is above this.

    Examples
    --------
    >>> gene_pearson(np.array([[1.0, 2.0], [2.0, 2.0]]), np.array([[1.0, 5.0], [3.0, 5.0]])).round(6).tolist()
    [1.0]
    """
    varies = exact.std(axis=0) > flat
    a, b = values[:, varies].astype(np.float64), exact[:, varies].astype(np.float64)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    norms = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    r: npt.NDArray[np.float64] = (a * b).sum(axis=0) / np.maximum(norms, 1e-300)
    return r
