"""A prediction with embeddings, and its viewer by the real server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from viewing import SPOTS, Client

from stpath_runtime import Context, Engine
from stpath_runtime.slides.slide import random_slide
from stpath_runtime.viewer.server import served
from stpath_runtime.viewer.shown import open_shown


@pytest.fixture(scope="session")
def loaded(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


@pytest.fixture(scope="session")
def predicted(loaded):
    """An AnnData of three genes with embeddings, and context spots."""
    counts = np.random.default_rng(0).poisson(2, (5, 2))
    context = Context(np.arange(5), counts, loaded.vocabulary.ensembl_ids[:2])
    slide = random_slide(SPOTS, loaded.manifest.model.n_features, 3, organ="Kidney")
    found = loaded.predict(slide, genes=["GENE1", "GENE3", "GENE2"], context=context, embeddings=True)
    found.obs_names = [f"ACGT{i}-1" for i in range(SPOTS)]
    return found


@pytest.fixture(scope="session")
def every_gene(loaded, predicted) -> np.ndarray:
    """Expression of all genes, decoded, [N, G]."""
    return loaded.decode(predicted.obsm["stpath_embedding"])


@pytest.fixture
def prediction(predicted, tmp_path) -> Path:
    predicted.write_h5ad(tmp_path / "prediction.h5ad")
    return tmp_path / "prediction.h5ad"


@pytest.fixture
def shown(prediction, loaded):
    with open_shown(prediction, loaded) as found:
        yield found


@pytest.fixture
def client(shown):
    with served(shown) as address:
        yield Client(address)
