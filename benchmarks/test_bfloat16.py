"""OpenVINO in bfloat16 and float32 against ONNX Runtime in float32, and against the published formula, interleaved.

The goals are those of 2 cores with AMX; a CPU without bfloat16 is skipped.
"""

from __future__ import annotations

import os
import statistics
import warnings

import pytest
import torch
from test_knn import K, interleaved

from stpath_export.proof import random_slide, relative_l2
from stpath_runtime import Engine
from stpath_runtime.doctor import cpu_features
from stpath_runtime.vocabulary import GeneVocabulary
from stpath_train.inputs import slide_inputs
from stpath_train.literal import literal_forward

GENES = list(GeneVocabulary.published().ensembl_ids[:50])
ROUNDS = 5
SPOTS_KNN = int(os.environ.get("STPATH_BENCH_SPOTS", "20000"))  # fewer to try the script
SPOTS_GLOBAL = SPOTS_KNN // 4


@pytest.fixture(autouse=True)
def _no_notes_on_approximation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def engines(engine_path) -> dict[str, Engine]:
    if not {"amx_bf16", "avx512_bf16"} & set(cpu_features()):
        pytest.skip("this CPU has no bfloat16")
    return {
        "OpenVINO bf16": Engine.load(engine_path, backend="openvino", precision="bf16"),
        "OpenVINO fp32": Engine.load(engine_path, backend="openvino"),
        "ONNX Runtime fp32": Engine.load(engine_path),
    }


def ratios(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    pairs = [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]
    return f"{statistics.median(pairs):.1f}x (pairs {min(pairs):.1f} to {max(pairs):.1f})"


def test_knn_encoder(engines, report):
    slide = random_slide(SPOTS_KNN, 1536, 0)
    ways = {name: lambda e=engine: e.embed(slide, attention="knn", neighbors=K) for name, engine in engines.items()}
    seconds = interleaved(ways, ROUNDS)
    features = ", ".join(cpu_features())
    for name, found in seconds.items():
        rate, low, high = (SPOTS_KNN / pick(found) for pick in (statistics.median, max, min))
        goal = "25,000 spots/s with AMX" if name == "OpenVINO bf16" else ""
        measured = f"{rate:,.0f} spots/s ({low:,.0f} to {high:,.0f})"
        report(f"{SPOTS_KNN:,} spots, kNN {K}: encoder, {name} ({features})", measured, goal)
    faster = ratios(seconds, "ONNX Runtime fp32", "OpenVINO bf16")
    error = relative_l2(ways["OpenVINO bf16"](), ways["ONNX Runtime fp32"]())
    report("the same: ONNX Runtime fp32 / OpenVINO bf16", f"{faster}; relative difference {error:.1e}", "2.5x with AMX")


def test_global_against_the_literal_formula(engines, model, report):
    slide = random_slide(SPOTS_GLOBAL, 1536, 0)
    inputs = slide_inputs(slide, engines["OpenVINO bf16"].vocabulary)

    def literal():
        with torch.inference_mode():
            return literal_forward(model, **inputs)[1][:, 2:52].numpy()

    ways = {name: lambda e=engine: e.decode(e.embed(slide), GENES) for name, engine in engines.items()}
    seconds = interleaved({"literal": literal, **ways}, 3)
    error = relative_l2(ways["OpenVINO bf16"](), literal())
    for name in ways:
        medians = f"{statistics.median(seconds['literal']):.2f} s / {statistics.median(seconds[name]):.2f} s"
        report(
            f"{SPOTS_GLOBAL:,} spots, global, 50 genes: literal formula fp32 / {name}",
            f"{medians} = {ratios(seconds, 'literal', name)}"
            + (f"; relative difference {error:.1e}" if name == "OpenVINO bf16" else ""),
            "25x with AMX" if name == "OpenVINO bf16" else "",
        )
