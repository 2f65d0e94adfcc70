"""Gene expression prediction, by both published protocols.

N spots of all slides, G genes. Expression is log1p of raw counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.progress import OnTile
from stpath_train.store import Store, Task

from . import metrics, plots
from .baselines import fit_baselines
from .predictor import FlowPredictor, Predictor
from .results import Evaluation, Row
from .slides import measured_expression, read_each, require_genes, require_slides

PROTOCOLS = {
    "pooled": "STPath: Pearson of each gene over the pooled spots of all test slides, mean over the genes; 95% "
    "interval from 100 bootstraps over the spots",
    "folds": "HEST-bench: Pearson of each gene over the test spots of a fold, mean over the genes; mean and standard "
    "deviation over the folds",
    "undefined": "Pearson of a gene with constant truth or prediction is undefined; such genes are left out of a mean, "
    "counted (undefined_genes) and named, where the published evaluations let them make the mean undefined",
    "calibration": "STFlow: pairs of spot and gene in ten parts by the standard deviation of their samples; of each "
    "the root mean square of that and of the error",
}
BINS = 10
NAMED = 50  # genes; all are in results.csv
MODEL = "model"
Spots = dict[str, npt.NDArray[np.float32]]  # slide -> [spots, G]


def evaluate_expression(
    predictor: Predictor, store: Store, task: Task, baselines: bool, seed: int, on_slide: OnTile | None = None
) -> Evaluation:
    """Score a model on the test slides of a task; with baselines, those learn from each fold's training slides.

    Raises
    ------
    InputError
        If a slide is not of the store, or a gene was not measured on one.
    """
    slides = test_slides(task)
    require_slides(store, slides)
    require_genes(store, slides, task.genes)
    truth: Spots = {}
    predicted: dict[str, Spots] = {MODEL: {}}
    spread: Spots = {}
    for name, adata, slide in read_each(store, slides, on_slide):
        truth[name] = measured_expression(store, adata, name, task.genes)
        embedding = predictor.embed(slide)
        predicted[MODEL][name] = predictor.decode(embedding, task.genes)
        if isinstance(predictor, FlowPredictor) and (std := predictor.deviation(embedding, task.genes)) is not None:
            spread[name] = std
    figures, rows = _score_pooled(task.genes, slides, truth, predicted[MODEL], seed)
    for fold in task.folds:
        fitted = fit_baselines(store, fold["train"], task.genes, seed) if baselines else {}
        for test in fold["test"] if fitted else []:
            features = store.read(test).obsm["features"]
            for name, baseline in fitted.items():
                predicted.setdefault(name, {})[test] = baseline(features)
        for name, found in predicted.items():
            rows += _score_fold(task, fold, name, truth, found)
    figures += _over_folds(rows, list(predicted))
    title = f"expression of {plots.counted(len(task.genes), 'gene')}, {plots.counted(len(slides), 'slide')}"
    pictures = {"pearson.png": plots.expression_figure(rows, figures, title)}
    if spread:
        of_bins, figure = calibration(slides, truth, predicted[MODEL], spread)
        figures.append(figure)
        rows += of_bins
        pictures["calibration.png"] = plots.calibration_figure(of_bins, figure, title)
    return Evaluation("expression", PROTOCOLS, figures, rows, pictures)


def calibration(slides: Sequence[str], truth: Spots, predicted: Spots, spread: Spots) -> tuple[list[Row], Row]:
    """Whether errors are larger where samples spread more: pairs of spot and gene in ten parts, by their spread.

    Returns
    -------
    A row a part, with the root mean square of spread and error; and Spearman's r of spread and size of error.
    """
    error, deviation = (
        np.concatenate([np.ravel(part) for part in parts])
        for parts in ([truth[s] - predicted[s] for s in slides], [spread[s] for s in slides])
    )
    rows: list[Row] = []
    about = {"protocol": "calibration", "predictor": MODEL}
    for i, part in enumerate(np.array_split(np.argsort(deviation, kind="stable"), BINS)):
        if len(part):
            rms = (float(np.sqrt(np.mean(np.square(values[part], dtype=np.float64)))) for values in (deviation, error))
            rows.append({**about, "bin": i, **dict(zip(("spread", "error"), rms, strict=True)), "pairs": len(part)})
    r = metrics.spearman(np.abs(error), deviation)
    return rows, {**about, "metric": "Spearman, spread and size of error", "value": r, "pairs": len(error)}


def test_slides(task: Task) -> list[str]:
    """The test slides of all folds, each once."""
    return list(dict.fromkeys(slide for fold in task.folds for slide in fold["test"]))


def fold_name(task: Task, fold: dict[str, list[str]]) -> str:
    """A fold's slide where it has one, else its number, from 0."""
    return fold["test"][0] if len(fold["test"]) == 1 else f"fold {task.folds.index(fold)}"


def pooled_pearson(truth: npt.NDArray[Any], predicted: npt.NDArray[Any], seed: int) -> tuple[Row, list[Row]]:
    """STPath's protocol on pooled spots [N, G]: the figure, and Pearson of each gene, all with intervals."""
    by_gene = metrics.pearson_by_gene(truth, predicted)
    resamples = metrics.pearson_resamples(truth, predicted, seed)  # [G, R]
    low, high = metrics.interval(metrics.mean(resamples, axis=0)).tolist()
    undefined = int(np.isnan(by_gene).sum())
    figure = {"metric": "Pearson", "value": float(metrics.mean(by_gene)), "low": low, "high": high}
    lows, highs = metrics.interval(resamples)
    genes = [{"pearson": r, "low": a, "high": b} for r, a, b in zip(by_gene, lows, highs, strict=True)]
    return {**figure, "undefined_genes": undefined, "spots": len(truth)}, genes


def _score_pooled(
    genes: Sequence[str], slides: Sequence[str], truth: Spots, predicted: Spots, seed: int
) -> tuple[list[Row], list[Row]]:
    a, b = (np.concatenate([spots[slide] for slide in slides]) for spots in (truth, predicted))  # [N, G] each
    figure, by_gene = pooled_pearson(a, b, seed)
    figure |= _named([gene for gene, row in zip(genes, by_gene, strict=True) if np.isnan(row["pearson"])])
    about = {"protocol": "pooled", "predictor": MODEL}
    errors = metrics.squared_error_by_gene(a, b)
    rows = [
        {**about, "fold": "", "gene": gene, **row, "squared_error": error, "spots": len(a)}
        for gene, row, error in zip(genes, by_gene, errors, strict=True)
    ]
    return [{**about, **figure}], rows


def _score_fold(task: Task, fold: dict[str, list[str]], predictor: str, truth: Spots, predicted: Spots) -> list[Row]:
    a, b = (np.concatenate([spots[slide] for slide in fold["test"]]) for spots in (truth, predicted))
    scores = zip(task.genes, metrics.pearson_by_gene(a, b), metrics.squared_error_by_gene(a, b), strict=True)
    about = {"protocol": "folds", "predictor": predictor, "fold": fold_name(task, fold)}
    return [{**about, "gene": gene, "pearson": r, "squared_error": e, "spots": len(a)} for gene, r, e in scores]


def _named(genes: list[str]) -> Row:
    """The genes whose r is undefined, where there are some."""
    more = f" and {len(genes) - NAMED} more" if len(genes) > NAMED else ""
    return {"undefined": ", ".join(genes[:NAMED]) + more} if genes else {}


def _over_folds(rows: list[Row], predictors: Sequence[str]) -> list[Row]:
    """Mean over the genes of each fold, then mean and standard deviation over the folds."""
    import pandas as pd

    table = pd.DataFrame([row for row in rows if row["protocol"] == "folds"])
    figures = []
    for predictor in predictors:
        of = table[table["predictor"] == predictor]
        for metric, column in (("Pearson", "pearson"), ("squared error", "squared_error")):
            by_fold = of.groupby("fold")[column].mean().to_numpy(float)  # pandas leaves undefined genes out
            mean, std = metrics.mean_and_std(by_fold)
            undefined = int(of[column].isna().sum())
            about = {"protocol": "folds", "predictor": predictor, "metric": metric, "value": mean, "std": std}
            named = _named(list(dict.fromkeys(of["gene"][of[column].isna()])))
            figures.append({**about, "undefined_genes": undefined, **named, "folds": len(by_fold)})
    return figures
