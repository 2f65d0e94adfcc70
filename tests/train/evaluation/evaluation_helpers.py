"""Slides that the tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from stpath_train.store import Record, Store, Task, highly_variable, measured

GENES = [f"GENE{i}" for i in range(6)]


def fill_store(path: Path, vocabulary, n_features: int, source: str = "made up", slides: int = 6) -> Store:
    """Slides of 64 spots on a grid, in two halves: features and counts of 40 genes follow the half."""
    store = Store.create(path, vocabulary)
    rng = np.random.default_rng(0)
    grid = np.array([(x, y) for x in range(8) for y in range(8)]) * 100
    right = grid[:, 0] >= 400
    effect = rng.standard_normal((2, 40))
    for i in range(slides):
        rate = np.exp(1 + effect[right.astype(int)] + (i % 2) * 0.5)
        adata = measured(rng.poisson(rate), vocabulary.symbols[:40], vocabulary, "made up")
        adata.obs_names = [f"S{i}-{spot}" for spot in range(64)]
        adata.obs["region"] = np.where(right, "tumour", "stroma")
        adata.obs.loc[adata.obs_names[:3], "region"] = None
        adata.obs["everywhere"] = "tumour"
        adata.obsm["spatial"] = grid
        features = rng.standard_normal((64, n_features)) + 2 * right[:, None] + (i % 2)
        adata.obsm["features"] = features.astype(np.float32)
        adata.var["highly_variable"] = highly_variable(adata, 10, adata.X.log1p())
        about = {"patient": f"p{i}", "label": ("benign", "malignant")[i % 2], "source": source}
        store.add(Record(f"S{i}", "Kidney", "Visium", **about), adata)
    folds = [{"train": ["S0", "S1", "S2"], "test": ["S3", "S4"]}, {"train": ["S3", "S4"], "test": ["S0"]}]
    store.add_task("TINY", Task(GENES, folds))
    return store
