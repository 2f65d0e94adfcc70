"""Statistics of all genes from embeddings, and from values, against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from viewing import brute_force

from stpath_runtime.viewer.head import Head
from stpath_runtime.viewer.statistics import Embedded
from stpath_runtime.viewer.stored import Columns


def near(found, exact, scale=None):
    assert np.abs(found - exact).max() <= 1e-4 * (np.abs(exact).max() if scale is None else scale)


def made(seed, n, d, genes, dtype=np.float32, offset=0.0):
    """Embeddings, a head, and the expression by the definition in float64."""
    rng = np.random.default_rng(seed)
    embedding = (rng.standard_normal((n, d)) + offset * rng.standard_normal(d)).astype(dtype)
    weights = rng.standard_normal((genes, d)).astype(np.float32)
    weights -= weights.mean(axis=1, keepdims=True)
    head = Head(weights, rng.standard_normal(genes).astype(np.float32))
    e = embedding.astype(np.float64)
    n_ = (e - e.mean(1, keepdims=True)) / np.sqrt(e.var(1, keepdims=True) + 1e-5)
    return Embedded(embedding, head), n_ @ weights.T.astype(np.float64) + head.offsets


def test_the_head_of_an_engine_is_what_it_decodes(loaded, predicted, every_gene):
    embedded = Embedded(predicted.obsm["stpath_embedding"], Head.of(loaded))
    near(embedded.expression(slice(None), slice(None)), every_gene)
    for gene in (0, 7, len(loaded.vocabulary) - 1):
        near(embedded.gene(gene), every_gene[:, gene])
    assert np.abs(embedded.head.weights.sum(axis=1)).max() < 1e-5


@settings(max_examples=40, deadline=None)
@example(seed=228633, n=20, d=4, share=0.0625, dtype=np.float32, offset=0.0)  # two of three spots nearly the same
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(20, 300),
    d=st.integers(4, 40),
    share=st.floats(0.01, 0.99),
    dtype=st.sampled_from([np.float32, np.float16]),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_a_contrast_is_that_of_brute_force(seed, n, d, share, dtype, offset):
    embedded, values = made(seed, n, d, 9, dtype, offset)
    rng = np.random.default_rng(seed)
    inside = np.sort(rng.permutation(n)[: min(n - 1, max(1, round(share * n)))])
    rest = np.setdiff1d(np.arange(n), inside)
    other = np.sort(rng.permutation(n)[: rng.integers(2, n + 1)])
    for against, given_ in ((rest, None), (other, other)):
        for expression in (embedded, Columns(values.astype(np.float32))):
            found = expression.contrast(inside, given_)
            exact = brute_force(values, inside, against)
            for got, wanted in zip((found.inside, found.against, found.difference, found.effect), exact, strict=True):
                near(got, wanted, max(1.0, np.abs(wanted).max()))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(20, 200), d=st.integers(4, 40))
def test_correlations_are_those_of_brute_force(seed, n, d):
    embedded, values = made(seed, n, d, 9)
    exact = np.corrcoef(values.T)[4]
    for expression in (embedded, Columns(values.astype(np.float32))):
        near(expression.correlations(4), exact, 1.0)


def test_what_hardly_varies_keeps_its_digits():
    """All spots nearly alike: their spread is a thousandth of what they share."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal(64)
    embedding = (shared + 1e-3 * rng.standard_normal((5000, 64))).astype(np.float32)
    weights = rng.standard_normal((20, 64)).astype(np.float32)
    weights -= weights.mean(axis=1, keepdims=True)
    embedded = Embedded(embedding, Head(weights, np.zeros(20, np.float32)))
    e = embedding.astype(np.float64)
    values = (e - e.mean(1, keepdims=True)) / np.sqrt(e.var(1, keepdims=True) + 1e-5) @ weights.T.astype(np.float64)
    inside, rest = np.arange(700), np.arange(700, 5000)
    near(embedded.contrast(inside).effect, brute_force(values, inside, rest)[3], 0.1)
    near(embedded.correlations(0), np.corrcoef(values.T)[0], 1.0)


@pytest.mark.parametrize("columns", [False, True])
def test_a_gene_that_does_not_vary_has_no_effect_and_no_correlation(columns):
    embedded, values = made(0, 50, 8, 5)
    embedded.head.weights[2] = 0
    values[:, 2] = 1.5
    expression = Columns(values.astype(np.float32)) if columns else embedded
    assert np.isnan(expression.contrast(np.arange(10)).effect[2])
    assert np.isfinite(np.delete(expression.contrast(np.arange(10)).effect, 2)).all()
    assert np.isnan(expression.correlations(2)).all()
    assert np.isnan(expression.correlations(1)[2])


@pytest.mark.parametrize("columns", [False, True])
def test_two_spots_have_no_deviation(columns):
    embedded, values = made(0, 2, 8, 5)
    expression = Columns(values.astype(np.float32)) if columns else embedded
    assert np.isnan(expression.contrast(np.array([0])).effect).all()
