"""Spatial clustering: Leiden clusters of what a model gives, against a pathologist's regions.

N spots of a slide, M columns of what is clustered.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import EvaluationError
from stpath_runtime.progress import OnTile
from stpath_train.store import Store, open_slide

from . import metrics, plots
from .predictor import Predictor
from .results import Evaluation, Row
from .slides import marks, measured_expression, read_each, require_genes, require_slides

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPONENTS, NEIGHBORS, RESOLUTION, ITERATIONS = 30, 30, 1.0, 2
PROTOCOLS = {
    "clusters": f"STPath: {COMPONENTS} principal components, a graph of {NEIGHBORS} neighbours, Leiden at resolution "
    f"{RESOLUTION} (scanpy's default, never tuned to the regions), igraph's, {ITERATIONS} iterations; of all spots of "
    "a slide",
    "slides": "ARI, AMI, NMI and homogeneity of the clusters against the regions, over the marked spots of each slide; "
    "95% interval from 100 bootstraps over the spots; mean and standard deviation over the slides. (STPath's published "
    "code scores against the clusters of the measured expression, of all slides pooled; here the regions are the "
    "truth, and the clusters of the measured expression are scored too, to compare)",
}


def leiden_clusters(values: npt.NDArray[Any], seed: int) -> npt.NDArray[np.str_]:
    """Leiden clusters of spots, [N], from [N, M]: expression or embeddings."""
    import scanpy as sc
    from anndata import AnnData

    adata = AnnData(np.asarray(values, np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scanpy's own notes on its defaults
        sc.pp.pca(adata, n_comps=min(COMPONENTS, *(n - 1 for n in values.shape)), random_state=seed)
        sc.pp.neighbors(adata, n_neighbors=NEIGHBORS, use_rep="X_pca", random_state=seed)
        sc.tl.leiden(
            adata, resolution=RESOLUTION, flavor="igraph", n_iterations=ITERATIONS, directed=False, random_state=seed
        )
    return adata.obs["leiden"].to_numpy(str)


def evaluate_clustering(
    predictor: Predictor,
    store: Store,
    genes: Sequence[str] | None,
    slides: Sequence[str],
    regions: str,
    seed: int,
    on_slide: OnTile | None = None,
) -> Evaluation:
    """Cluster the measured expression, the prediction and the embedding of slides, and score each against the regions.

    Parameters
    ----------
    genes
        Which to measure and predict; None means the store's highly variable genes of each slide.
    regions
        An obs column; spots without a value are clustered, and not scored.

    Raises
    ------
    InputError
        If a slide has no such column, fewer than two regions or too few spots, or a gene was not measured on one.
    """
    require_slides(store, slides, NEIGHBORS + 1)
    panels = {slide: list(genes) if genes is not None else highly_variable_genes(store, slide) for slide in slides}
    marked = {slide: marks(store, slide, regions) for slide in slides}
    for slide in slides:
        require_genes(store, [slide], panels[slide])
        if len(panels[slide]) < 2:
            raise EvaluationError(f"slide {slide}: clustering needs two genes or more; give them with --genes")
        require_regions(slide, regions, marked[slide])
    rows: list[Row] = []
    pictures: dict[str, Figure] = {}
    for name, adata, spots in read_each(store, slides, on_slide):
        embedding = predictor.embed(spots)
        inputs = {
            "measured": measured_expression(store, adata, name, panels[name]),
            "predicted": predictor.decode(embedding, panels[name]),
            "embedding": embedding,
        }
        for kind, values in inputs.items():
            if not np.ptp(values, axis=0).any():
                raise EvaluationError(
                    f"slide {name}: nothing to cluster, as the {kind} values are the same at every spot; give other "
                    "genes (--genes), or leave the slide out (--slides)"
                )
        clusters = {kind: leiden_clusters(values, seed) for kind, values in inputs.items()}
        for kind, found in clusters.items():
            rows += _score(name, kind, marked[name], found, seed)
        if len(pictures) < plots.MOST_MAPS:
            pictures[f"map_{name}.png"] = plots.region_maps(name, spots.coords, marked[name], clusters, rows)
    figures = _over_slides(rows)
    scores = plots.clustering_figure(
        rows, figures, f"clusters against {regions!r}, {plots.counted(len(slides), 'slide')}"
    )
    return Evaluation("clustering", PROTOCOLS, figures, rows, {"scores.png": scores, **pictures})


def highly_variable_genes(store: Store, slide: str) -> list[str]:
    """The highly variable genes of a slide, as the store has them: Ensembl ids."""
    opened = open_slide(store, slide)
    return store.vocabulary.gene_ids(opened.tokens[opened.highly_variable])


def require_regions(slide: str, column: str, marked: npt.NDArray[np.str_]) -> None:
    """Raise InputError where a slide's spots are not of two regions or more."""
    found = sorted(set(marked) - {""})
    if len(found) < 2:
        held = f"only {str(found[0])!r}" if found else "nothing"
        raise EvaluationError(
            f"slide {slide}: column {column!r} holds {held}; scores need two regions or more: name another column "
            "(--regions), or other slides (--slides)"
        )


def _score(slide: str, kind: str, marked: npt.NDArray[np.str_], clusters: npt.NDArray[np.str_], seed: int) -> list[Row]:
    scored = marked != ""
    truth, found = (np.unique(labels[scored], return_inverse=True)[1] for labels in (marked, clusters))  # as numbers
    counts = {"regions": len(np.unique(truth)), "clusters": len(np.unique(found)), "spots": int(scored.sum())}
    rows = []
    for name, value in metrics.clustering_scores(truth, found).items():
        resamples = metrics.resample(lambda a, b, name=name: metrics.clustering_score(name, a, b), (truth, found), seed)
        low, high = metrics.interval(resamples).tolist()
        score = {"metric": name, "value": value, "low": low, "high": high}
        rows.append({"slide": slide, "input": kind, **score, **counts})
    return rows


def _over_slides(rows: list[Row]) -> list[Row]:
    import pandas as pd

    figures = []
    for (kind, metric), of in pd.DataFrame(rows).groupby(["input", "metric"], sort=False):
        mean, std = metrics.mean_and_std(of["value"].to_numpy(float))
        about = {"protocol": "slides", "input": kind, "metric": metric, "value": mean}
        # Of one slide the interval over its spots says more than the deviation over slides, which is 0.
        spread = {"low": of["low"].iloc[0], "high": of["high"].iloc[0]} if len(of) == 1 else {"std": std}
        figures.append({**about, **spread, "slides": len(of)})
    return figures
