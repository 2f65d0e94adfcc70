"""Which part of a prediction takes the time: read, encode, decode, write; and finding the neighbours."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import h5py
import numpy as np
import pytest

from stpath_runtime import read_slide
from stpath_runtime.encoding.neighbors import plan_blocks
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.results.output import Format, write_frame
from stpath_runtime.slides.slide import random_slide

K = 32
SPOTS = 4_000
GENES = 1_000


@pytest.mark.quick
def test_parts_of_a_prediction(in_turn, report, engines, size, tmp_path):
    """One slide from file to file, in the page cache."""
    slide = random_slide(size(SPOTS), engines[0].manifest.model.n_features, 0)
    path, genes = tmp_path / "slide.h5", engines[0].vocabulary.ensembl_ids[:GENES]
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = slide.features, slide.coords
    spots = {"spots": len(slide)}
    calls = {}
    for engine in engines:
        by = {"backend": engine.backend.name, "precision": engine.precision}
        embedding = engine.embed(slide, attention="knn", neighbors=K)
        encode = partial(engine.embed, slide, attention="knn", neighbors=K)
        calls[Row("encode", attention="knn", neighbors=K, **spots, **by)] = encode
        calls[Row("decode", genes=len(genes), **spots, **by)] = partial(engine.decode, embedding, genes)
    calls[Row("read", "h5", precision="", **spots)] = partial(read_slide, path)
    (prediction,) = engines[0].predict_many([slide], genes=genes, attention="knn", neighbors=K)
    values = engines[0].decode(prediction.embedding, genes)  # ready: decoding is timed above
    for form in (Format.H5AD, Format.ZARR):
        row = Row("write", form.value, precision="", genes=len(genes), **spots)
        calls[row] = partial(_write, prediction.frame, values, tmp_path / f"p{form.suffix}", form)
    for call in calls.values():
        call()
    report([replace(row, ratios=()) for row in in_turn(calls)])  # of other work: no ratios


def test_neighbours_and_blocks(in_turn, report, size):
    coords = random_slide(size(100_000), 1, 0).coords
    row = Row("neighbours and blocks", "plan", precision="", attention="knn", neighbors=K, spots=len(coords))
    plan_blocks([coords], K)
    report(in_turn({row: partial(plan_blocks, [coords], K)}))


def _write(frame, values, path, form):
    with write_frame(frame, path, form, np.dtype(np.float32)) as put:
        put(slice(0, len(values)), slice(0, values.shape[1]), values)
