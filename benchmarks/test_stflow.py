"""STFlow at its published sizes: against the reference computed the published way, many samples, and a large slide."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stpath_export.stflow.exporter import write_flow_engine
from stpath_runtime import Engine
from stpath_runtime.manifest import FlowConfig
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import Call, in_turn
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_runtime.stflow.sampler import times
from stpath_runtime.stflow.starts import draw_start
from stpath_train.stflow import SIGNS, STFlow, seeded_flow

CONFIG = FlowConfig()
SPOTS, LARGE, SAMPLES = 5_000, 100_000, 16


@pytest.fixture(scope="module")
def model() -> STFlow:
    return seeded_flow(CONFIG, 0)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("stflow") / "engine"
    path.mkdir()
    genes = GeneVocabulary.of_names([f"GENE{i}" for i in range(CONFIG.n_genes)], "genes")
    write_flow_engine(model, genes, path, "fp32", {"name": "seeded", "sha256": "0" * 64}, "random")
    return path


def a_slide(spots: int) -> Slide:
    """Random places, about 200 pixels apart, and random features."""
    rng = np.random.default_rng(0)
    places = rng.random((spots, 2)) * 200 * spots**0.5
    return Slide(places, rng.standard_normal((spots, CONFIG.n_features), np.float32), name="random")


def published_way(model: STFlow, slide: Slide, start: np.ndarray) -> torch.Tensor:
    """A sample with neighbours, frames and edges found anew in every layer of every step, as in the published code."""
    features, coords = torch.from_numpy(slide.features), torch.from_numpy(slide.coords).float()
    tokens, y = model.image_transform(features), torch.from_numpy(start)
    for step, t in enumerate(times(CONFIG.steps)):
        h, state, predictions = tokens + model.fourier_proj(torch.tensor(t)), y, []
        for block in model.blocks:
            distance = torch.cdist(coords, coords).fill_diagonal_(torch.inf)
            neighbors = distance.topk(CONFIG.neighbors, largest=False).indices
            away = coords[neighbors] - coords[:, None]
            centred = away - away.mean(dim=1, keepdim=True)
            _, axes = torch.linalg.eigh(centred.transpose(1, 2) @ centred)
            frames = torch.cat([centred @ axes, away.norm(dim=-1, keepdim=True)], dim=-1)
            edges = [block.attn.edge_trans(frames * torch.tensor([*signs, 1.0])) for signs in SIGNS]
            h, state = block(h, state, torch.stack(edges).mean(dim=0), neighbors)
            predictions.append(state)
        y = y + (torch.stack(predictions).mean(dim=0) - y) / (CONFIG.steps - 1 - step)
    return y


@pytest.fixture
def timed(rounds):
    """Time calls in turn, each warmed."""

    def time(calls: dict[Row, Call]) -> list[Row]:
        for call in calls.values():
            call()
        return in_turn(calls, rounds)

    return time


@pytest.mark.quick
def test_against_the_published_way(report, timed, model, folder, size):
    slide, engine = a_slide(size(SPOTS)), Engine.load(folder)
    start = draw_start(CONFIG, len(slide), 0, 0)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()
        arrays = (torch.from_numpy(array).double() for array in (slide.features, slide.coords, start))
        error = relative_l2(engine.predict(slide).X, exact.sample(*arrays).numpy())
        assert error <= 1e-5
        row = Row("STFlow: a sample", spots=len(slide), genes=CONFIG.n_genes)
        report(
            timed({
                replace(row, relative_l2=error, parity="float64"): lambda: engine.predict(slide),
                replace(row, variant="the published way"): lambda: published_way(model, slide, start),
            })
        )  # fmt: skip


def test_many_samples_against_one(report, timed, folder, size):
    slide, engine = a_slide(size(SPOTS)), Engine.load(folder)
    row = Row("STFlow: samples", spots=len(slide), genes=CONFIG.n_genes)
    report(
        timed({
            replace(row, variant="one"): lambda: engine.predict(slide),
            replace(row, variant=str(SAMPLES)): lambda: engine.predict(slide, samples=SAMPLES),
        })
    )  # fmt: skip


def test_a_large_slide(report, folder, size):
    """Seconds, and peak memory of a process of its own, features and libraries among it."""
    spots = size(LARGE)
    script = (
        "import resource, time, numpy as np; from stpath_runtime import Engine, Slide\n"
        f"rng = np.random.default_rng(0); places = rng.random(({spots}, 2)) * 200 * {spots} ** 0.5\n"
        f"slide = Slide(places, rng.standard_normal(({spots}, {CONFIG.n_features}), np.float32))\n"
        f"engine = Engine.load({str(folder)!r}); start = time.perf_counter()\n"
        "engine.predict(slide); taken = time.perf_counter() - start\n"
        "print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, peak = found.stdout.split()
    report([Row("STFlow: a large slide", spots=spots, seconds=(float(seconds),), peak_bytes=int(peak))])
