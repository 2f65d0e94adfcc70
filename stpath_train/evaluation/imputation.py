"""Spatial imputation: the spots nearest to a slide's rightmost one are masked, and predicted from the others.

N spots of a slide, M masked ones, C = N - M of context, G genes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stpath_runtime.progress import OnTile
from stpath_runtime.slides.context import masked_spots
from stpath_train.store import Store

from . import metrics, plots
from .expression import PROTOCOLS as EXPRESSION
from .expression import pooled_pearson
from .predictor import Predictor
from .results import Evaluation, Row
from .slides import measured_expression, read_each, require_genes, require_slides

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MASKED = (0.95, 0.9, 0.8)  # of a slide's spots
PROTOCOLS = {
    "masks": "STPath: of each slide, the int(N * masked) spots nearest to the rightmost one are masked; the others "
    "give the raw counts of all their genes as context, or none, to compare",
    "pooled": EXPRESSION["pooled"].replace("spots of all test slides", "masked spots of all slides"),
    "slides": "Pearson of each gene over the masked spots of a slide, mean over the genes; mean and standard deviation "
    "over the slides",
    "undefined": EXPRESSION["undefined"],
}
FEWEST_SPOTS = 5  # of which 4, 4 and 4 are masked
Parts = list[npt.NDArray[np.float32]]  # [M, G] of each slide


def evaluate_imputation(
    predictor: Predictor,
    store: Store,
    genes: Sequence[str],
    slides: Sequence[str],
    seed: int,
    on_slide: OnTile | None = None,
) -> Evaluation:
    """Score a model on the masked spots of slides, with and without the others as context.

    Raises
    ------
    InputError
        If a slide is not of the store or too small, or a gene was not measured on one.
    """
    require_slides(store, slides, FEWEST_SPOTS)
    require_genes(store, slides, genes)
    truth: dict[float, Parts] = {masked: [] for masked in MASKED}
    predicted: dict[tuple[float, str], Parts] = {(masked, kind): [] for masked in MASKED for kind in plots.CONTEXTS}
    pictures: dict[str, Figure] = {}
    for name, adata, slide in read_each(store, slides, on_slide):
        measured = measured_expression(store, adata, name, genes)
        without = predictor.decode(predictor.embed(slide), genes)
        for masked in MASKED:
            spots = masked_spots(slide.coords, masked)
            rest = np.setdiff1d(np.arange(len(slide)), spots)
            context = store.as_context(adata, name, rest)
            found = predictor.decode(predictor.embed(slide, context=context), genes)
            truth[masked].append(measured[spots])
            predicted[masked, "the other spots"].append(found[spots])
            predicted[masked, "none"].append(without[spots])
            if masked == MASKED[0] and len(pictures) < plots.MOST_MAPS:
                gene = int(measured.var(axis=0).argmax())  # the same whatever the model predicts
                pictures[f"map_{name}.png"] = plots.imputation_map(
                    name, genes[gene], slide.coords, spots, found[:, gene], measured[:, gene]
                )
    figures, rows = _score(genes, slides, truth, predicted, seed)
    scores = plots.imputation_figure(
        figures, f"imputation of {plots.counted(len(genes), 'gene')}, {plots.counted(len(slides), 'slide')}"
    )
    return Evaluation("imputation", PROTOCOLS, figures, rows, {"pearson.png": scores, **pictures})


def _score(
    genes: Sequence[str],
    slides: Sequence[str],
    truth: dict[float, Parts],
    predicted: dict[tuple[float, str], Parts],
    seed: int,
) -> tuple[list[Row], list[Row]]:
    figures, rows = [], []
    for (masked, context), parts in predicted.items():
        about = {"masked": masked, "context": context}
        figure, _ = pooled_pearson(np.concatenate(truth[masked]), np.concatenate(parts), seed)
        by_slide = [metrics.pearson_by_gene(a, b) for a, b in zip(truth[masked], parts, strict=True)]
        mean, std = metrics.mean_and_std(np.array([metrics.mean(r) for r in by_slide]))
        undefined = int(np.isnan(by_slide).sum())
        over = {"value": mean, "std": std, "undefined_genes": undefined, "slides": len(slides)}
        figures += [
            {"protocol": "pooled", **about, **figure},
            {"protocol": "slides", **about, "metric": "Pearson", **over},
        ]
        rows += [
            {"slide": slide, **about, "gene": gene, "pearson": r, "spots": len(part)}
            for slide, scores, part in zip(slides, by_slide, parts, strict=True)
            for gene, r in zip(genes, scores, strict=True)
        ]
    return figures, rows
