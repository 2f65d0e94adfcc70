"""The numbers of STPath's README on its example, where the user has the published weights and the example."""

from __future__ import annotations

import json
import os
from pathlib import Path

import anndata
import numpy as np
import pytest

from stpath_runtime.readers import read_slide
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.evaluation.imputation import masked_spots
from stpath_train.evaluation.metrics import mean, pearson_by_gene
from stpath_train.evaluation.predictor import CheckpointPredictor

NEEDED = ("STPATH_WEIGHTS", "STPATH_SYMBOLS", "STPATH_EXAMPLE")
missing = [name for name in NEEDED if not os.environ.get(name)]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"needs stfm.pth, symbol2ensembl.json and STPath's example_data in {', '.join(missing)}"
)


@pytest.fixture(scope="module")
def example():
    """The predictor, the slide, its raw counts and the 50 genes."""
    weights, symbols, folder = (Path(os.environ[name]) for name in NEEDED)
    predictor = CheckpointPredictor(weights, GeneVocabulary.read(symbols))
    slide = read_slide(folder / "INT2.h5", organ="Kidney", technology="Visium")
    adata = anndata.read_h5ad(folder / "INT2.h5ad")[slide.obs_names]
    genes = json.loads((folder / "var_50genes.json").read_text())["genes"]
    return predictor, slide, adata, genes


def test_mean_pearson_without_context(example):
    predictor, slide, adata, genes = example
    truth = np.log1p(adata[:, genes].X.toarray())
    predicted = predictor.decode(predictor.embed(slide), genes)
    assert mean(pearson_by_gene(truth, predicted)) == pytest.approx(0.1562, abs=5e-5)


# Genes that the model does not know are left out of a context, with a warning; the published code does so silently.
@pytest.mark.filterwarnings("ignore::stpath_runtime.errors.InputWarning")
def test_mean_pearson_with_5_percent_of_the_spots_as_context(example):
    predictor, slide, adata, genes = example
    masked = masked_spots(slide.coords, 0.95)
    rest = np.setdiff1d(np.arange(len(slide)), masked)
    context = Context(rest, adata.X[rest], list(adata.var_names))
    truth = np.log1p(adata[:, genes].X.toarray())[masked]
    predicted = predictor.decode(predictor.embed(slide, context=context), genes)[masked]
    assert mean(pearson_by_gene(truth, predicted)) == pytest.approx(0.2449, abs=5e-5)
