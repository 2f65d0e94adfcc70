"""kNN attention, k = 32: speed, its growth with the spots, memory, and dense blocks against other ways to attend."""

from __future__ import annotations

import statistics
import time
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alone import predict_alone
from stpath_export.proof import random_slide, relative_l2
from stpath_runtime import Engine
from stpath_runtime.neighbors import BLOCK, nearest, plan_blocks
from stpath_train.inputs import knn_edges, slide_inputs
from stpath_train.model import SpatialAttention, distance_bias

K = 32
D, HEADS = 512, 4
ROUNDS = 3


@pytest.fixture(autouse=True)
def _no_notes_on_approximation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def matrix_peak() -> float:
    """GFLOP/s of float32 matrix products, the best of several sizes by PyTorch, on this machine now."""
    best = 0.0
    for n in (1024, 2048, 3072):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(4):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start) / 1e9)
    return best


def encoder_flops(model, keys: float) -> float:
    """Operations of the encoder for one spot that attends, in dense blocks, to so many keys a layer."""
    c = model.config
    layer = 2 * (4 * c.d_model**2 + 2 * c.d_model * c.d_mlp) + 4 * keys * c.d_model
    return 2 * c.n_features * c.d_model + c.n_layers * layer


def interleaved(functions: dict, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Seconds of each function, run in turn."""
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()  # warm
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def test_encoder(benchmark, model, engine_path, report):
    engine = Engine.load(engine_path)
    small, large = random_slide(20_000, 1536, 0), random_slide(200_000, 1536, 0)
    rates: dict[int, list[float]] = {len(small): [], len(large): []}

    def embed(slide):
        start = time.perf_counter()
        engine.embed(slide, attention="knn", neighbors=K)
        rates[len(slide)].append(len(slide) / (time.perf_counter() - start))

    embed(small)
    rates[len(small)].clear()
    peak_before = matrix_peak()
    for _ in range(2):
        embed(small)
        embed(large)
    benchmark.pedantic(embed, args=(small,), rounds=1)
    peak = max(peak_before, matrix_peak())
    plan = plan_blocks([small.coords], K)
    keys = plan.tile(slice(0, plan.blocks)).key_index.shape[1]
    median = {spots: statistics.median(found) for spots, found in rates.items()}
    achieved = median[len(small)] * encoder_flops(model, keys) / 1e9
    report(
        f"20,000 spots, kNN {K}, fp32: encoder",
        f"{median[20_000]:,.0f} spots/s ({min(rates[20_000]):,.0f} to {max(rates[20_000]):,.0f}): {achieved:.0f} of "
        f"{peak:.0f} GFLOP/s, the matrix peak here, which allows "
        f"{peak * 1e9 / encoder_flops(model, keys):,.0f} spots/s",
        "8,000 spots/s",
    )
    ratio = median[20_000] / median[200_000]
    report("200,000 spots: time a spot against 20,000", f"{ratio:.2f} times ({median[200_000]:,.0f} spots/s)", "1.3")


def test_memory_of_a_million_spots(engine_path, report):
    found = predict_alone(engine_path, 1_000_000, K, "float16", memory="12G")
    report(
        f"1,000,000 spots, kNN {K}, 50 genes, features float16 (3.1 GB), --memory 12G: peak memory of the process",
        f"{found['peak'] / 1e9:.1f} GB ({found['seconds']:.0f} s)",
        "16 GB",
    )


def test_plan(report):
    coords = random_slide(100_000, 1, 0).coords
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        plan_blocks([coords], K)
        seconds.append(time.perf_counter() - start)
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    report(f"100,000 spots, k = {K}: neighbours and blocks", f"{statistics.median(seconds):.2f} s ({spread})", "2 s")


class Blocks(nn.Module):
    """Attention alone, as the engine runs it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, q, coords, k, v, key_coords, key_index, mask):
        coords, key_coords = coords.view(-1, BLOCK, 2), F.embedding(key_index, key_coords)
        bias = torch.where(mask[:, None], distance_bias(self.weight, coords, key_coords), -1e30)
        keys, values = F.embedding(key_index, k), F.embedding(key_index, v)
        q = q.view(-1, BLOCK, D)
        return torch.onnx.ops.attention(q, keys, values, bias, q_num_heads=HEADS, kv_num_heads=HEADS)[0].view(-1, D)


class Gather(nn.Module):
    """Attention alone, k keys gathered for each query."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, q, coords, k, v, key_coords, near):
        bias = distance_bias(self.weight, coords[:, None], F.embedding(near, key_coords))  # [T, H, 1, k]
        keys, values = F.embedding(near, k), F.embedding(near, v)  # [T, k, d]
        return torch.onnx.ops.attention(q[:, None], keys, values, bias, q_num_heads=HEADS, kv_num_heads=HEADS)[0][:, 0]


def session(module, inputs, sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, tuple(inputs.values()), dynamo=True, opset_version=23, input_names=list(inputs),
            dynamic_shapes=tuple(sizes[name] for name in inputs), verbose=False,
        )  # fmt: skip
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])


def test_dense_blocks_against_other_ways(report):
    """One attention layer, 20,000 spots, q, k and v given: all by the same formula."""
    n, tile = 20_000, 1024
    rng = np.random.default_rng(0)
    pixels = random_slide(n, 1, 0).coords
    coords = (pixels / pixels.max(axis=0) * 100).astype(np.float32)
    q, k, v = (rng.standard_normal((n, D), np.float32) for _ in range(3))
    attention = SpatialAttention(D, HEADS).requires_grad_(False)
    weight = attention.distance_weight.clone()
    near, plan, edges = nearest(pixels, K), plan_blocks([pixels], K), knn_edges([pixels], K)
    dim = torch.export.Dim
    t = torch.from_numpy

    keys, blocks = dim("keys"), dim("blocks")
    example = {"q": t(q[: 2 * BLOCK]), "coords": t(coords[: 2 * BLOCK]), "k": t(k[:9]), "v": t(v[:9])}
    example |= {"key_coords": t(coords[:9]), "key_index": torch.zeros(2, 16, dtype=torch.int64)}
    example |= {"mask": torch.ones(2, BLOCK, 16, dtype=torch.bool)}
    wide = {0: blocks, 1: 8 * dim("groups")}
    sizes = {"q": {0: BLOCK * blocks}, "coords": {0: BLOCK * blocks}, "key_index": wide}
    sizes |= {name: {0: keys} for name in ("k", "v", "key_coords")} | {"mask": {0: blocks, 2: wide[1]}}
    dense = session(Blocks(weight), example, sizes)
    spots = dim("spots")
    picked = {name: example[name] for name in ("q", "coords", "k", "v", "key_coords")}
    picked["near"] = torch.zeros(2 * BLOCK, K, dtype=torch.int64)
    sizes = {name: {0: spots} for name in ("q", "coords", "near")} | {n_: {0: keys} for n_ in ("k", "v", "key_coords")}
    gather = session(Gather(weight), picked, sizes)
    rows_q, rows_k, rows_v, rows_c = (array[plan.spot] for array in (q, k, v, coords))

    def by_blocks():
        out = np.empty_like(rows_q)
        for start in range(0, plan.blocks, tile // BLOCK):
            some = slice(start, min(start + tile // BLOCK, plan.blocks))
            rows, part = slice(some.start * BLOCK, some.stop * BLOCK), plan.tile(some)
            inputs = {"q": rows_q[rows], "coords": rows_c[rows], "k": rows_k[part.rows], "v": rows_v[part.rows]}
            inputs |= {"key_coords": rows_c[part.rows], "key_index": part.key_index, "mask": part.mask}
            (out[rows],) = dense.run(None, inputs)
        return out[plan.row]

    def by_gather():
        out = np.empty_like(q)
        for start in range(0, n, tile):
            s = slice(start, start + tile)
            inputs = {"q": q[s], "coords": coords[s], "k": k, "v": v, "key_coords": coords, "near": near[s]}
            (out[s],) = gather.run(None, inputs)
        return out

    def by_messages():
        heads = (t(part).reshape(n, HEADS, -1) for part in (q, k, v))
        return attention._attend_along_edges(*heads, t(coords), edges).flatten(1).numpy()

    ways = {"blocks": by_blocks, "gather": by_gather, "PyTorch Geometric": by_messages}
    exact = by_messages()
    errors = {name: relative_l2(way(), exact) for name, way in ways.items()}
    assert max(errors.values()) < 1e-5
    seconds = interleaved(ways)
    median = {name: statistics.median(found) for name, found in seconds.items()}
    for name, goal in (("PyTorch Geometric", "5x"), ("gather", "2.5x")):
        ratios = [a / b for a, b in zip(seconds[name], seconds["blocks"], strict=True)]
        report(
            f"one attention layer, 20,000 spots, k = {K}, fp32: {name} / dense blocks",
            f"{median[name]:.2f} s / {median['blocks']:.2f} s = {statistics.median(ratios):.1f}x (pairs "
            f"{min(ratios):.1f} to {max(ratios):.1f}); difference {errors[name]:.0e}, {errors['blocks']:.0e}",
            goal,
        )


def test_encoder_against_pytorch_geometric(model, engine_path, report):
    engine = Engine.load(engine_path)
    slide = random_slide(5_000, 1536, 0)
    inputs = slide_inputs(slide, engine.vocabulary, neighbors=K)

    def reference():
        with torch.inference_mode():
            return model.embed(**inputs).numpy()

    def blocks():
        return engine.embed(slide, attention="knn", neighbors=K)

    error = relative_l2(blocks(), reference())
    seconds = interleaved({"reference": reference, "engine": blocks})
    ratios = [a / b for a, b in zip(seconds["reference"], seconds["engine"], strict=True)]
    report(
        f"5,000 spots, k = {K}, fp32, whole encoder: PyTorch Geometric / engine",
        f"{statistics.median(seconds['reference']):.2f} s / {statistics.median(seconds['engine']):.2f} s = "
        f"{statistics.median(ratios):.1f}x; difference {error:.0e}",
        "",
    )
