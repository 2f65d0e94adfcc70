"""The reference model against the published outputs and against the literal formula."""

from __future__ import annotations

import copy
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import Golden, relative_l2
from stpath_runtime.manifest import ModelConfig
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.inputs import knn_blocks, knn_edges
from stpath_train.literal import literal_bias, literal_forward
from stpath_train.model import ContextTokens, SpatialAttention, STPath, distance_bias


def golden_inputs(golden: Golden) -> dict:
    a = golden.arrays
    context = None
    if "context_ids" in a:
        counts = torch.from_numpy(np.log1p(a["context_counts"].astype(np.float64)))
        context = ContextTokens(torch.from_numpy(a["context_ids"]), torch.from_numpy(a["context_gene_ids"]), counts)
    n = len(a["coords"])
    return {
        "features": torch.from_numpy(golden.features).double(),
        "coords": torch.from_numpy(a["normalized_coords"]),
        "organ": torch.full((n,), int(a["organ_id"])),
        "technology": torch.full((n,), int(a["tech_id"])),
        "context": context,
        "sizes": np.bincount(a["slide_index"]).tolist(),
    }


def test_reference_gives_the_published_outputs(golden):
    model = copy.deepcopy(golden.model).double()
    embedding = model.embed(**golden_inputs(golden))
    expression = model.decode(embedding, torch.from_numpy(golden.arrays["output_token_ids"]))
    assert relative_l2(embedding[golden.embedded], golden.arrays["embedding"]) <= 1e-10
    assert relative_l2(expression, golden.arrays["prediction"]) <= 1e-10


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_model_gives_the_same(tiny):
    """With context: PyTorch compiles a write to an expanded row so that all rows change (pytorch/pytorch#183986)."""
    model, inputs = copy.deepcopy(tiny.model).double(), golden_inputs(tiny)
    with torch.inference_mode():
        assert relative_l2(torch.compile(model, dynamic=False)(**inputs), model(**inputs)) <= 1e-10


def test_literal_formula_gives_the_published_outputs(golden):
    model = copy.deepcopy(golden.model).double()
    embedding, expression = literal_forward(model, **golden_inputs(golden))
    assert relative_l2(embedding[golden.embedded], golden.arrays["embedding"]) <= 1e-10
    assert relative_l2(expression[:, golden.arrays["output_token_ids"]], golden.arrays["prediction"]) <= 1e-10


def random_case(seed: int, spots: int, heads: int, layers: int, slides: int, context: int) -> tuple[STPath, dict]:
    rng = np.random.default_rng(seed)
    config = ModelConfig(
        d_model=4 * heads, n_heads=heads, n_layers=layers, d_mlp=8 * heads, n_features=6, n_tokens=12,
        n_organs=25, n_technologies=5,
    )  # fmt: skip
    model = seeded_checkpoint(config, seed).double()
    chosen = rng.choice(spots, min(context, spots), replace=False)
    tokens = ContextTokens(
        torch.from_numpy(chosen),
        torch.from_numpy(rng.choice(np.arange(2, 12), 5, replace=False)),
        torch.from_numpy(np.log1p(rng.poisson(3, (len(chosen), 5)).astype(float))),
    )
    return model, {
        "features": torch.from_numpy(rng.standard_normal((spots, 6))),
        "coords": torch.from_numpy(rng.random((spots, 2)) * 100),
        "organ": torch.from_numpy(rng.integers(0, 25, spots)),
        "technology": torch.from_numpy(rng.integers(0, 5, spots)),
        "context": tokens if context else None,
        "sizes": np.unique(rng.integers(0, slides, spots), return_counts=True)[1].tolist(),
    }


cases = st.builds(
    random_case,
    seed=st.integers(0, 2**16),
    spots=st.integers(1, 40),
    heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 3),
    slides=st.integers(1, 3),
    context=st.integers(0, 5),
)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_collapsed_model_equals_the_literal_formula(case):
    model, inputs = case
    embedding, expression = literal_forward(model, **inputs)
    assert relative_l2(model.embed(**inputs), embedding) <= 1e-10
    assert relative_l2(model(**inputs), expression[:, 2:]) <= 1e-10


@settings(max_examples=15, deadline=None)
@given(cases)
def test_collapsed_gradients_equal_those_of_the_literal_formula(case):
    model, inputs = case
    model.requires_grad_(True)
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(10))

    (model(**inputs) * weight).sum().backward()
    collapsed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (literal_forward(model, **inputs)[1][:, 2:] * weight).sum().backward()

    for name, p in model.named_parameters():
        scale = max(1.0, float(p.grad.abs().max()))
        assert torch.allclose(collapsed[name], p.grad, rtol=1e-8, atol=1e-9 * scale), name


LAYOUTS = {
    "scattered": 100 * np.random.default_rng(0).random((50, 2)),
    "on a line": np.outer(np.arange(20.0), [3, 4]),  # one eigenvalue is 0
    "a square grid": np.stack(np.divmod(np.arange(36.0), 6), axis=1),  # both agree: any axes are eigenvectors
    "one spot": np.zeros((1, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_frame_averaging_leaves_weight_times_distance(layout):
    coords = torch.from_numpy(LAYOUTS[layout])
    attention = SpatialAttention(d_model=8, n_heads=2).double()
    weight = attention.edge_bias[0].weight  # [H, 3]: of two frame coordinates, and of the distance
    weight.data[:, :2] = 1e3  # what they are does not matter
    literal, collapsed = literal_bias(attention, coords), distance_bias(attention.distance_weight, coords, coords)
    assert torch.allclose(literal, collapsed, atol=1e-9)

    above = torch.randn(literal.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, expected = (torch.autograd.grad((bias * above).sum(), weight)[0] for bias in (collapsed, literal))
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(found[:, :2], torch.zeros(2, 2, dtype=torch.float64))  # and they learn nothing


def test_slides_of_a_batch_do_not_see_each_other():
    model, inputs = random_case(seed=1, spots=30, heads=2, layers=2, slides=3, context=0)
    together = model.embed(**inputs)
    assert len(inputs["sizes"]) == 3
    for slide, found in enumerate(together.split(inputs["sizes"])):
        parts = {k: v.split(inputs["sizes"]) for k, v in inputs.items() if k not in ("context", "sizes")}
        alone = {k: v[slide] for k, v in parts.items()}
        assert torch.allclose(model.embed(**alone), found, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 7, 1000])
def test_result_does_not_depend_on_how_many_queries_run_at_once(queries, monkeypatch):
    model, inputs = random_case(seed=2, spots=30, heads=2, layers=2, slides=2, context=4)
    expected = model.embed(**inputs)
    monkeypatch.setattr("stpath_train.model.QUERIES_AT_ONCE", queries)
    assert torch.allclose(model.embed(**inputs), expected, atol=1e-12)


def test_knn_with_all_spots_of_a_slide_is_global_in_values_and_gradients():
    model, inputs = random_case(seed=3, spots=30, heads=2, layers=2, slides=3, context=4)
    model.requires_grad_(True)
    coords = [part.numpy() for part in inputs["coords"].split(inputs["sizes"])]
    expected = model(**inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    found = model(**inputs, edge_index=knn_edges(coords, 1000))
    found.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-12)
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, gradients[name], rtol=1e-8, atol=1e-9), name


def test_knn_attends_to_the_nearest_and_to_no_other_slide():
    model, inputs = random_case(seed=4, spots=40, heads=2, layers=1, slides=2, context=0)
    coords = [part.numpy() for part in inputs["coords"].split(inputs["sizes"])]
    edges = knn_edges(coords, 5)
    before = model.embed(**inputs, edge_index=edges)
    changed = dict(inputs, features=inputs["features"].clone())
    changed["features"][7] += 1
    moved = (model.embed(**changed, edge_index=edges) - before).abs().amax(dim=1) > 0
    attends = set(edges[1][edges[0] == 7].tolist())
    assert set(torch.nonzero(moved).ravel().tolist()) == attends
    assert 7 in attends


@settings(max_examples=15, deadline=None)
@given(cases, st.integers(1, 50))
def test_blocks_equal_message_passing_in_values_and_gradients(case, neighbors):
    model, inputs = case
    model.requires_grad_(True)
    coords = [part.numpy() for part in inputs["coords"].split(inputs["sizes"])]
    expected = model(**inputs, edge_index=knn_edges(coords, neighbors))
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(**inputs, blocks=knn_blocks(coords, neighbors))
    found.square().sum().backward()
    assert torch.allclose(found, expected, atol=1e-10)
    for name, p in model.named_parameters():
        if name in gradients:
            assert torch.allclose(p.grad, gradients[name], rtol=1e-8, atol=1e-8 * gradients[name].abs().max()), name
