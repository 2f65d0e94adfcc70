"""Global attention, 50 genes: the engine against the published formula taken literally, and its memory."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest
import torch

from alone import predict_alone
from stpath_export.exporter import export_engine
from stpath_export.proof import random_slide, relative_l2
from stpath_runtime import Engine
from stpath_runtime.manifest import Manifest
from stpath_runtime.vocabulary import GeneVocabulary
from stpath_train.inputs import slide_inputs
from stpath_train.literal import literal_forward

GENES = list(GeneVocabulary.published().ensembl_ids[:50])
ROUNDS = 5


def test_speed_at_3000_spots(benchmark, model, engine_path, report):
    """Interleaved: the literal formula runs before each round of the engine."""
    engine = Engine.load(engine_path)
    slide = random_slide(3000, 1536, 0)
    inputs = slide_inputs(slide, engine.vocabulary)
    literal_seconds, literal_out = [], []

    def literal():
        start = time.perf_counter()
        with torch.inference_mode():
            expression = literal_forward(model, **inputs)[1][:, 2:52]
        literal_seconds.append(time.perf_counter() - start)
        literal_out.append(expression.numpy())

    def predict():
        return engine.decode(engine.embed(slide), GENES)

    predict()  # sessions are loaded on the first call
    found = benchmark.pedantic(predict, setup=literal, rounds=ROUNDS)
    engine_seconds = benchmark.stats.stats.data
    ratios = [a / b for a, b in zip(literal_seconds, engine_seconds, strict=True)]
    benchmark.extra_info.update(literal_seconds=literal_seconds, ratios=ratios)
    error = relative_l2(found, literal_out[-1])
    report(
        "3,000 spots, 50 genes, fp32: literal formula / engine",
        f"{statistics.median(literal_seconds):.2f} s / {statistics.median(engine_seconds):.2f} s = "
        f"{statistics.median(ratios):.1f}x (pairs {min(ratios):.1f} to {max(ratios):.1f}); "
        f"relative difference {error:.1e}",
        "10x",
    )


@pytest.mark.parametrize(("spots", "goal"), [(5_000, "2 GB"), (20_000, "2.5 GB")])
def test_memory(engine_path, report, spots, goal):
    found = predict_alone(engine_path, spots)
    report(
        f"{spots:,} spots, global, 50 genes, fp32: peak memory of the process above the features",
        f"{found['above_features'] / 1e9:.2f} GB ({found['seconds']:.1f} s)",
        goal,
    )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parity(engine_path, tmp_path, report, precision):
    """The proof that every export is published with, on the published sizes."""
    engine = engine_path
    if precision != "fp32":
        engine = tmp_path / "engine"
        export_engine(engine_path.with_name("checkpoint.safetensors"), engine, precision=precision)
    rows = Manifest.read(engine).parity["cases"]
    worst = max(rows, key=lambda row: row["relative_l2"] / row["bar_l2"])
    pearson = min(row["pearson_min"] for row in rows if row["pearson_min"] is not None)
    report(
        f"parity with float64, {precision}: worst relative L2 of {len(rows)} comparisons, lowest Pearson of a gene",
        f"{worst['relative_l2']:.1e}, {pearson:.7f}",
        f"{worst['bar_l2']:.1e}",
    )


def test_start(report):
    for what, words in {
        "import stpath_runtime": ["-c", "import stpath_runtime"],
        "stpath --help": ["-m", "stpath_runtime", "--help"],
    }.items():
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], capture_output=True, check=True)
            seconds.append(time.perf_counter() - start)
        spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
        report(what, f"{statistics.median(seconds):.2f} s (7 runs, {spread})", "0.5 s")
