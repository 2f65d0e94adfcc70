"""The stages of an engine as modules, with the weights of a reference model (see `stpath_runtime.encoder`).

Each is exported on its own; `Fused` composes the same modules into one graph of a whole slide.
T spots in a tile, M keys, F features, d width, G genes, R token rows, P tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpath_train.model import Block, STPath, distance_bias


class KeysValues(nn.Module):
    """The norm and the k, v part of a block's first Linear."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        norm, qkv = block.attn.norm_and_qkv
        d = qkv.in_features
        self.norm = norm
        self.key = _linear(qkv.weight[d : 2 * d], qkv.bias[d : 2 * d])
        self.value = _linear(qkv.weight[2 * d :], qkv.bias[2 * d :])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.norm(x)
        return self.key(x), self.value(x)


class Tokens(nn.Module):
    """Values [R, P] at tokens [P] -> embedded gene rows [R, d]."""

    def __init__(self, model: STPath) -> None:
        super().__init__()
        # One row a token, so that picking tokens reads whole rows.
        self.embedding = nn.Parameter(model.input_encoder.gene_embed.weight.T.contiguous(), requires_grad=False)

    def forward(self, values: Tensor, token_ids: Tensor) -> Tensor:
        return values @ self.embedding[token_ids]


class Embed(nn.Module):
    """Features [T, F], organ [T], technology [T], gene row [T, d] -> x, k, v for block 1."""

    def __init__(self, model: STPath) -> None:
        super().__init__()
        self.image = model.input_encoder.image_embed
        self.technology = model.input_encoder.tech_embed
        self.organ = model.input_encoder.organ_embed
        self.keys_values = KeysValues(model.blocks[0])

    def forward(
        self, features: Tensor, organ: Tensor, technology: Tensor, gene_row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.image(features) + gene_row + self.technology(technology) + self.organ(organ)
        return x, *self.keys_values(x)


class BlockStage(nn.Module):
    """x [T, d] and coordinates [T, 2] of a tile; k, v [M, d] and coordinates [M, 2] of the keys -> x, next k and v."""

    def __init__(self, block: Block, following: Block | None) -> None:
        super().__init__()
        norm, qkv = block.attn.norm_and_qkv
        d = qkv.in_features
        self.n_heads = block.attn.n_heads
        self.norm = norm
        self.query = _linear(qkv.weight[:d], qkv.bias[:d])
        self.distance_weight = nn.Parameter(block.attn.distance_weight.clone(), requires_grad=False)
        self.output = block.attn.W_output
        self.mlp = block.mlp
        self.keys_values = KeysValues(following) if following is not None else None

    def forward(self, x: Tensor, coords: Tensor, k: Tensor, v: Tensor, key_coords: Tensor) -> tuple[Tensor, ...]:
        q = self.query(self.norm(x))
        bias = distance_bias(self.distance_weight, coords, key_coords).to(x.dtype)  # [H, T, M]
        attended = torch.onnx.ops.attention(
            q[None], k[None], v[None], bias[None], q_num_heads=self.n_heads, kv_num_heads=self.n_heads
        )[0][0]
        x = x + self.output(attended)
        x = x + self.mlp(x)
        return (x, *self.keys_values(x)) if self.keys_values is not None else (x,)


class Head(nn.Module):
    """Embedding [T, d], token ids [G] -> expression float32 [T, G]."""

    def __init__(self, model: STPath) -> None:
        super().__init__()
        self.norm, linear = model.head
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, embedding: Tensor, token_ids: Tensor) -> Tensor:
        return F.linear(self.norm(embedding), self.weight[token_ids], self.bias[token_ids]).float()


class Fused(nn.Module):
    """All stages of a whole slide in one graph: inputs of embed, coordinates and token ids -> embedding, expression."""

    def __init__(self, embed: Embed, blocks: list[BlockStage], head: Head) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(
        self, features: Tensor, coords: Tensor, organ: Tensor, technology: Tensor, gene_row: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, *kv = self.embed(features, organ, technology, gene_row)
        for block in self.blocks:
            x, *kv = block(x, coords, *kv, coords)
        return x, self.head(x, token_ids)


@dataclass(frozen=True)
class Graph:
    """A module to export: what to trace it with, which sizes may vary, and the names of its ends."""

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]  # examples, in the order of the module's arguments
    dynamic: dict[str, dict[int, str]]  # input -> axis -> name of its size
    outputs: tuple[str, ...]


def graphs(model: STPath) -> list[Graph]:
    """Every graph of an engine, in the type of the model's weights."""
    config, dtype = model.config, model.head[1].weight.dtype
    blocks = model.blocks
    embed, head = Embed(model), Head(model)
    stages = [BlockStage(block, following) for block, following in zip(blocks, [*blocks[1:], None], strict=True)]

    # Sizes to trace with: all distinct, so that none is taken for another.
    spots, keys, genes, rows = 5, 7, 3, 11
    floats = {
        "features": torch.zeros(spots, config.n_features, dtype=dtype),
        "gene_row": torch.zeros(spots, config.d_model, dtype=dtype),
        "x": torch.zeros(spots, config.d_model, dtype=dtype),
        "coords": torch.zeros(spots, 2),
        "k": torch.zeros(keys, config.d_model, dtype=dtype),
        "v": torch.zeros(keys, config.d_model, dtype=dtype),
        "key_coords": torch.zeros(keys, 2),
        "values": torch.zeros(rows, genes, dtype=dtype),
        "embedding": torch.zeros(spots, config.d_model, dtype=dtype),
    }
    tokens = {
        "organ": torch.zeros(spots, dtype=torch.int64),
        "technology": torch.zeros(spots, dtype=torch.int64),
        "token_ids": torch.zeros(genes, dtype=torch.int64),
    }
    examples = floats | tokens
    sizes = {spots: "spots", keys: "keys", genes: "genes", rows: "rows"}
    axes = {"values": (0, 1)}  # all others vary along their first axis only

    def graph(name: str, module: nn.Module, inputs: str, outputs: str) -> Graph:
        given = {key: examples[key] for key in inputs.split()}
        dynamic = {key: {a: sizes[value.shape[a]] for a in axes.get(key, (0,))} for key, value in given.items()}
        return Graph(name, module.eval(), given, dynamic, tuple(outputs.split()))

    row = [
        graph("tokens", Tokens(model), "values token_ids", "gene_rows"),
        graph("embed", embed, "features organ technology gene_row", "x k v"),
    ]
    for layer, stage in enumerate(stages, 1):
        ends = "x_next" if stage is stages[-1] else "x_next k_next v_next"
        row.append(graph(f"block_{layer}", stage, "x coords k v key_coords", ends))
    row.append(graph("head", head, "embedding token_ids", "expression"))
    whole = "features coords organ technology gene_row token_ids"
    return [*row, graph("fused", Fused(embed, stages, head), whole, "embedding expression")]


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
