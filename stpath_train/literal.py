"""STPath's formula as published, taken literally: the oracle of the collapsed model. Slow, and large in memory.

Every query builds the vectors to all spots, centres them, rotates them into the eigenvectors of their covariance, and
averages a Linear over the four sign patterns of those axes. Tokens are dense one-hot rows, and the head computes all
genes. N spots, H heads, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from torch import Tensor

from stpath_runtime.slides.vocabulary import MASK_TOKEN

from .model import ContextTokens, SpatialAttention, STPath

SIGNS = ((1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))


def literal_tokens(n_spots: int, n_tokens: int, context: ContextTokens | None, dtype: torch.dtype) -> Tensor:
    """Dense token rows [N, V]: one-hot of the mask, or log1p of counts for a context spot."""
    tokens = torch.zeros(n_spots, n_tokens, dtype=dtype)
    tokens[:, MASK_TOKEN] = 1
    if context is not None:
        rows = torch.zeros(len(context.spots), n_tokens, dtype=dtype)
        rows[:, context.token_ids] = context.log_counts.to(dtype)
        tokens[context.spots] = rows
    return tokens


def literal_bias(attention: SpatialAttention, coords: Tensor) -> Tensor:
    """Bias [H, N, N] by frame averaging (Puny et al., ICLR 2022) over the edges of one slide, coords [N, 2]."""
    edges = coords[:, None] - coords[None]  # [N, N, 2], c_i - c_j
    distance = edges.norm(dim=-1)  # [N, N]
    centred = edges - edges.mean(dim=1, keepdim=True)
    covariance = einsum(centred, centred, "i j a, i j b -> i a b")  # [N, 2, 2]
    _, axes = torch.linalg.eigh(covariance)
    signs = torch.tensor(SIGNS, dtype=coords.dtype)  # [4, 2]
    frames = rearrange(axes, "i c d -> i 1 c d") * rearrange(signs, "f d -> 1 f 1 d")  # [N, 4, 2, 2]
    framed = einsum(centred, frames, "i j c, i f c d -> i j f d")
    inputs = torch.cat([framed, repeat(distance, "i j -> i j f 1", f=len(SIGNS))], dim=-1)  # [N, N, 4, 3]
    bias: Tensor = attention.edge_bias(inputs)  # [N, N, 4, H]
    return reduce(bias, "i j f h -> h i j", "mean")


def literal_attention(attention: SpatialAttention, x: Tensor, coords: Tensor) -> Tensor:
    """Attention within one slide, [N, d]."""
    q, k, v = rearrange(attention.layernorm_qkv(x), "n (part h d) -> part h n d", part=3, h=attention.n_heads)
    scores = einsum(q, k, "h i d, h j d -> h i j") / q.shape[-1] ** 0.5 + literal_bias(attention, coords)
    attended = einsum(torch.softmax(scores, dim=-1), v, "h i j, h j d -> h i d")
    return attention.W_output(rearrange(attended, "h n d -> n (h d)"))


def literal_forward(
    model: STPath,
    features: Tensor,
    coords: Tensor,
    organ: Tensor,
    technology: Tensor,
    context: ContextTokens | None = None,
    sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Embedding [N, d] and expression [N, V] (pad and mask columns included), with the weights of `model`."""
    encoder = model.input_encoder
    tokens = literal_tokens(len(features), model.config.n_tokens, context, features.dtype)
    x = encoder.image_embed(features) + F.linear(tokens, encoder.gene_embed.weight)
    x = x + encoder.tech_embed(technology) + encoder.organ_embed(organ)
    sizes = list(sizes) if sizes is not None else [len(x)]
    for block in model.blocks:
        slides = zip(torch.split(x, sizes), torch.split(coords, sizes), strict=True)
        x = x + torch.cat([literal_attention(block.attn, *slide) for slide in slides])
        x = x + block.mlp(x)
    return x, model.gene_exp_head(x)
