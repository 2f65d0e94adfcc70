"""The demo from end to end, on fewer slides of its cohort."""

from __future__ import annotations

import re

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest

from stpath_export import demo
from stpath_runtime.cli.app import main
from stpath_runtime.slides.sample import CELL_TYPES, load_sample
from stpath_train import demo_checkpoint


def test_sample_slide():
    sample = load_sample()
    assert sample.fractions.shape == (3798, len(CELL_TYPES))
    np.testing.assert_allclose(sample.fractions.sum(axis=1), 1, atol=1e-3)
    assert {"Healthy", "Invasive"} <= set(sample.regions)
    # Spots are 200 pixels apart.
    steps = np.linalg.norm(sample.coords - sample.coords[100], axis=1)
    assert np.sort(steps)[1] == pytest.approx(200, abs=1)


def test_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_checkpoint, "SLIDES", 3)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = re.sub(r"[\s│]+", " ", capsys.readouterr().out)  # as wide as the terminal is, the tables break their lines
    for words in ("3,798", "passed against float64", "simulated features and counts"):
        assert words in out
    scores = dict(pd.read_csv(tmp_path / "scores.csv", index_col="predicted by")["pearson"])
    # What the demo is to show. With all of its slides ridge regression does better than here.
    alone, edge, spread = (scores[name] for name in (demo.ALONE, demo.EDGE, demo.SPREAD))
    assert spread > edge > alone > 0.1
    assert np.isnan(scores["mean expression"])
    assert "none: it is constant" in out
    for picture in ("maps.png", "regions.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for name in ("prediction", "prediction_in_context"):
        adata = anndata.read_h5ad(tmp_path / f"{name}.h5ad")
        assert adata.shape == (3798, 500)
        assert "simulated" in adata.uns["stpath"]["note"]
    with h5py.File(tmp_path / "simulated_slide.h5") as file:
        assert "simulated" in file.attrs["note"]
    # The files that it leaves give the same through the command line.
    words = ["predict", tmp_path / "simulated_slide.h5", "--engine", tmp_path / "engine", "--out", tmp_path / "x.h5ad"]
    words += ["--context", tmp_path / "simulated_context.h5ad", "--organ", "Breast", "--tech", "Visium"]
    assert main([str(word) for word in [*words, "--genes", "ERBB2"]]) == 0
    found, expected = anndata.read_h5ad(tmp_path / "x.h5ad"), anndata.read_h5ad(tmp_path / "prediction_in_context.h5ad")
    np.testing.assert_allclose(found.X[:, 0], expected[:, "ERBB2"].X[:, 0], atol=1e-5)


def test_the_checkpoint_of_the_package_is_small():
    assert demo_checkpoint.PACKAGED.stat().st_size < 1.5e6
