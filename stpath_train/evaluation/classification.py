"""Weakly supervised classification of slides: multiple-instance learning on what a model gives of their spots.

S slides, K classes; a bag is a slide's embeddings [N, d] or predicted expression [N, G].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import EvaluationError
from stpath_runtime.progress import OnTile
from stpath_train.store import Record, Store

from . import metrics, plots
from .predictor import Predictor
from .results import Evaluation, Row
from .slides import read_each, require_slides

PROTOCOLS = {
    "model": "attention-based multiple-instance learning with gated attention (Ilse et al. 2018), a bag a slide",
    "folds": "cross-validation, stratified by label; slides of one patient stay in one fold",
    "pooled": "AUC over all slides, each scored by the model of the fold that it was left out of; 95% interval from "
    "100 bootstraps over the slides. Of several classes: one against the rest, mean of the classes",
}
Bag = npt.NDArray[Any]


def evaluate_classification(
    predictor: Predictor,
    store: Store,
    genes: Sequence[str] | None,
    slides: Sequence[str],
    folds: int,
    seed: int,
    on_slide: OnTile | None = None,
) -> Evaluation:
    """Classify slides by their labels, in cross-validation.

    Parameters
    ----------
    genes
        Classify from the predicted expression of these; None: from the embeddings.

    Raises
    ------
    InputError
        If a slide has no label, all have the same, or a label has fewer patients than there are folds.
    """
    require_slides(store, slides, fewest=1)
    if genes is not None:
        store.vocabulary.tokens(genes)  # known; they need not be measured
    records = [store.records[slide] for slide in slides]
    labels = require_labels(records, folds)
    bags: list[Bag] = []
    for _, _, slide in read_each(store, slides, on_slide):
        embedding = predictor.embed(slide)
        bags.append(embedding if genes is None else predictor.decode(embedding, genes))
    classes = np.array([labels.index(record.label) for record in records])
    fold, probabilities = cross_validate(bags, classes, patients_of(records), folds, seed)
    kind = "embeddings" if genes is None else f"predicted expression of {len(genes):,} genes"
    figures = _figures(classes, probabilities, fold, kind, seed)
    title = f"slides classified from {kind}\n{plots.counted(len(slides), 'slide')}, {folds} folds"
    curve = plots.roc_figure(classes, probabilities, labels, figures[0], title)
    return Evaluation(
        "classification", PROTOCOLS, figures, _rows(records, labels, fold, probabilities), {"roc.png": curve}
    )


def patients_of(records: Sequence[Record]) -> list[str]:
    """The patient of each slide; a slide without one is of a patient of its own."""
    return [f"patient {record.patient}" if record.patient else f"slide {record.slide}" for record in records]


def require_labels(records: Sequence[Record], folds: int) -> list[str]:
    """The labels, sorted, if they can be cross-validated.

    Raises
    ------
    InputError
        If a slide has no label, all have the same, or a label has fewer patients than there are folds.
    """
    if unlabelled := [record.slide for record in records if not record.label]:
        raise EvaluationError(f"slide {unlabelled[0]}: no label in slides.csv; label it, or leave it out (--slides)")
    labels = sorted({record.label for record in records})
    if len(labels) < 2:
        raise EvaluationError(
            f"all {len(records):,} slides have the label {labels[0]!r}; classification needs two or more"
        )
    pairs = {(patient, record.label) for patient, record in zip(patients_of(records), records, strict=True)}
    patients = Counter(label for _, label in pairs)
    rarest = min(labels, key=lambda label: patients[label])
    if patients[rarest] < folds:
        held = "1 patient" if patients[rarest] == 1 else f"{patients[rarest]:,} patients"
        raise EvaluationError(
            f"label {rarest!r}: {held} for {folds} folds; each fold needs one: give fewer folds "
            "(--folds), or more slides"
        )
    return labels


def cross_validate(
    bags: Sequence[Bag], classes: npt.NDArray[np.int64], patients: Sequence[str], folds: int, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The fold of each slide [S], and the probabilities [S, K] that the model trained without that fold gives it.

    Raises
    ------
    InputError
        If a fold takes all slides of a class.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    from .mil import fit_mil

    n_classes = int(classes.max()) + 1
    fold = np.full(len(bags), -1)
    probabilities = np.full((len(bags), n_classes), np.nan)
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(bags, classes, patients)
    for i, (train, test) in enumerate(splits):
        if len(np.unique(classes[train])) < n_classes:
            raise EvaluationError(
                f"fold {i} takes all slides of a label, as of one patient; give more slides or fewer folds"
            )
        model = fit_mil([bags[j] for j in train], classes[train], n_classes, seed)
        fold[test], probabilities[test] = i, model.predict([bags[j] for j in test])
    return fold, probabilities


def _figures(
    classes: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
    fold: npt.NDArray[np.int64],
    kind: str,
    seed: int,
) -> list[Row]:
    def resampled(slides: npt.NDArray[np.int64]) -> float:
        return metrics.auc_of_classes(classes[slides], probabilities[slides])

    low, high = metrics.interval(metrics.resample(resampled, (np.arange(len(classes)),), seed)).tolist()
    about = {"input": kind, "metric": "AUC"}
    value = metrics.auc_of_classes(classes, probabilities)
    pooled = {"protocol": "pooled", **about, "value": value, "low": low, "high": high, "slides": len(classes)}
    by_fold = [metrics.auc_of_classes(classes[fold == i], probabilities[fold == i]) for i in np.unique(fold)]
    mean, std = metrics.mean_and_std(np.array(by_fold))
    defined = int(np.isfinite(by_fold).sum())
    return [pooled, {"protocol": "folds", **about, "value": mean, "std": std, "folds": defined, "slides": len(classes)}]


def _rows(
    records: Sequence[Record],
    labels: Sequence[str],
    fold: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
) -> list[Row]:
    return [
        {
            "slide": record.slide, "patient": record.patient, "label": record.label, "fold": int(of),
            **{f"probability {label}": float(p) for label, p in zip(labels, row, strict=True)},
        }
        for record, of, row in zip(records, fold, probabilities, strict=True)
    ]  # fmt: skip
