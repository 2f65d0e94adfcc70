"""The demo from end to end, with a small model in place of the published sizes."""

from __future__ import annotations

import dataclasses

import anndata
import h5py
import numpy as np
import pytest

from stpath_runtime.cli import main
from stpath_runtime.sample import CELL_TYPES, load_sample, simulate_features
from stpath_train import model


def test_sample_slide():
    sample = load_sample()
    assert sample.fractions.shape == (3798, len(CELL_TYPES))
    np.testing.assert_allclose(sample.fractions.sum(axis=1), 1, atol=1e-3)
    assert {"Healthy", "Invasive"} <= set(sample.regions)
    features = simulate_features(sample, 16)
    assert features.dtype == np.float32
    np.testing.assert_array_equal(features, simulate_features(sample, 16))
    # Spots are 200 pixels apart.
    steps = np.linalg.norm(sample.coords - sample.coords[100], axis=1)
    assert np.sort(steps)[1] == pytest.approx(200, abs=1)


def test_demo(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(model.PUBLISHED_SIZES, d_model=16, n_layers=1, d_mlp=16, n_features=8)
    monkeypatch.setattr(model, "PUBLISHED_SIZES", small)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for words in ("3,798", "passed against float64", "simulated", "random"):
        assert words in out
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    adata = anndata.read_h5ad(tmp_path / "prediction.h5ad")
    assert adata.shape == (3798, 18)
    assert "simulated" in adata.uns["stpath"]["note"]
    with h5py.File(tmp_path / "simulated_sample_slide.h5") as file:
        assert "simulated" in file.attrs["note"]
    # A second run takes the engine that is there.
    monkeypatch.setattr("stpath_export.demo._export", lambda *_: pytest.fail("exported again"))
    assert main(["demo", "--out", str(tmp_path)]) == 0
