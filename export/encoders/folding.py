"""A vision transformer folded into fewer operations, exactly; all of it in float64, before the weights are rounded.

With W and b of a product, and n(x) the normalised x of a LayerNorm without scale and shift:

- W (g n(x) + h) + b = (W g) n(x) + (W h + b): scale g and shift h of a norm go into the product after it;
- LayerScale s (W y + b) = (s W) y + s b;
- softmax(q k' / sqrt(d)): 1 / sqrt(d) goes into the product that gives q;
- ((p / 255 - mean) / std) for a pixel p: W / (255 std) of p - m, where m is 255 mean rounded to whole numbers, which
  every precision holds exactly, and the rest, 255 mean - m, goes into b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stpath_train.encoders import MEAN, EncoderModel


@dataclass(frozen=True, eq=False)
class Product:
    """y = x W + b, with W [in, out] and b [out]."""

    weight: Tensor
    bias: Tensor

    def after_norm(self, norm: Mapping[str, Tensor]) -> Product:
        """The product of n(x) instead of the norm's output."""
        scale, shift = norm["weight"], norm.get("bias", torch.zeros_like(norm["weight"]))
        return Product(self.weight * scale[:, None], self.bias + shift @ self.weight)

    def scaled(self, scale: Tensor | float) -> Product:
        """The product with its outputs [out] multiplied."""
        return Product(self.weight * scale, self.bias * scale)


@dataclass(frozen=True, eq=False)
class Block:
    """x + out(attention(q, k, v of n(x))), then x + down(gate(up) of n(x))."""

    q: Product
    k: Product
    v: Product
    out: Product
    up: Product
    gate: Product | None  # SiLU(gate) * up; None: GELU(up)
    down: Product
    scales: tuple[Tensor, Tensor] | None  # LayerScale of both branches, where it is not folded
    eps: float  # of both norms


@dataclass(frozen=True, eq=False)
class Stem:
    """Tokens from pixels: patches [p * p * 3] less whole numbers, times a product, plus what is constant."""

    product: Tensor  # [p * p * 3, d]
    whole: tuple[int, int, int]  # what is subtracted of each colour
    constant: Tensor  # [T, d]: class token and registers, bias and positions
    prefix: int  # tokens before those of the patches
    grid: int  # patches along a side
    patch: int  # pixels along a side of one
    norm: dict[str, Tensor] | None  # before the blocks


def fold_stem(encoder: EncoderModel) -> Stem:
    """Fold the mean, the deviation, the bias and the positions around the patches' product."""
    model, state = encoder.model, _state(encoder, "")
    patch, grid = int(model.patch_embed.patch_size[0]), int(model.patch_embed.grid_size[0])
    weight = state["patch_embed.proj.weight"]  # [d, 3, p, p]
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (encoder.mean, encoder.std))
    whole = (255 * mean).round()
    weight = (weight / (255 * std)[:, None, None]).permute(2, 3, 1, 0)  # [p, p, 3, d]
    bias = ((whole - 255 * mean) @ weight.sum(dim=(0, 1))) + state.get("patch_embed.proj.bias", 0.0)
    prefix = torch.cat([state[name][0] for name in ("cls_token", "reg_token") if name in state] or [bias[:0, None]])
    positions = state["pos_embed"][0] if "pos_embed" in state else torch.zeros(grid * grid, len(bias)).double()
    constant = torch.cat([prefix, bias.expand(grid * grid, -1)])
    constant[len(constant) - len(positions) :] += positions  # of patches alone, or of the class token, too
    norm = {name.removeprefix("norm_pre."): state[name] for name in state if name.startswith("norm_pre.")}
    return Stem(
        weight.reshape(patch * patch * 3, -1),
        (int(whole[0]), int(whole[1]), int(whole[2])),
        constant,
        model.num_prefix_tokens,
        grid,
        patch,
        norm or None,
    )


def fold_block(encoder: EncoderModel, index: int, fold_scales: bool) -> Block:
    """Fold norms, 1 / sqrt(d) and LayerScale of one block.

    Parameters
    ----------
    fold_scales
        Whether LayerScale is folded: float16 has too few exponents for weights times 1e-5.
    """
    block = encoder.model.blocks[index]
    state = _state(encoder, f"blocks.{index}.")
    norm1, norm2 = _part(state, "norm1."), _part(state, "norm2.")
    whole = _product(state, "attn.qkv")
    q, k, v = (
        Product(weight, bias).after_norm(norm1)
        for weight, bias in zip(whole.weight.chunk(3, dim=1), whole.bias.chunk(3), strict=True)
    )
    out, down = _product(state, "attn.proj"), _product(state, "mlp.fc2")
    up, gate = _mlp(state, block)
    scales = (state["ls1.gamma"], state["ls2.gamma"]) if "ls1.gamma" in state else None
    if scales is not None and fold_scales:
        out, down, scales = out.scaled(scales[0]), down.scaled(scales[1]), None
    return Block(
        q=q.scaled(block.attn.head_dim**-0.5),
        k=k,
        v=v,
        out=out,
        up=up.after_norm(norm2),
        gate=gate.after_norm(norm2) if gate is not None else None,
        down=down,
        scales=scales,
        eps=block.norm1.eps,
    )


def final_norm(encoder: EncoderModel) -> tuple[dict[str, Tensor], float] | None:
    """Scale and shift of the norm after the blocks, and its eps: before the pooling, or after a mean (fc_norm)."""
    name = "fc_norm" if encoder.pooling == MEAN and "fc_norm.weight" in encoder.weights else "norm"
    norm = _part(_state(encoder, f"{name}."), "")
    return (norm, getattr(encoder.model, name).eps) if norm else None


def _mlp(state: dict[str, Tensor], block: Any) -> tuple[Product, Product | None]:
    """The products up and gate; packed, one half is the gate."""
    if "mlp.fc1_g.weight" in state:
        return _product(state, "mlp.fc1_x"), _product(state, "mlp.fc1_g")
    first = _product(state, "mlp.fc1")
    if not hasattr(block.mlp, "gate_last"):
        return first, None
    weights, biases = first.weight.chunk(2, dim=1), first.bias.chunk(2)
    halves = [Product(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    gate = int(block.mlp.gate_last)
    return halves[1 - gate], halves[gate]


def _state(encoder: EncoderModel, prefix: str) -> dict[str, Tensor]:
    """Weights whose names begin so, in float64; without a prefix those outside of the blocks."""
    names = [name for name in encoder.weights if name.startswith(prefix)]
    if not prefix:
        names = [name for name in names if not name.startswith("blocks.")]
    return {name.removeprefix(prefix): encoder.weights[name].double() for name in names}


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _product(state: dict[str, Tensor], name: str) -> Product:
    weight = state[f"{name}.weight"].T.contiguous()
    return Product(weight, state.get(f"{name}.bias", torch.zeros(weight.shape[1], dtype=torch.float64)))
