"""A small tile encoder of weights from a seed, in plain PyTorch: for the demo, whose features mean nothing.

A vision transformer with the names of timm's modules, so that it is exported and proven as those are, without timm.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .encoders import IMAGENET, TOKEN_AND_MEAN, EncoderModel, Weights

NAME = "a small encoder of random weights"
SIZE, PATCH, WIDTH, HEADS, HIDDEN = 224, 32, 768, 12, 128


class PatchEmbed(nn.Module):
    """Patches as tokens."""

    img_size, patch_size, grid_size = (SIZE, SIZE), (PATCH, PATCH), (SIZE // PATCH, SIZE // PATCH)
    num_patches = (SIZE // PATCH) ** 2

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)

    def forward(self, tiles: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, T, d]."""
        return self.proj(tiles).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Every token to every token."""

    num_heads, head_dim = HEADS, WIDTH // HEADS

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, d] -> [n, T, d]."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, HEADS, self.head_dim).permute(2, 0, 3, 1, 4)  # [n, h, T, d / h]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, WIDTH))


class Mlp(nn.Module):
    """Two products with a GELU between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, d] -> [n, T, d]."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention and mlp, each after a norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH, 1e-6), Attention()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH, 1e-6), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        """[n, T, d] -> [n, T, d]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class SmallEncoder(nn.Module):
    """One block on 49 patches and a class token; gives all tokens, [n, T, d]."""

    embed_dim, num_prefix_tokens = WIDTH, 1

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, PatchEmbed.num_patches + 1, WIDTH))
        self.norm_pre = nn.Identity()
        self.blocks = nn.ModuleList([Block()])
        self.norm = nn.LayerNorm(WIDTH, 1e-6)

    def _pos_embed(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed

    def forward_head(self, x: Tensor) -> Tensor:
        """All tokens."""
        return x

    def forward(self, tiles: Tensor) -> Tensor:
        """[n, 3, S, S] -> [n, T, d]."""
        x = self.norm_pre(self._pos_embed(self.patch_embed(tiles)))
        for block in self.blocks:
            x = block(x)
        return self.forward_head(self.norm(x))


def write_small_encoder(path: Path, seed: int = 0) -> EncoderModel:
    """Draw weights, write them as safetensors, and return the encoder that they make: 1,536 features a tile."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = SmallEncoder().eval()
    state = {}
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator)
        is_scale = name.endswith("weight") and tensor.ndim == 1
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        state[name] = 1 + 0.1 * drawn if is_scale else drawn / fan_in**0.5 if tensor.ndim > 1 else 0.1 * drawn
    save_file(state, path)
    return EncoderModel(
        name=NAME,
        model=model,
        weights=Weights(path),
        pooling=TOKEN_AND_MEAN,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        microns_a_pixel=None,
        licence="Apache-2.0",
        architecture="SmallEncoder of stpath_train",
    )
