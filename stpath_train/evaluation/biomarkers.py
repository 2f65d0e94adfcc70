"""Biomarkers: how well predicted marker genes follow the measured ones, and find a pathologist's region.

N spots of a slide, G markers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import EvaluationError
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import nearest_names
from stpath_train.store import Store

from . import metrics, plots
from .predictor import Predictor
from .results import Evaluation, Row
from .slides import marks, measured_expression, read_each, require_genes, require_slides

PROTOCOLS = {
    "correlations": "Pearson and Spearman of each marker, predicted against measured, over the spots of a slide",
    "region": "AUC of each marker, predicted and, to compare, measured, for the spots of the region against the other "
    "marked spots of the slide; 0.5 is chance, and a marker that the region lacks is below it",
    "slides": "95% interval of each from 100 bootstraps over the spots; mean and standard deviation over the slides",
    "undefined": "a correlation with a marker that is constant is undefined: left out of the mean",
}
SCORES = {"Pearson": metrics.pearson, "Spearman": metrics.spearman}


def evaluate_biomarkers(
    predictor: Predictor,
    store: Store,
    genes: Sequence[str],
    slides: Sequence[str],
    region: tuple[str, Sequence[str]] | None,
    seed: int,
    on_slide: OnTile | None = None,
) -> Evaluation:
    """Score predicted markers on slides.

    Parameters
    ----------
    region
        An obs column, and which of its values are the region; None: no AUC.

    Raises
    ------
    InputError
        If a slide has no such column, nothing of the region or nothing else, or a gene was not measured on one.
    """
    require_slides(store, slides)
    require_genes(store, slides, genes)
    inside = regions_of(store, slides, *region) if region is not None else {}
    rows: list[Row] = []
    pictures, curves = {}, {}
    for name, adata, slide in read_each(store, slides, on_slide):
        measured = measured_expression(store, adata, name, genes)
        predicted = predictor.decode(predictor.embed(slide), genes)
        for gene, a, b in zip(genes, measured.T, predicted.T, strict=True):
            rows += _correlations(name, gene, a, b, seed)
        if region is not None:
            scored, positive = inside[name]
            curves[name] = positive, dict(zip(genes, predicted[scored].T, strict=True))
            for gene, a, b in zip(genes, measured[scored].T, predicted[scored].T, strict=True):
                rows += _areas(name, gene, positive, a, b, seed)
    figures = _over_slides(rows)
    spread = "95% interval over the spots" if len(slides) == 1 else "mean and standard deviation over the slides"
    title = f"{plots.counted(len(genes), 'marker')}, {plots.counted(len(slides), 'slide')}: {spread}"
    pictures["scores.png"] = plots.biomarker_figure(figures, title)
    if region is not None:
        pictures["roc.png"] = plots.marker_roc_figure(curves, rows, f"{region[0]}: {', '.join(region[1])}")
    return Evaluation("biomarkers", PROTOCOLS, figures, rows, pictures)


def regions_of(
    store: Store, slides: Sequence[str], column: str, positive: Sequence[str]
) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """The marked spots of each slide, and of each such spot whether it is inside the region, 1 or 0.

    Raises
    ------
    InputError
        If a slide has no such column, no slide has one of the values, or a slide's marked spots are all inside or all
        outside.
    """
    marked = {slide: marks(store, slide, column) for slide in slides}
    known = sorted({str(value) for values in marked.values() for value in values} - {""})
    for value in positive:
        if value not in known:
            raise EvaluationError(
                f"--positive {value}: no slide has it in column {column!r}{nearest_names(value, known)}; they hold "
                f"{', '.join(known) or 'nothing'}"
            )
    found = {}
    for slide, values in marked.items():
        scored = np.flatnonzero(values != "")
        inside = np.isin(values[scored], list(positive)).astype(np.int64)
        if inside.all() or not inside.any():
            share = "every" if len(inside) and inside.all() else "no"
            raise EvaluationError(
                f"slide {slide}: {share} marked spot is {' or '.join(map(repr, positive))} in column {column!r}; an "
                "AUC needs spots inside and outside: give other values (--positive), or other slides (--slides)"
            )
        found[slide] = scored, inside
    return found


def _correlations(
    slide: str, gene: str, measured: npt.NDArray[np.float32], predicted: npt.NDArray[np.float32], seed: int
) -> list[Row]:
    return [
        {
            "slide": slide, "gene": gene, "metric": metric, "value": score(measured, predicted),
            **_interval(metrics.resample(score, (measured, predicted), seed)), "spots": len(measured),
        }
        for metric, score in SCORES.items()
    ]  # fmt: skip


def _areas(
    slide: str,
    gene: str,
    positive: npt.NDArray[np.int64],
    measured: npt.NDArray[np.float32],
    predicted: npt.NDArray[np.float32],
    seed: int,
) -> list[Row]:
    return [
        {
            "slide": slide, "gene": gene, "metric": f"AUC, {kind}", "value": metrics.auc(positive, values),
            **_interval(metrics.resample(metrics.auc, (positive, values), seed)), "spots": len(positive),
        }
        for kind, values in (("predicted", predicted), ("measured", measured))
    ]  # fmt: skip


def _interval(resamples: npt.NDArray[np.float64]) -> Row:
    low, high = metrics.interval(resamples).tolist()
    return {"low": low, "high": high}


def _over_slides(rows: list[Row]) -> list[Row]:
    import pandas as pd

    figures = []
    for (gene, metric), of in pd.DataFrame(rows).groupby(["gene", "metric"], sort=False):
        mean, std = metrics.mean_and_std(of["value"].to_numpy(float))
        # Of one slide the interval over its spots says more than the deviation over slides, which is 0.
        spread = {"low": of["low"].iloc[0], "high": of["high"].iloc[0]} if len(of) == 1 else {"std": std}
        figures.append(
            {"protocol": "slides", "gene": gene, "metric": metric, "value": mean, **spread, "slides": len(of)}
        )
    return figures
