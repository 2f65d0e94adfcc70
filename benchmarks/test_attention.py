"""How to attend to the nearest spots: dense blocks, as the engine does, against gathering and PyTorch Geometric."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

from stpath_runtime.encoding.neighbors import nearest, plan_blocks
from stpath_runtime.encoding.sizes import BLOCK
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.slides.slide import random_slide
from stpath_train.inputs import knn_edges
from stpath_train.model import SpatialAttention, distance_bias

K = 32
D, HEADS = 512, 4


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


def test_one_layer(in_turn, report, size):
    """q, k and v given; all by the same formula, and held to message passing. The base is the dense blocks."""
    n, tile = size(20_000), 1024
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

    row = Row("one attention layer", attention="knn", neighbors=K, spots=n)
    calls = {
        replace(row, variant="dense blocks", backend="onnxruntime"): by_blocks,
        replace(row, variant="gather a query", backend="onnxruntime"): by_gather,
        replace(row, variant="PyTorch Geometric"): by_messages,
    }
    exact = by_messages()
    errors = [relative_l2(call(), exact) for call in calls.values()]
    report(
        [
            replace(found, relative_l2=error, parity="PyTorch Geometric")
            for found, error in zip(in_turn(calls), errors, strict=True)
        ]
    )
