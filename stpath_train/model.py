"""STPath (Huang et al., npj Digital Medicine 2025), with what cancels in its formula left out.

The published attention bias is w * distance, exactly: the frame averaging of the published code vanishes (see
`stpath_train.literal`, which keeps it). Module names give the keys of the published checkpoint.

N spots, F features, d width, H heads, G genes asked for, C context spots, P genes of the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stpath_runtime.manifest import ModelConfig
from stpath_runtime.slides.vocabulary import FIRST_GENE_TOKEN, MASK_TOKEN

PUBLISHED_SIZES = ModelConfig(
    d_model=512, n_heads=4, n_layers=4, d_mlp=1024, n_features=1536, n_tokens=38_984, n_organs=25, n_technologies=5
)
QUERIES_AT_ONCE = 1024  # bounds the scores of a whole slide to [H, 1024, N]; a training window is one piece


@dataclass(frozen=True)
class ContextTokens:
    """Measured expression of some spots, as the model takes it."""

    spots: Tensor  # [C] positions of the context spots
    token_ids: Tensor  # [P] distinct gene tokens
    log_counts: Tensor  # [C, P] log1p of raw counts


class KeyBlocks(NamedTuple):
    """Blocks of B queries, and the K spots that hold all their neighbours (`stpath_runtime.encoding.neighbors`)."""

    spot: Tensor  # [b * B] the spot of each row; any one in rows that pad a block
    row: Tensor  # [N] the row of each spot
    keys: Tensor  # [b, K] spots
    mask: Tensor  # [b, B, K] which pairs are neighbours


class SpotKeys(NamedTuple):
    """Which spots a spot attends to: those of its slide, or those given by edges or by blocks."""

    sizes: Sequence[int] | None = None  # spots of each slide, one after another; None: there is one
    edge_index: Tensor | None = None  # [2, E]
    blocks: KeyBlocks | None = None


def distance_bias(weight: Tensor, coords: Tensor, key_coords: Tensor) -> Tensor:
    """Bias of attention scores, [..., H, N, M]: weight [H] times the distance of coords [..., N, 2] to key_coords.

    Computed in the type of the coordinates: float16 would round positions of 0..100 to 1/16.
    """
    dx = coords[..., :1] - key_coords[..., None, :, 0]  # [..., N, M]
    dy = coords[..., 1:] - key_coords[..., None, :, 1]
    distance = torch.sqrt(dx * dx + dy * dy)
    return weight.to(coords.dtype)[:, None, None] * distance[..., None, :, :]


class InputEncoder(nn.Module):
    """Sum of the embeddings of a spot's features, gene row, technology and organ."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.image_embed = nn.Linear(config.n_features, config.d_model)
        self.gene_embed = nn.Linear(config.n_tokens, config.d_model, bias=False)
        self.tech_embed = nn.Embedding(config.n_technologies, config.d_model)
        self.organ_embed = nn.Embedding(config.n_organs, config.d_model)

    def forward(
        self, features: Tensor, organ: Tensor, technology: Tensor, context: ContextTokens | None = None
    ) -> Tensor:
        """Embed spots, [N, d]; those without context take the mask token's row."""
        tokens = torch.tensor([MASK_TOKEN], device=features.device)
        if context is not None:
            tokens = torch.cat([tokens, context.token_ids])
        embedded = F.embedding(tokens, self.gene_embed.weight.T)  # [1 + P, d], at once: each has a gradient [V, d]
        genes = embedded[0].expand(len(features), -1)
        if context is not None:
            rows = context.log_counts @ embedded[1:]
            rows = rows.to(genes.dtype)  # autocast may lower a product's type
            # Into a copy: torch.compile would write into the one row that was expanded (pytorch/pytorch#183986).
            genes = genes.clone().index_put((context.spots,), rows)
        return self.image_embed(features) + genes + self.tech_embed(technology) + self.organ_embed(organ)


class SpatialAttention(nn.Module):
    """Attention of every spot to every spot of its slide, or along the edges given, biased by their distance."""

    fused = False  # `STPath.fuse_attention`

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(d_model), nn.Linear(d_model, 3 * d_model))
        self.W_output = nn.Sequential(nn.Linear(d_model, d_model))
        # Published as a Linear on [two frame coordinates, distance]; only the distance is left of it.
        self.edge_bias = nn.Sequential(nn.Linear(3, n_heads, bias=False))

    @property
    def norm_and_qkv(self) -> tuple[nn.LayerNorm, nn.Linear]:
        """The two parts of `layernorm_qkv`."""
        return cast(nn.LayerNorm, self.layernorm_qkv[0]), cast(nn.Linear, self.layernorm_qkv[1])

    @property
    def distance_weight(self) -> Tensor:
        """[H], what a unit of distance adds to the score."""
        return cast(nn.Linear, self.edge_bias[0]).weight[:, 2]

    def forward(self, x: Tensor, coords: Tensor, keys: SpotKeys) -> Tensor:
        q, k, v = rearrange(self.layernorm_qkv(x), "n (part h d) -> part n h d", part=3, h=self.n_heads)
        if keys.edge_index is not None:
            attended = self._attend_along_edges(q, k, v, coords, keys.edge_index)
        elif keys.blocks is not None:
            attended = self._attend_in_blocks(q, k, v, coords, keys.blocks)
        else:
            slides = (torch.split(part, list(keys.sizes or [len(x)])) for part in (q, k, v, coords))
            attended = torch.cat([self._attend_to_all(*slide) for slide in zip(*slides, strict=True)])
        return self.W_output(rearrange(attended, "n h d -> n (h d)"))

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, coords: Tensor) -> Tensor:
        if self.fused:
            from .fused_attention import distance_attention

            return distance_attention(q, k, v, coords, self.distance_weight)
        q, k, v = (rearrange(part, "n h d -> h n d") for part in (q, k, v))
        if len(coords) <= QUERIES_AT_ONCE:
            return rearrange(self._attend(q, k, v, coords, coords), "h n d -> n h d")
        tiles = []
        for start in range(0, len(coords), QUERIES_AT_ONCE):
            rows = slice(start, start + QUERIES_AT_ONCE)
            # For gradients, the scores [H, T, N] are computed again and not kept.
            tiles.append(checkpoint(self._attend, q[:, rows], k, v, coords[rows], coords, use_reentrant=False))
        return rearrange(torch.cat(tiles, dim=1), "h n d -> n h d")

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, coords: Tensor, key_coords: Tensor) -> Tensor:
        bias = distance_bias(self.distance_weight, coords, key_coords)  # [H, T, N]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))

    def _attend_in_blocks(self, q: Tensor, k: Tensor, v: Tensor, coords: Tensor, blocks: KeyBlocks) -> Tensor:
        spot = rearrange(blocks.spot, "(block row) -> block row", block=len(blocks.keys))
        bias = distance_bias(self.distance_weight, coords[spot], coords[blocks.keys])  # [b, H, B, K]
        bias = bias.masked_fill(~blocks.mask[:, None], -torch.inf)
        # [b, H, B or K, d/H]
        q, k, v = (rearrange(part, "b n h d -> b h n d") for part in (q[spot], k[blocks.keys], v[blocks.keys]))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return rearrange(attended, "b h n d -> (b n) h d")[blocks.row]

    def _attend_along_edges(self, q: Tensor, k: Tensor, v: Tensor, coords: Tensor, edge_index: Tensor) -> Tensor:
        from torch_geometric.utils import scatter, softmax

        source, target = edge_index  # [E] each: a key, and the query that attends to it
        distance = (coords[target] - coords[source]).norm(dim=-1, keepdim=True)  # [E, 1]
        scores = (q[target] * k[source]).sum(dim=-1) / q.shape[-1] ** 0.5  # [E, H]
        scores = scores + (self.distance_weight.to(coords.dtype) * distance).to(q.dtype)
        weights = softmax(scores, target, num_nodes=len(q))  # over the edges into each query
        return scatter(weights[..., None] * v[source], target, dim_size=len(q), reduce="sum")  # [N, H, d/H]


class Mlp(nn.Module):
    """Two linear layers around an exact GELU and a norm. There is no norm before the first."""

    def __init__(self, d_model: int, d_mlp: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, d_mlp)
        self.norm = nn.LayerNorm(d_mlp)
        self.fc2 = nn.Linear(d_mlp, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """Attention, then an MLP, each added to its input."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn = SpatialAttention(config.d_model, config.n_heads)
        self.mlp = Mlp(config.d_model, config.d_mlp)

    def forward(self, x: Tensor, coords: Tensor, keys: SpotKeys) -> Tensor:
        x = x + self.attn(x, coords, keys)
        return x + self.mlp(x)


class SpatialTransformer(nn.Module):
    """The row of blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blks = nn.ModuleList(Block(config) for _ in range(config.n_layers))

    def forward(self, x: Tensor, coords: Tensor, keys: SpotKeys) -> Tensor:
        for block in self.blks:
            x = block(x, coords, keys)
        return x


class STPath(nn.Module):
    """The whole model: features, coordinates, organ, technology and context in; log1p of raw counts out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.input_encoder = InputEncoder(config)
        self.model = SpatialTransformer(config)
        self.gene_exp_head = nn.Sequential(nn.LayerNorm(config.d_model), nn.Linear(config.d_model, config.n_tokens))

    def embed(
        self,
        features: Tensor,
        coords: Tensor,
        organ: Tensor,
        technology: Tensor,
        context: ContextTokens | None = None,
        sizes: Sequence[int] | None = None,
        edge_index: Tensor | None = None,
        blocks: KeyBlocks | None = None,
    ) -> Tensor:
        """Embedding of every spot, [N, d]: the last block's output, before the head.

        Parameters
        ----------
        features
            [N, F], in the model's type.
        coords
            [N, 2], each axis from 0 to 100 over its slide (`Slide.normalized_coords`), in float32 or float64.
        organ, technology
            [N] tokens.
        context
            Measured expression of some spots.
        sizes
            Spots of each slide, where there are several, one after another; spots attend only within their slide.
        edge_index, blocks
            For kNN attention, one or the other: [2, E] keys, and the queries that attend to them (`knn_edges` of
            `stpath_train.inputs`), as message passing, the reference; or the same in dense blocks (`knn_blocks`), fast.
            Without them every spot attends to all of its slide.
        """
        x = self.input_encoder(features, organ, technology, context)
        return self.model(x, coords, SpotKeys(sizes, edge_index, blocks))

    def fuse_attention(self, fused: bool = True) -> STPath:
        """Attend globally by one kernel that keeps no scores (`stpath_train.fused_attention`), from now on; the model.

        For inference on an NVIDIA GPU: elsewhere, or where gradients are wanted, the next call raises what
        `distance_attention` raises. Attention by edges or blocks stays as it is, and so does what is saved.

        Raises
        ------
        InstallError
            Triton is not installed.
        """
        if fused:
            from . import fused_attention  # noqa: F401  # tells here if Triton is missing
        for block in self.blocks:
            block.attn.fused = fused
        return self

    @property
    def blocks(self) -> list[Block]:
        """The blocks, in order."""
        return [cast(Block, block) for block in self.model.blks]

    @property
    def head(self) -> tuple[nn.LayerNorm, nn.Linear]:
        """The two parts of `gene_exp_head`."""
        return cast(nn.LayerNorm, self.gene_exp_head[0]), cast(nn.Linear, self.gene_exp_head[1])

    def decode(self, embedding: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Expression [N, G] of the genes asked for (None: all, without the pad and mask tokens)."""
        norm, linear = self.head
        if token_ids is None:
            token_ids = torch.arange(FIRST_GENE_TOKEN, self.config.n_tokens, device=embedding.device)
        return F.linear(norm(embedding), linear.weight[token_ids], linear.bias[token_ids])

    def forward(
        self,
        features: Tensor,
        coords: Tensor,
        organ: Tensor,
        technology: Tensor,
        context: ContextTokens | None = None,
        sizes: Sequence[int] | None = None,
        edge_index: Tensor | None = None,
        blocks: KeyBlocks | None = None,
        token_ids: Tensor | None = None,
    ) -> Tensor:
        """Expression [N, G] from features; the parameters are those of `embed` and `decode`."""
        embedding = self.embed(features, coords, organ, technology, context, sizes, edge_index, blocks)
        return self.decode(embedding, token_ids)
