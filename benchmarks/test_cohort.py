"""How many spots a second a cohort takes from its files, against the encoder alone on slides in memory."""

from __future__ import annotations

from dataclasses import replace

import h5py
import pytest

from stpath_runtime.cohort.pipeline import Settings
from stpath_runtime.cohort.run import read_cohort, run_cohort
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import seconds_of, with_ratios
from stpath_runtime.results.output import Format
from stpath_runtime.slides.slide import random_slide

K, SPOTS = 32, 4_000


@pytest.mark.parametrize("slides", [pytest.param(3, marks=pytest.mark.quick), 20])
def test_cohort(report, rounds, engine_path, engines, panel, size, tmp_path, slides):
    """In turn; the files are in the page cache, and loading the engine is not a part of the seconds of a run."""
    made = [random_slide(size(SPOTS), engines[0].manifest.model.n_features, i) for i in range(slides)]
    (tmp_path / "slides").mkdir()
    for i, slide in enumerate(made):
        with h5py.File(tmp_path / "slides" / f"S{i}.h5", "w") as file:
            file["features"], file["coords"] = slide.features, slide.coords
    engine, how = engines[0], {"attention": "knn", "neighbors": K}
    by = {"backend": engine.backend.name, "precision": engine.precision}
    row = Row("", neighbors=K, attention="knn", spots=slides * size(SPOTS), **by)
    encoder = replace(row, what=f"{slides} slides, the encoder alone")
    cohort = replace(row, what=f"{slides} slides, from files to files", genes=len(panel))
    settings = Settings(str(engine_path), **by, genes=panel, **how)
    engine.embed(made[0], **how)
    seconds = {encoder: [], cohort: []}
    for turn in range(rounds):
        seconds[encoder].append(seconds_of(lambda: [engine.embed(slide, **how) for slide in made]))
        out = str(tmp_path / f"out{turn}")
        found = run_cohort(read_cohort(str(tmp_path / "slides"), out, Format.H5AD), out, settings)
        assert found.done == slides
        seconds[cohort].append(found.seconds)
    report([replace(row, note=f"{row.spots / row.median:,.0f} spots/s") for row in with_ratios(seconds)])
