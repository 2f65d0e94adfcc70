"""The starts of STFlow's samples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from stpath_runtime.manifest import FlowConfig
from stpath_runtime.stflow.starts import draw_start

CONFIG = FlowConfig(n_genes=40)


def test_the_published_start_has_the_moments_of_its_distribution():
    counts = np.expm1(draw_start(CONFIG, 5_000, 0, 0).astype(float))
    assert np.allclose(counts, np.rint(counts), atol=1e-4)
    mean = np.exp(0.1)
    assert counts.mean() == pytest.approx(mean / 2, rel=0.02)  # half of them are 0 whatever was drawn
    assert (counts == 0).mean() == pytest.approx(0.5 + 0.5 / (1 + mean), rel=0.02)
    assert (counts**2).mean() == pytest.approx((mean + 2 * mean**2) / 2, rel=0.05)


@pytest.mark.parametrize(("start", "mean", "std"), [("gaussian", 0, 1), ("uniform", 0.5, 12**-0.5), ("zero", 0, 0)])
def test_other_starts(start, mean, std):
    found = draw_start(replace(CONFIG, start=start), 5_000, 0, 0)
    assert found.dtype == np.float32
    assert found.mean() == pytest.approx(mean, abs=0.01)
    assert found.std() == pytest.approx(std, abs=0.01)


def test_a_start_depends_on_the_seed_and_the_number_of_the_sample():
    assert (draw_start(CONFIG, 9, 3, 1) == draw_start(CONFIG, 9, 3, 1)).all()
    assert (draw_start(CONFIG, 9, 3, 1) != draw_start(CONFIG, 9, 3, 2)).any()
    assert (draw_start(CONFIG, 9, 3, 1) != draw_start(CONFIG, 9, 4, 1)).any()
