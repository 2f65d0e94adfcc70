"""What a model must beat: the mean expression of training slides, and a ridge regression on the features.

N spots of a slide, T spots of all training slides, F features, G genes. Expression is log1p of raw counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stpath_train.store import Store

from .slides import measured_expression

LATENT = 256  # principal components of the features, HEST-bench's `latent_dim`
Baseline = Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]  # features [N, F] -> expression [N, G]


def fit_baselines(store: Store, slides: Sequence[str], genes: Sequence[str], seed: int) -> dict[str, Baseline]:
    """The baselines, fitted on training slides of a store.

    Raises
    ------
    InputError
        If a slide is not of the store, or a gene was not measured on it.
    """
    features, expression = [], []
    for slide in slides:
        adata = store.read(slide)
        features.append(np.asarray(adata.obsm["features"], np.float32))
        expression.append(measured_expression(store, adata, slide, genes))
    x, y = np.concatenate(features), np.concatenate(expression)  # [T, F], [T, G]
    return {"mean": fit_mean(y), "ridge": fit_ridge(x, y, seed)}


def fit_mean(expression: npt.NDArray[Any]) -> Baseline:
    """The mean expression of the training spots [T, G], whatever the features."""
    mean = np.asarray(expression.mean(axis=0), np.float32)
    return lambda features: np.tile(mean, (len(features), 1))


def fit_ridge(features: npt.NDArray[Any], expression: npt.NDArray[Any], seed: int) -> Baseline:
    """Ridge regression of expression [T, G] on 256 principal components of the standardised features [T, F].

    HEST-bench's (Jaume et al. 2024, `hest/bench/trainer.py` and `benchmark.py`): StandardScaler, PCA, and Ridge with
    alpha = 100 / (components * genes), solver lsqr, 1,000 iterations. With an intercept, which HEST-bench leaves out:
    the components are centred, so it is the mean of the training spots and changes no correlation of a fold, but puts
    the predictions at their scale. Fewer components where there are fewer features or spots.

    LSQR of the components [T, C] and a gene [T] takes the same steps on R of their QR decomposition and Q' of the gene,
    with what Q does not reach of it as one more row: C + 1 rows instead of T. Rounding ends it a step or two apart,
    which changes what it predicts by less than 1e-3.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    components = min(LATENT, *features.shape)
    alpha = 100 / (components * expression.shape[1])
    reduced = make_pipeline(StandardScaler(), PCA(components, random_state=seed))
    x, y = reduced.fit_transform(features).astype(np.float64), expression.astype(np.float64)
    centre, mean = x.mean(axis=0), y.mean(axis=0)
    q, r = np.linalg.qr(x - centre)
    y -= mean
    within = q.T @ y  # [C, G]
    beyond = np.sqrt(np.maximum(np.sum(y**2, axis=0) - np.sum(within**2, axis=0), 0))
    ridge = Ridge(alpha=alpha, solver="lsqr", max_iter=1000, fit_intercept=False)
    ridge.fit(np.vstack([r, np.zeros(components)]), np.vstack([within, beyond]))
    weights = np.atleast_2d(ridge.coef_).T  # [C, G]
    return lambda features: np.asarray((reduced.transform(features) - centre) @ weights + mean, np.float32)
