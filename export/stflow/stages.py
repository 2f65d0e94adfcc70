"""The stages of an STFlow engine as modules, with the weights of a reference model (`stpath_runtime.stflow.sampler`).

They compute what `stpath_train.stflow` does, in fewer products: the first product of a score is that of a spot, plus
that of its neighbour, plus that of the edge between them.

T spots in a tile, U spots that are their neighbours, B samples, F features, D width, E edge width, G genes, H heads, k
neighbours; d, e and M: a head of D, of E, and what a score's activation leaves.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpath_train.stflow import ACTIVATIONS, SIGNS, FlowBlock, Fourier, STFlow, Unit

from ..stages import Graph


class Edges(nn.Module):
    """Frames [T, k, 3] -> edges [T, k, E], in float32: pixels are thousands, and their products more."""

    def __init__(self, unit: Unit, dtype: torch.dtype) -> None:
        super().__init__()
        self.activation, self.dtype = unit.activation, dtype
        self.norm, self.last = unit.norm, unit.fc2
        # Of a gate, and of what it lets through, apart; the bias is the weight of a one.
        whole = torch.cat([unit.fc1.weight, unit.fc1.bias[:, None]], dim=1).T
        self.first = _weights(whole.chunk(products_of(unit), dim=1))  # [4, M] each
        self.signs = _fixed(torch.tensor([[*signs, 1.0, 1.0] for signs in SIGNS]))

    def forward(self, frames: Tensor) -> Tensor:
        signed = F.pad(frames, (0, 1), value=1.0)[:, :, None] * self.signs  # [T, k, 4, 4]
        # Of hundreds of pixels all gates may be nearly closed, and the norm makes much of what is left: ONNX Runtime's
        # sigmoid is off by 1e-8 there, and its norm takes a variance as a difference of squares, so neither is used.
        inner = activate(self.activation, [signed @ weight for weight in self.first], silu=exact_silu)
        inner = inner - inner.mean(dim=-1, keepdim=True)
        variance = (inner * inner).mean(dim=-1, keepdim=True)
        inner = inner * torch.rsqrt(variance + self.norm.eps) * self.norm.weight + self.norm.bias
        edges: Tensor = self.last(inner.mean(dim=2))  # it is linear: the mean may come before it
        return edges.to(self.dtype)


def products_of(unit: Unit) -> int:
    """How many parts the first product of a unit has."""
    return 2 if unit.activation == "swiglu" else 1


def exact_silu(x: Tensor) -> Tensor:
    """SiLU, of numbers far below zero, too, to all digits."""
    return x / (1 + torch.exp(-x))


def activate(activation: str, hidden: Sequence[Tensor], silu: Callable[[Tensor], Tensor] = F.silu) -> Tensor:
    """What an activation leaves of a hidden layer, or of a gate and what it lets through."""
    if activation in ("swiglu", "silu"):
        return silu(hidden[0]) * hidden[1] if activation == "swiglu" else silu(hidden[0])
    return ACTIVATIONS[activation](hidden[0])


class Score(nn.Module):
    """One number for a pair of spots, by a unit whose first product is split by what it takes.

    A gated unit has two such products, kept apart: a tensor of both would be copied to be parted. The biases of queries
    and keys are in that of the first product.
    """

    def __init__(self, unit: Unit, q_bias: Tensor, key_bias: Tensor, d_edge: int) -> None:
        super().__init__()
        self.activation, d_head = unit.activation, q_bias.shape[1]  # biases [H, d]
        sizes = [d_head, d_head, d_edge, unit.fc1.in_features - 2 * d_head - d_edge]
        parts = [torch.split(weight, sizes, dim=1) for weight in unit.fc1.weight.chunk(products_of(unit))]
        self.query, self.key, self.edge, self.state = (_weights(part) for part in zip(*parts, strict=True))
        biases = zip(parts, unit.fc1.bias.chunk(len(parts)), strict=True)
        self.bias = _weights([q_bias @ part[0].T + key_bias @ part[1].T + bias for part, bias in biases])  # [H, M]
        # Norm and last product in one, w'(z - mean z)/std z: two columns, of centred weights and of the mean. What does
        # not depend on z cancels in the softmax. In float32: squares of a hundred leave float16.
        weight, inner = unit.fc2.weight[0].double() * unit.norm.weight.double(), unit.norm.weight.shape[0]
        columns = torch.stack([weight - weight.mean(), torch.full_like(weight, 1 / inner)], dim=1)
        self.last, self.eps = _fixed(columns.float()), unit.norm.eps

    def of_spots(self, q: Tensor, key: Tensor, y: Tensor, neighbors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """What spots add to their pairs [T, 1, B, H, M], and what their neighbours do [T, k, B, H, M], of each product.

        Queries [T, B, H, d]; keys [U, B, H, d] and states [U, B, G], those of the tile first; neighbours [T, k].
        """
        own, theirs, tile = [], [], neighbors.shape[0]
        for a, b, c, bias in zip(self.query, self.key, self.state, self.bias, strict=True):
            of_state = (y @ c.T)[:, :, None]  # [U, B, 1, M]
            own.append((q @ a.T - of_state[:tile] + bias)[:, None])
            theirs.append(_pick(key @ b.T + of_state, neighbors))
        return own, theirs

    def of_edges(self, e: Tensor) -> list[Tensor]:
        """What edges add: [T, k, H, e] -> [T, k, 1, H, M] each."""
        return [(e @ a.T)[:, :, None] for a in self.edge]

    def forward(self, *parts: Sequence[Tensor]) -> Tensor:
        """The scores [T, k, B, H], of what each of the three adds."""
        hidden = [sum(each[1:], each[0]) for each in zip(*parts, strict=True)]
        inner = activate(self.activation, hidden).float()
        scores, mean = (inner @ self.last).unbind(-1)
        variance = (inner * inner).mean(dim=-1) - mean * mean
        return (scores * torch.rsqrt(variance.clamp(min=0) + self.eps)).to(hidden[0].dtype)


class Layer(nn.Module):
    """One block of the denoiser, of a tile of spots.

    h [N, B, D] (of the first layer tokens [N, D], and the time [1]) and state y [N, B, G] of all spots; keys [U], those
    of the tile and then their neighbours; neighbors [T, k] into the keys; edges [T, k, E]; total [T, B, G], the sum of
    the predictions of earlier layers. The last layer moves the state with which the step began by its rate [1].
    """

    def __init__(self, model: STFlow, block: FlowBlock) -> None:
        super().__init__()
        attn, config = block.attn, model.config
        self.layers, self.heads = config.n_layers, config.n_heads
        self.norm, qkv = attn.norm_and_qkv
        self.q, self.k, self.v = _weights(qkv.weight.chunk(3))
        q_bias, key_bias, v_bias = qkv.bias.view(3, self.heads, -1)
        self.score = Score(attn.mlp_attn, q_bias, key_bias, config.d_edge // self.heads)
        self.output, self.mlp, self.updater = copy.deepcopy(attn.W_output), block.mlp, block.gene_updater
        first = self.output.fc1  # weights of attention sum to 1, so that the bias of values adds itself
        parts = torch.split(first.weight, [config.d_model, config.d_edge], dim=1)
        values, e = (part.unflatten(1, (self.heads, -1)) for part in parts)
        first.bias = _fixed(first.bias + values.flatten(1) @ v_bias.flatten())
        first.weight = _fixed(torch.cat([values, e], dim=2).flatten(1))  # values and edges of a head beside each other

    def denoise(self, h: Tensor, y: Tensor, neighbors: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens h and prediction [T, B, ...] of a tile, from h [U, B or 1, D] and y [U, B, G] of its keys."""
        tile, heads, score = neighbors.shape[0], self.heads, self.score
        normed = self.norm(h)
        q, key = (_view(each, 0, 0, heads, -1) for each in (normed[:tile] @ self.q.T, normed @ self.k.T))
        v = _view(_pick(normed @ self.v.T, neighbors), 0, 0, 0, heads, -1)  # [T, k, B, H, d]
        e = _view(edges, 0, 0, heads, -1)  # [T, k, H, E/H]
        weights = score(score.of_edges(e), *score.of_spots(q, key, y, neighbors)).softmax(dim=1)[..., None]
        attended = torch.cat([(weights * each).sum(dim=1) for each in (v, e[:, :, None])], dim=-1)  # [T, B, H, d + e]
        found = self.output(_view(attended, -1, heads * attended.shape[-1])).unflatten(0, (tile, y.shape[1]))
        found = _view(h[:tile] + found, -1, h.shape[-1])  # [T B, D]
        found = found + self.mlp(found)
        prediction = self.updater(found)
        return found.unflatten(0, (tile, y.shape[1])), prediction.unflatten(0, (tile, y.shape[1]))

    def move(self, total: Tensor, state: Tensor, rate: Tensor) -> Tensor:
        """The state after a step."""
        return state * (1 - rate).to(state.dtype) + total / self.layers * rate.to(state.dtype)


class FirstLayer(Layer):
    """The layer that takes tokens, which all samples share, and the time."""

    def __init__(self, model: STFlow, block: FlowBlock, time: Fourier) -> None:
        super().__init__(model, block)
        self.time = time  # in float32

    def forward(
        self, tokens: Tensor, y: Tensor, keys: Tensor, neighbors: Tensor, edges: Tensor, time: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = _pick(tokens, keys) + self.time(time).to(tokens.dtype)  # [U, D]
        return self.denoise(h[:, None], _pick(y, keys), neighbors, edges)


class MiddleLayer(Layer):
    """A layer between the first and the last."""

    def forward(
        self, h: Tensor, y: Tensor, keys: Tensor, neighbors: Tensor, edges: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, prediction = self.denoise(_pick(h, keys), _pick(y, keys), neighbors, edges)
        return h, prediction, total + prediction


class LastLayer(Layer):
    """The layer that ends a step."""

    def forward(
        self,
        h: Tensor,
        y: Tensor,
        keys: Tensor,
        neighbors: Tensor,
        edges: Tensor,
        total: Tensor,
        state: Tensor,
        rate: Tensor,
    ) -> Tensor:
        _, prediction = self.denoise(_pick(h, keys), _pick(y, keys), neighbors, edges)
        return self.move(total + prediction, state, rate)


class OnlyLayer(FirstLayer):
    """The layer of a model that has one."""

    def forward(  # type: ignore[override]  # it ends a step, too
        self,
        tokens: Tensor,
        y: Tensor,
        keys: Tensor,
        neighbors: Tensor,
        edges: Tensor,
        time: Tensor,
        state: Tensor,
        rate: Tensor,
    ) -> Tensor:
        _, prediction = super().forward(tokens, y, keys, neighbors, edges, time)
        return self.move(prediction, state, rate)


def graphs(model: STFlow, dtype: torch.dtype) -> list[Graph]:
    """Every graph of an engine in a type, of a model in float32."""
    config, exact, model = model.config, copy.deepcopy(model), copy.deepcopy(model).to(dtype)
    n, t, u, b, k = (torch.export.Dim(name) for name in ("slide", "spots", "keys", "samples", "neighbors"))
    d, g = config.d_model, config.n_genes

    def floats(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    examples: dict[str, tuple[Tensor, dict[int, Any]]] = {  # sizes that vary are all distinct
        "features": (floats(5, config.n_features), {0: t}),
        "frames": (torch.zeros(5, 4, 3), {0: t, 1: k}),
        "tokens": (floats(11, d), {0: n}),
        "h": (floats(11, 3, d), {0: n, 1: b}),
        "y": (floats(11, 3, g), {0: n, 1: b}),
        "keys": (torch.zeros(7, dtype=torch.int64), {0: u}),
        "neighbors": (torch.zeros(5, 4, dtype=torch.int64), {0: t, 1: k}),
        "edges": (floats(5, 4, config.d_edge), {0: t, 1: k}),
        "time": (torch.zeros(1), {}),
        "total": (floats(5, 3, g), {0: t, 1: b}),
        "state": (floats(5, 3, g), {0: t, 1: b}),
        "rate": (torch.zeros(1), {}),
    }

    def graph(name: str, module: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> Graph:
        given = {key: examples[key] for key in inputs}
        return Graph(
            name,
            module.eval(),
            (config, dtype),
            {key: example for key, (example, _) in given.items()},
            {key: sizes for key, (_, sizes) in given.items()},
            tuple(outputs),
        )

    row = [graph("image", model.image_transform, ["features"], ["tokens"])]
    for i, block in enumerate(model.blocks):
        first, last = i == 0, i == config.n_layers - 1
        if first:
            layer: Layer = (OnlyLayer if last else FirstLayer)(model, block, exact.fourier_proj)
        else:
            layer = (LastLayer if last else MiddleLayer)(model, block)
        inputs = ["tokens" if first else "h", "y", "keys", "neighbors", "edges", "time" if first else "total"]
        inputs += ["state", "rate"] if last else []
        outputs = ["state_next"] if last else ["h_next", "y_next"] if first else ["h_next", "y_next", "total_next"]
        row.append(graph(f"layer_{i + 1}", layer, inputs, outputs))
        row.append(graph(f"edges_{i + 1}", Edges(exact.blocks[i].attn.edge_trans, dtype), ["frames"], ["edges"]))
    return row


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [U, ...] at an index [T] or [T, k]: [T, ...] or [T, k, ...], in one operator."""
    shape = (*index.shape, *rows.shape[1:])
    return torch.onnx.ops.symbolic("Gather", (rows, index), {"axis": 0}, dtype=rows.dtype, shape=shape)


def _view(x: Tensor, *shape: int) -> Tensor:
    """X in another shape, 0 for an axis as it is, -1 for what is left: in one operator, whatever sizes vary."""
    sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    if -1 in sizes:
        rest = math.prod(x.shape) // math.prod(size for size in sizes if size != -1)
        sizes = [rest if size == -1 else size for size in sizes]
    return torch.onnx.ops.symbolic("Reshape", (x, torch.tensor(shape)), dtype=x.dtype, shape=sizes)


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)


def _weights(tensors: Sequence[Tensor]) -> nn.ParameterList:
    return nn.ParameterList(map(_fixed, tensors))


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = _fixed(weight), _fixed(bias)
    return linear
