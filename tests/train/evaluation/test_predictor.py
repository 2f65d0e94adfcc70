"""An engine and a checkpoint give the same numbers, and a model that does not fit the store is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from evaluation_helpers import GENES, fill_store

from helpers import made_up_vocabulary, relative_l2
from stpath_runtime.errors import InputError
from stpath_runtime.manifest import ModelConfig
from stpath_train.checkpoint import save_checkpoint, seeded_checkpoint
from stpath_train.evaluation.baselines import fit_baselines, fit_mean, fit_ridge
from stpath_train.evaluation.predictor import CheckpointPredictor, open_predictor
from stpath_train.inputs import slide_inputs
from stpath_train.store import Store


def test_engine_and_checkpoint_agree(store, tiny_engine, tiny_checkpoint):
    adata = store.read("S1")
    slide, context = store.as_slide(adata, "S1"), store.as_context(adata, "S1", np.arange(0, 64, 5))
    engine, of_engine = open_predictor(tiny_engine, None, store)
    checkpoint, of_checkpoint = open_predictor(None, tiny_checkpoint, store)
    for given in (None, context):
        a, b = (model.embed(slide, context=given) for model in (engine, checkpoint))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
        a, b = (model.decode(embedding, GENES) for model, embedding in ((engine, a), (checkpoint, b)))
        assert a.shape == b.shape == (64, len(GENES))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
    assert of_engine["attention"] == of_checkpoint["attention"] == "global"
    assert set(of_engine) - set(of_checkpoint) == {"engine"}


def test_a_checkpoint_trained_with_knn_attends_so(store, tiny, tmp_path):
    config = ModelConfig(**{**vars(tiny.model.config), "attention": "knn", "neighbors": 5})
    model = seeded_checkpoint(config, 0)
    save_checkpoint(model, tmp_path / "knn.safetensors")
    predictor = CheckpointPredictor(tmp_path / "knn.safetensors", store.vocabulary)
    slide = store.as_slide(store.read("S0"), "S0")
    expected = model.embed(**slide_inputs(slide, store.vocabulary, neighbors=5))
    assert relative_l2(predictor.embed(slide), expected) < 1e-5
    assert relative_l2(predictor.embed(slide), model.embed(**slide_inputs(slide, store.vocabulary))) > 1e-3
    _, provenance = open_predictor(None, tmp_path / "knn.safetensors", store)
    assert (provenance["attention"], provenance["neighbors"]) == ("knn", 5)


def test_a_model_that_does_not_fit_the_store_is_refused(tiny, store, tiny_engine, tiny_checkpoint, tmp_path):
    width = tiny.model.config.n_features
    other = fill_store(tmp_path / "other", made_up_vocabulary(60), width, slides=1)
    narrow = fill_store(tmp_path / "narrow", tiny.vocabulary, 8, slides=1)

    def refused(engine: Path | None, checkpoint: Path | None, of: Store, message: str) -> None:
        with pytest.raises(InputError, match=message):
            open_predictor(engine, checkpoint, of)

    refused(None, None, store, "give one model")
    refused(tiny_engine, tiny_checkpoint, store, "give one model")
    refused(tiny_engine, None, other, "a store of another vocabulary")
    refused(None, tiny_checkpoint, other, "a model of 202 gene tokens; the vocabulary of .* has 60")
    for model in ((tiny_engine, None), (None, tiny_checkpoint)):
        refused(*model, narrow, f"features {width} wide; those of .* are 8")


@pytest.mark.parametrize(("spots", "genes"), [(2_000, 7), (40, 1), (2, 3)])
def test_ridge_is_that_of_scikit_learn(spots, genes):
    """As HEST-bench calls it, with an intercept, but for the step at which rounding ends LSQR."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    features = rng.standard_normal((spots, 60)) @ rng.standard_normal((60, 60))
    expression = np.log1p(rng.poisson(np.exp(features[:, :1] / 9 + rng.random(genes))))
    components = min(60, spots)
    ridge = Ridge(alpha=100 / (components * genes), solver="lsqr", max_iter=1000)
    pipeline = make_pipeline(StandardScaler(), PCA(components, random_state=0), ridge).fit(features, expression)
    wanted = pipeline.predict(features).reshape(-1, genes)
    assert relative_l2(fit_ridge(features, expression, seed=0)(features), wanted) < 1e-3


def test_mean_and_ridge_of_made_up_data():
    rng = np.random.default_rng(0)
    features = rng.standard_normal((200, 5)) * [1, 2, 3, 4, 5]
    expression = features @ rng.standard_normal((5, 3)) + [1, 2, 3]
    assert fit_mean(expression)(features[:2]).tolist() == [pytest.approx(expression.mean(axis=0))] * 2
    found = fit_ridge(features, expression, seed=0)(features[:10])
    # alpha = 100 / (5 * 3) beside 200 spots of unit deviation shrinks the weights by 200 / 206.7: 3%.
    centred = expression.mean(axis=0) + (expression - expression.mean(axis=0))[:10] * 200 / (200 + 100 / 15)
    np.testing.assert_allclose(found, centred, atol=0.02 * np.abs(expression).max())
    one = fit_ridge(features, expression[:, :1], seed=0)(features[:10])
    assert one.shape == (10, 1)


def test_baselines_learn_from_the_training_slides(store):
    fitted = fit_baselines(store, ["S0", "S1"], GENES, seed=0)
    assert set(fitted) == {"mean", "ridge"}
    adata = store.read("S2")
    predicted = {name: baseline(adata.obsm["features"]) for name, baseline in fitted.items()}
    counts = [
        store.read(slide).to_df()[store.vocabulary.gene_ids(store.vocabulary.tokens(GENES))] for slide in ("S0", "S1")
    ]
    expected = np.log1p(np.concatenate(counts)).mean(axis=0)
    np.testing.assert_allclose(predicted["mean"], np.tile(expected, (64, 1)), rtol=1e-5)
    truth = np.log1p(adata.to_df()[store.vocabulary.gene_ids(store.vocabulary.tokens(GENES))].to_numpy())
    assert np.mean([np.corrcoef(truth[:, g], predicted["ridge"][:, g])[0, 1] for g in range(len(GENES))]) > 0.3
