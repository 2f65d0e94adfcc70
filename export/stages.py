"""The stages of an engine as modules, with the weights of a reference model (see `stpath_runtime.encoding.encoder`).

Each is exported on its own; `Fused` composes the same modules into one graph of a whole slide.
T spots in a tile, M keys, F features, d width, G genes, R gene rows, P tokens; b blocks of B rows and K keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpath_runtime.encoding.sizes import BLOCK
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
        return values @ F.embedding(token_ids, self.embedding)


class Embed(nn.Module):
    """Features [T, F], organ [T], technology [T], gene rows [R, d], and which of them a spot takes [T] -> x, k, v."""

    def __init__(self, model: STPath) -> None:
        super().__init__()
        self.image = model.input_encoder.image_embed
        self.technology = model.input_encoder.tech_embed
        self.organ = model.input_encoder.organ_embed
        self.keys_values = KeysValues(model.blocks[0])

    def forward(
        self, features: Tensor, organ: Tensor, technology: Tensor, gene_rows: Tensor, gene_row: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        genes = F.embedding(gene_row, gene_rows)
        x = self.image(features) + genes + self.technology(technology) + self.organ(organ)
        return x, *self.keys_values(x)


class BlockStage(nn.Module):
    """What both ways to attend share: the query before the attention, and all that comes after it."""

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

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """Attention of q [b, T, d] to k, v [b, M, d] with a bias [b, H, T, M], [b, T, d]."""
        heads = self.n_heads
        attended, *_ = torch.onnx.ops.attention(q, k, v, bias.to(q.dtype), q_num_heads=heads, kv_num_heads=heads)
        return attended

    def finish(self, x: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
        """x, and k and v for the next block, from x and its attention [T, d]."""
        x = x + self.output(attended)
        x = x + self.mlp(x)
        return (x, *self.keys_values(x)) if self.keys_values is not None else (x,)


class GlobalBlock(BlockStage):
    """x [T, d] and coordinates [T, 2] of a tile; k, v [M, d] and coordinates [M, 2] of all -> x, next k and v.

    key_bias [M] is added to the scores of a key: it masks those that pad.
    """

    def forward(
        self, x: Tensor, coords: Tensor, k: Tensor, v: Tensor, key_coords: Tensor, key_bias: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        q = self.query(self.norm(x))
        bias = distance_bias(self.distance_weight, coords, key_coords)  # [H, T, M]
        bias = bias + key_bias if key_bias is not None else bias
        return self.finish(x, self.attend(q[None], k[None], v[None], bias[None])[0])


class KnnBlock(BlockStage):
    """The same for a tile of b blocks (T = b * B): a block's keys are picked from the tile's, others are masked.

    k, v, coordinates [U, ...] of the keys that the tile names; key_index [b, K] into them; mask [b, B, K].
    """

    def forward(
        self, x: Tensor, coords: Tensor, k: Tensor, v: Tensor, key_coords: Tensor, key_index: Tensor, mask: Tensor
    ) -> tuple[Tensor, ...]:
        q = self.query(self.norm(x)).view(-1, BLOCK, x.shape[1])  # [b, B, d]
        coords, key_coords = coords.view(-1, BLOCK, 2), F.embedding(key_index, key_coords)  # [b, B, 2], [b, K, 2]
        bias = distance_bias(self.distance_weight, coords, key_coords)  # [b, H, B, K]
        # Half of the lowest number: a score added to it does not overflow.
        bias = torch.where(mask[:, None], bias, torch.finfo(x.dtype).min / 2)
        attended = self.attend(q, F.embedding(key_index, k), F.embedding(key_index, v), bias)
        return self.finish(x, attended.view(-1, x.shape[1]))


class Head(nn.Module):
    """Embedding [T, d], token ids [G] -> expression float32 [T, G]."""

    def __init__(self, model: STPath) -> None:
        super().__init__()
        self.norm, linear = model.head
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, embedding: Tensor, token_ids: Tensor) -> Tensor:
        weight, bias = F.embedding(token_ids, self.weight), torch.index_select(self.bias, 0, token_ids)
        return F.linear(self.norm(embedding), weight, bias).float()


class Fused(nn.Module):
    """All stages of a whole slide in one graph: inputs of embed, coordinates and token ids -> embedding, expression.

    With kNN attention the spots are in block order, and key_index is into all rows.
    """

    def __init__(self, embed: Embed, blocks: Sequence[BlockStage], head: Head) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = embed, nn.ModuleList(blocks), head

    def forward(
        self,
        features: Tensor,
        coords: Tensor,
        organ: Tensor,
        technology: Tensor,
        gene_rows: Tensor,
        gene_row: Tensor,
        token_ids: Tensor,
        key_index: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, *kv = self.embed(features, organ, technology, gene_rows, gene_row)
        keys = () if key_index is None else (key_index, mask)
        for block in self.blocks:
            x, *kv = block(x, coords, *kv, coords, *keys)
        return x, self.head(x, token_ids)


@dataclass(frozen=True)
class Graph:
    """A module to export: what to trace it with, which sizes may vary, and the names of its ends."""

    name: str
    module: nn.Module
    layout: Hashable  #: beside the module's kind and ends, all that it is made of but its weights
    inputs: dict[str, Tensor]  #: examples, in the order of the module's arguments
    sizes: dict[str, dict[int, Any]]  #: input -> axis -> its size, a torch.export.Dim
    outputs: tuple[str, ...]


def graphs(model: STPath) -> list[Graph]:
    """Every graph of an engine, in the type of the model's weights."""
    blocks = model.blocks
    pairs = list(zip(blocks, [*blocks[1:], None], strict=True))  # each block and the one that follows it
    embed, head = Embed(model), Head(model)
    to_all = [GlobalBlock(*pair) for pair in pairs]
    to_nearest = [KnnBlock(*pair) for pair in pairs]
    spot_inputs = "features coords organ technology gene_rows gene_row"

    row = [
        _graph(model, "tokens", Tokens(model), "values token_ids", "gene_rows"),
        _graph(model, "embed", embed, "features organ technology gene_rows gene_row", "x k v"),
    ]
    for layer, (block, knn_block) in enumerate(zip(to_all, to_nearest, strict=True), 1):
        ends = "x_next" if layer == len(blocks) else "x_next k_next v_next"
        row.append(_graph(model, f"block_{layer}", block, "x coords k v key_coords key_bias", ends))
        row.append(_graph(model, f"knn_block_{layer}", knn_block, "x coords k v key_coords key_index mask", ends))
    return [
        *row,
        _graph(model, "head", head, "embedding token_ids", "expression"),
        _graph(model, "fused", Fused(embed, to_all, head), f"{spot_inputs} token_ids", "embedding expression"),
        _graph(
            model,
            "fused_knn",
            Fused(embed, to_nearest, head),
            f"{spot_inputs} token_ids key_index mask",
            "embedding expression",
        ),
    ]


def _graph(model: STPath, name: str, module: nn.Module, inputs: str, outputs: str) -> Graph:
    """A graph with example inputs, whose sizes are all distinct so that none is taken for another."""
    d, n_features, dtype = model.config.d_model, model.config.n_features, model.head[1].weight.dtype
    blocks, keys_of_block = torch.export.Dim("blocks"), 8 * torch.export.Dim("key_groups")
    keys, genes, rows = torch.export.Dim("keys"), torch.export.Dim("genes"), torch.export.Dim("rows")
    n, spots = (3 * BLOCK, BLOCK * blocks) if "key_index" in inputs.split() else (5, torch.export.Dim("spots"))

    def floats(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype)

    def ints(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int64)

    examples: dict[str, tuple[Tensor, dict[int, Any]]] = {
        "features": (floats(n, n_features), {0: spots}),
        "gene_rows": (floats(6, d), {0: rows}),
        "gene_row": (ints(n), {0: spots}),
        "x": (floats(n, d), {0: spots}),
        "embedding": (floats(n, d), {0: spots}),
        "coords": (torch.zeros(n, 2), {0: spots}),
        "organ": (ints(n), {0: spots}),
        "technology": (ints(n), {0: spots}),
        "k": (floats(7, d), {0: keys}),
        "v": (floats(7, d), {0: keys}),
        "key_coords": (torch.zeros(7, 2), {0: keys}),
        "key_bias": (torch.zeros(7), {0: keys}),
        "key_index": (ints(3, 16), {0: blocks, 1: keys_of_block}),
        "mask": (torch.ones(3, BLOCK, 16, dtype=torch.bool), {0: blocks, 2: keys_of_block}),
        "values": (floats(11, 4), {0: rows, 1: genes}),
        "token_ids": (ints(4), {0: genes}),
    }
    given = {key: examples[key] for key in inputs.split()}
    return Graph(
        name,
        module.eval(),
        (model.config, dtype),
        {key: example for key, (example, _) in given.items()},
        {key: sizes for key, (_, sizes) in given.items()},
        tuple(outputs.split()),
    )


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    linear.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return linear
