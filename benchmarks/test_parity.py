"""The proof of parity with float64, on the published sizes: every backend and precision that runs here."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import pytest

import published
from stpath_export.proof import prove
from stpath_runtime.measures.bench.results import Row


@pytest.mark.parametrize("stored", ["fp32", "fp16"])
def test_proof(report, model, engine_path, engines, pytestconfig, stored):
    """The worst comparison of each; the seconds are those of the whole proof."""
    if stored == "fp16" and pytestconfig.getoption("--engine"):
        pytest.skip("of the published sizes alone")
    path = engine_path if stored == "fp32" else published.engine("fp16")
    ways = [(e.backend.name, e.precision) for e in engines] if stored == "fp32" else [("onnxruntime", "fp16")]
    for backend, precision in ways:
        start = perf_counter()
        proof = prove(path, model, backend=backend, precision=precision)
        seconds = perf_counter() - start
        worst = max(proof["cases"], key=lambda case: case["relative_l2"] / case["bar_l2"])
        pearson = min(case["pearson_min"] for case in proof["cases"] if case["pearson_min"] is not None)
        note = f"{len(proof['cases'])} comparisons, bar {worst['bar_l2']:.1e}, lowest Pearson of a gene {pearson:.7f}"
        row = Row("proof", backend=backend, precision=precision, seconds=(seconds,), note=note)
        report([replace(row, relative_l2=worst["relative_l2"], parity="float64")])
        assert proof["passed"]
