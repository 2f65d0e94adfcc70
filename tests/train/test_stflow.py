"""The reference of STFlow, held to the published code's outputs and to what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import FLOW_CASES, FLOW_SIZES, load_flow_golden, relative_l2
from stpath_runtime.stflow.geometry import Neighborhoods
from stpath_train.stflow import seeded_flow


@pytest.mark.parametrize("case", FLOW_CASES)
def test_published_outputs(case):
    golden = load_flow_golden(case)
    a = {name: torch.from_numpy(golden.arrays[name]) for name in ("features", "coords", "x0")}
    neighbors = torch.from_numpy(golden.arrays["neighbors"].astype(np.int64))
    found = golden.model.sample(a["features"], a["coords"], a["x0"], golden.steps, neighbors)
    assert relative_l2(found, golden.arrays["output"]) <= 1e-10
    assert np.abs(found.numpy() - golden.arrays["output"]).max() <= 1e-10


@pytest.mark.parametrize("case", ["random_small", "relu", "n8", "n9"])
def test_its_own_neighbours_are_the_published_ones_where_none_are_tied(case):
    golden = load_flow_golden(case)
    a = {name: torch.from_numpy(golden.arrays[name]) for name in ("features", "coords", "x0")}
    found = golden.model.sample(a["features"], a["coords"], a["x0"], golden.steps)
    assert relative_l2(found, golden.arrays["output"]) <= 1e-10


def test_adding_a_vector_to_all_rows_of_the_state_changes_nothing():
    golden = load_flow_golden("random_small")
    a = {name: torch.from_numpy(golden.arrays[name]) for name in ("features", "coords", "x0")}
    neighbors = torch.from_numpy(golden.arrays["neighbors"].astype(np.int64))
    model = golden.model
    edges = model.edges(a["coords"], neighbors)
    added = torch.linspace(-3, 5, a["x0"].shape[1], dtype=torch.float64)
    first, moved = (
        next(model.walk(a["features"], edges, start, 2, neighbors))[1] for start in (a["x0"], a["x0"] + added)
    )
    assert relative_l2(moved, first) <= 1e-12
    other = next(model.walk(a["features"], edges, a["x0"].flip(0), 2, neighbors))[1]
    assert relative_l2(other, first) > 1e-6  # the state does count


@settings(max_examples=15, deadline=None)
@given(st.floats(0, 2 * np.pi), st.booleans(), st.integers(0, 100), st.floats(-1e4, 1e4))
def test_turning_mirroring_and_moving_the_slide_changes_nothing_where_no_frame_is_degenerate(angle, mirrored, seed, by):
    rng = np.random.default_rng(seed)
    model = seeded_flow(FLOW_SIZES, 0).double()
    coords = rng.random((30, 2)) * 900
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    turned = coords @ turn * ([-1, 1] if mirrored else 1) + by
    counts = [Neighborhoods.of(each, 8) for each in (coords, turned)]
    assert [around.degenerate + around.tied for around in counts] == [0, 0]
    features, start = (torch.from_numpy(rng.standard_normal((30, width))) for width in (24, 50))
    found, again = (model.sample(features, torch.from_numpy(each), start) for each in (coords, turned))
    assert relative_l2(again, found) <= 1e-9


def test_a_seed_repeats_the_weights():
    first, again, other = (seeded_flow(FLOW_SIZES, seed).state_dict() for seed in (1, 1, 2))
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["image_transform.weight"] != other["image_transform.weight"]).any()
