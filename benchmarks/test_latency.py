"""How long a slide takes, from features in memory to expression: by spots, k, genes, context, precision and tile."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from published import engine as published_engine
from stpath_runtime import Context, Engine
from stpath_runtime.measures.bench import roofline
from stpath_runtime.slides.slide import random_slide
from variants import DTYPES, Case, by_engines, by_torch, collapsed, in_precision, predict

K = 32
ENGINES_ALONE = 20_000  # spots, from which PyTorch would take most of a quick run


def quick(*values):
    return pytest.param(*values, marks=pytest.mark.quick)


@pytest.fixture
def everything(model, engines):
    """Calls of all variants for a case."""
    return lambda what, case: {
        **by_engines(what, engines, case),
        **by_torch(what, model, engines[0].vocabulary, case),
    }


@pytest.mark.parametrize(
    ("attention", "k", "spots"),
    [
        *(("global", 0, 500), quick("global", 0, 3_000), ("global", 0, 5_000), ("global", 0, 20_000)),
        *(("knn", K, 500), quick("knn", K, 3_000), ("knn", K, 5_000), quick("knn", K, 20_000)),
    ],
)
def test_by_spots(compare, everything, engines, panel, size, peaks, pytestconfig, attention, k, spots):
    case = Case(random_slide(size(spots), engines[0].manifest.model.n_features, 0), attention, k, panel)
    some = pytestconfig.getoption("--quick") and spots >= ENGINES_ALONE
    calls = by_engines("latency", engines, case) if some else everything("latency", case)
    compare(calls, case, _limit(engines[0], case, peaks))


def test_200000_spots(in_turn, report, engines, panel, size, peaks):
    """kNN alone: how time grows with the spots; beside no reference, which would take too long."""
    case = Case(random_slide(size(200_000), engines[0].manifest.model.n_features, 0), "knn", K, panel)
    calls = by_engines("latency", engines, case)
    limit = _limit(engines[0], case, peaks)
    report([replace(row, limit=limit if row.precision == "fp32" else None) for row in in_turn(calls)])


@pytest.mark.parametrize("k", [8, 16, 32, 64, 128])
def test_by_k(compare, everything, engines, panel, size, k):
    case = Case(random_slide(size(5_000), engines[0].manifest.model.n_features, 0), "knn", k, panel)
    compare(everything("latency by k", case), case)


@pytest.mark.parametrize("genes", [50, 1_000, None])
def test_by_genes(compare, everything, engines, size, genes):
    """None: all."""
    if genes is not None and genes > len(engines[0].vocabulary):
        pytest.skip("the model has fewer genes")
    names = engines[0].vocabulary.ensembl_ids[:genes] if genes else None
    case = Case(random_slide(size(3_000), engines[0].manifest.model.n_features, 0), "global", 0, names)
    compare(everything("latency by genes", case), case)


@pytest.mark.parametrize("share", [0, 0.05, 0.5])
def test_by_context(compare, everything, engines, panel, size, share):
    """A share of the spots with counts of 1,000 genes."""
    spots = size(3_000)
    genes = engines[0].vocabulary.ensembl_ids[:1_000]
    rng = np.random.default_rng(0)
    some = np.sort(rng.choice(spots, int(share * spots), replace=False))
    context = Context(some, rng.poisson(2.0, (len(some), len(genes))), list(genes)) if share else None
    slide = random_slide(spots, engines[0].manifest.model.n_features, 0)
    case = Case(slide, "global", 0, panel, context)
    compare(everything("latency by context", case), case)


@pytest.mark.parametrize(("attention", "k", "spots"), [("global", 0, 3_000), ("knn", K, 5_000)])
def test_by_precision(compare, model, engines, panel, size, pytestconfig, attention, k, spots):
    """Engines in every precision that runs here, fp16 by an engine of its own, and PyTorch's."""
    what, vocabulary = "latency by precision", engines[0].vocabulary
    case = Case(random_slide(size(spots), engines[0].manifest.model.n_features, 0), attention, k, panel)
    low = [] if pytestconfig.getoption("--engine") else [Engine.load(published_engine("fp16"))]
    calls = by_engines(what, [*engines, *low], case)
    for name, dtype in DTYPES.items():
        row = case.row(what, vocabulary, variant="PyTorch eager", precision=name)
        calls[row] = partial(collapsed, in_precision(model, dtype), vocabulary, case, dtype)
    compare(calls, case)


@pytest.mark.parametrize(("attention", "k", "spots"), [("global", 0, 5_000), ("knn", K, 20_000)])
def test_by_tile(compare, engines, panel, size, attention, k, spots):
    """Rows of a block's tile; PyTorch has none to choose."""
    case = Case(random_slide(size(spots), engines[0].manifest.model.n_features, 0), attention, k, panel)
    calls = {
        replace(row, tile=tile): partial(predict, engine, case, tile)
        for row, engine in zip(by_engines("latency by tile", engines, case), engines, strict=True)
        for tile in (1024, 128, 256, 512, 2048)
    }
    compare(calls, case)


def _limit(engine: Engine, case: Case, peaks: roofline.Peaks) -> float:
    """Seconds of encoder and head that the peaks of this machine allow."""
    model, spots, genes = engine.manifest.model, len(case.slide), len(case.genes)
    keys = roofline.keys_of_a_spot(case.slide.coords, case.attention, case.neighbors)
    encoder = peaks.seconds(roofline.encoder_operations(model, spots, keys), roofline.encoder_bytes(model, spots))
    head = roofline.decoder_operations(model, spots, genes), roofline.decoder_bytes(model, spots, genes)
    return encoder + peaks.seconds(*head)
