"""A cohort against the encoder alone, and all genes of large slides against the disk."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest

from stpath_export.proof import random_slide
from stpath_runtime import Engine
from stpath_runtime.cohort import read_cohort, run_cohort
from stpath_runtime.output import CHUNK, Format, write_frame
from stpath_runtime.pipeline import Settings
from stpath_runtime.prediction import new_frame
from stpath_runtime.vocabulary import GeneVocabulary

K, SLIDES, SPOTS, ROUNDS = 32, 20, 4_000, 3
GENES = list(GeneVocabulary.published().ensembl_ids[:50])


@pytest.fixture(autouse=True)
def _no_notes_on_approximation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_cohort(engine_path, report, tmp_path):
    """Interleaved: the encoder over slides in memory, then the run over their files, and again."""
    engine = Engine.load(engine_path)
    slides = [random_slide(SPOTS, 1536, i) for i in range(SLIDES)]
    (tmp_path / "slides").mkdir()
    for i, slide in enumerate(slides):
        with h5py.File(tmp_path / "slides" / f"S{i}.h5", "w") as file:
            file["features"], file["coords"] = slide.features, slide.coords
    settings = Settings(str(engine_path), genes=GENES, attention="knn", neighbors=K)
    engine.embed(slides[0], attention="knn", neighbors=K)  # sessions are loaded on the first call
    encoder, cohort = [], []
    for turn in range(ROUNDS):
        start = time.perf_counter()
        for slide in slides:
            engine.embed(slide, attention="knn", neighbors=K)
        encoder.append(SLIDES * SPOTS / (time.perf_counter() - start))
        out = str(tmp_path / f"out{turn}")
        found = run_cohort(read_cohort(str(tmp_path / "slides"), out, Format.H5AD), out, settings)
        assert found.done == SLIDES
        cohort.append(found.spots / found.seconds)
    ratios = [b / a for a, b in zip(encoder, cohort, strict=True)]
    rates = f"{statistics.median(cohort):,.0f} / {statistics.median(encoder):,.0f} spots/s"
    report(
        f"{SLIDES} slides of {SPOTS:,} spots from files (in the page cache), kNN {K}, 50 genes, fp32: run / encoder",
        f"{rates} = {statistics.median(ratios):.0%} (pairs {min(ratios):.0%} to {max(ratios):.0%}; loading the engine "
        f"before it: {_loading(engine_path):.1f} s)",
        "85%",
    )


def _loading(engine_path: Path) -> float:
    start = time.perf_counter()
    Engine.load(engine_path)
    return time.perf_counter() - start


def write_sequentially(values: np.ndarray, times: int, path: Path) -> None:
    with path.open("wb") as file:
        for _ in range(times):
            file.write(values)
        os.fsync(file.fileno())


@pytest.mark.parametrize("form", [Format.H5AD, Format.ZARR])
def test_writing_all_genes(engine_path, report, tmp_path, form):
    """Interleaved: a plain file of as many bytes, then the result of ready values, and again; each to the disk."""
    engine = Engine.load(engine_path)
    names, tokens = engine.panel(None)
    slide = random_slide(8 * CHUNK[0], 1, 0)
    frame = new_frame(slide, names, engine.vocabulary.gene_ids(tokens), {"engine": "benchmark"}, None)
    # Predictions of the model: what a compressor makes of them is a part of the speed.
    embedding = engine.embed(random_slide(CHUNK[0], 1536, 0))
    values = engine.decode(embedding)
    plain, ours = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        write_sequentially(values, 8, tmp_path / "plain")
        plain.append(8 * values.nbytes / (time.perf_counter() - start) / 1e6)
        (tmp_path / "plain").unlink()
        start = time.perf_counter()
        path = tmp_path / f"p{form.suffix}"
        with write_frame(frame, path, form, np.dtype(np.float32)) as put:
            for block in range(8):
                put(slice(block * CHUNK[0], (block + 1) * CHUNK[0]), slice(0, len(tokens)), values)
        os.sync()
        ours.append(8 * values.nbytes / (time.perf_counter() - start) / 1e6)
        path.unlink() if path.is_file() else shutil.rmtree(path)
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    report(
        f"writing all genes of {len(slide):,} spots ({8 * values.nbytes / 1e9:.1f} GB), {form}: result / plain file",
        f"{statistics.median(ours):,.0f} / {statistics.median(plain):,.0f} MB/s = {statistics.median(ratios):.0%} "
        f"(pairs {min(ratios):.0%} to {max(ratios):.0%})",
        "50%",
    )


ALONE = """
import json, re, sys, time, warnings
from pathlib import Path
import numpy as np
from alone import _hexagonal
from stpath_runtime import Engine, Slide
from stpath_runtime.output import Format

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

warnings.simplefilter("ignore")
engine, out, form, spots = Engine.load(sys.argv[1]), Path(sys.argv[2]), Format(sys.argv[3]), int(sys.argv[4])
features = np.empty((spots, 1536), np.float16)
for start in range(0, spots, 10_000):
    part = features[start : start + 10_000]
    part[:] = np.random.default_rng(start).standard_normal(part.shape, np.float32)
slide = Slide(_hexagonal(spots), features)
(prediction,) = engine.encode([slide], attention="knn", neighbors=32)
encoder, start = peak(), time.perf_counter()
prediction.write(out / f"p{form.suffix}", form)
print(json.dumps({"encoder": encoder, "all": peak(), "seconds": time.perf_counter() - start}))
"""


@pytest.mark.parametrize("form", [Format.H5AD, Format.ZARR])
def test_memory_of_all_genes(engine_path, report, tmp_path, form):
    spots = 100_000
    words = [sys.executable, "-c", ALONE, str(engine_path), str(tmp_path), form.value, str(spots)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    found = json.loads(done.stdout)
    for path in tmp_path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report(
        f"{spots:,} spots, all 38,982 genes to {form} (15.6 GB): peak memory of the process beyond the encoder's",
        f"{(found['all'] - found['encoder']) / 1e9:.2f} GB (encoder {found['encoder'] / 1e9:.1f} GB with the features; "
        f"decoding and writing {found['seconds']:.0f} s)",
        "2 GB",
    )
