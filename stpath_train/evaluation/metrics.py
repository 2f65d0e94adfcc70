"""The figures of an evaluation: arrays in, numbers out. Every metric is scipy's, scikit-learn's or scanpy's.

N spots, G genes, R resamples, S slides, K classes. Pearson and Spearman of a gene that is constant, in the truth or in
the prediction, are undefined: NaN here. The published evaluations of STPath and of HEST-bench let such a gene make the
mean over the genes NaN; here it is left out of the mean, and whoever reports the mean counts such genes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
RESAMPLES = 100  # of a bootstrap, as STPath publishes
PERCENTILES = (2.5, 97.5)  # of the resamples: a 95% interval
CLUSTERING = ("ARI", "AMI", "NMI", "homogeneity")


def pearson_by_gene(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> Floats:
    """Pearson correlation of each gene over the spots, [G]: truth [N, G], predicted [N, G]."""
    return _pearson(np.asarray(truth, np.float64), np.asarray(predicted, np.float64), axis=0)


def pearson(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> float:
    """Pearson correlation of one gene over the spots: truth [N], predicted [N]."""
    return float(pearson_by_gene(truth[:, None], predicted[:, None])[0])


def spearman(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> float:
    """Spearman correlation of one gene over the spots: truth [N], predicted [N]."""
    from scipy.stats import spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of a constant gene
        return float(spearmanr(truth, predicted).statistic)


def squared_error_by_gene(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> Floats:
    """Mean squared error of each gene over the spots, [G], in (log1p counts)²: HEST-bench's `l2_errors`."""
    from sklearn.metrics import mean_squared_error

    return np.asarray(mean_squared_error(truth, predicted, multioutput="raw_values"), np.float64)


def pearson_resamples(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], seed: int) -> Floats:
    """Pearson of each gene in each bootstrap over the spots, [G, R]; a resample draws the same spots for all genes."""
    rows = (np.asarray(part, np.float64).T for part in (truth, predicted))  # [G, N] each
    return resample(_pearson, tuple(rows), seed, vectorized=True)


def auc(positive: npt.NDArray[Any], scores: npt.NDArray[Any]) -> float:
    """Area under the ROC curve: positive [N] of 0 and 1, scores [N]; NaN where all are of one class."""
    from sklearn.metrics import roc_auc_score

    if len(np.unique(positive)) < 2:
        return float("nan")
    return float(roc_auc_score(positive, scores))


def auc_of_classes(classes: npt.NDArray[Any], probabilities: npt.NDArray[Any]) -> float:
    """AUC of classes [S] of 0..K-1 from probabilities [S, K]: of class 1 where K is 2, else one-vs-rest, macro.

    NaN where a class has no slide.
    """
    if probabilities.shape[1] == 2:
        return auc(classes, probabilities[:, 1])
    return float(np.mean([auc(classes == k, probabilities[:, k]) for k in range(probabilities.shape[1])]))


def clustering_scores(truth: npt.NDArray[Any], found: npt.NDArray[Any]) -> dict[str, float]:
    """ARI, AMI, NMI and homogeneity of found clusters [N] against true regions [N]."""
    return {name: clustering_score(name, truth, found) for name in CLUSTERING}


def clustering_score(name: str, truth: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """One of `CLUSTERING`, as scikit-learn computes it."""
    from sklearn import metrics

    scores = {
        "ARI": metrics.adjusted_rand_score,
        "AMI": metrics.adjusted_mutual_info_score,
        "NMI": metrics.normalized_mutual_info_score,
        "homogeneity": metrics.homogeneity_score,
    }
    return float(scores[name](truth, found))


def resample(
    statistic: Callable[..., Any], samples: tuple[npt.NDArray[Any], ...], seed: int, vectorized: bool = False
) -> Floats:
    """A statistic in each of 100 bootstraps, [..., R] (scipy.stats.bootstrap): samples [..., N], drawn together."""
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, where a statistic is undefined in a resample
        found = bootstrap(
            samples, statistic, paired=True, vectorized=vectorized, axis=-1, n_resamples=RESAMPLES, batch=1,
            method="percentile", rng=np.random.default_rng(seed),
        )  # fmt: skip
    return np.asarray(found.bootstrap_distribution, np.float64)


def interval(resamples: Floats) -> Floats:
    """The 95% interval of resamples [..., R], percentiles [2, ...]; undefined resamples are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where no resample is defined: NaN
        return np.asarray(np.nanpercentile(resamples, PERCENTILES, axis=-1), np.float64)


def mean(values: Floats, axis: int | None = None) -> Any:
    """Mean of the values that are defined; NaN where none is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where none is
        return np.nanmean(values, axis=axis)


def mean_and_std(values: Floats) -> tuple[float, float]:
    """Mean and standard deviation (divided by n, as HEST-bench's over folds) of the values that are defined."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, where none is
        return float(np.nanmean(values)), float(np.nanstd(values))


def _pearson(truth: Floats, predicted: Floats, axis: int) -> Floats:
    from scipy.stats import pearsonr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of a constant gene
        return np.asarray(pearsonr(truth, predicted, axis=axis).statistic, np.float64)
