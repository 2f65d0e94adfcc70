"""STFlow (Huang et al., ICML 2025): the expression of G genes at all spots of a slide together, by flow matching.

A denoiser tells, of a noisy state and a time, the expression that it comes from; a few steps of it lead from a random
start to a sample. Module names give the keys of a published run's state_dict. What is computed here follows the
formulas term by term; `stpath_export.stflow.stages` computes the same in fewer products.

N spots, F features, G genes, D width, E edge width, H heads, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from stpath_runtime.manifest import FlowConfig
from stpath_runtime.stflow.geometry import frames_of, neighbors_of
from stpath_runtime.stflow.sampler import times

FREQUENCIES = 128
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
SIGNS = ((1, 1), (1, -1), (-1, 1), (-1, -1))  # of the two axes of a frame


class Unit(nn.Module):
    """Two linear layers with a norm before the second, gated ("swiglu") or with an activation between them."""

    def __init__(self, n_in: int, n_hidden: int, n_out: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = activation
        inner = n_hidden // 2 if activation == "swiglu" else n_hidden
        self.fc1 = nn.Linear(n_in, n_hidden)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(inner)
        self.fc2 = nn.Linear(inner, n_out)

    def inner(self, x: Tensor) -> Tensor:
        """What the second linear layer takes."""
        x = self.fc1(x)
        if self.activation == "swiglu":
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = ACTIVATIONS[self.activation](x)
        return self.norm(self.drop(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.inner(x))


class FrameAttention(nn.Module):
    """Attention to the nearest spots; a small network scores each pair by its queries, keys, edge and states."""

    def __init__(self, config: FlowConfig, dropout: float) -> None:
        super().__init__()
        d, e, h, act = config.d_model, config.d_edge, config.n_heads, config.activation
        self.n_heads = h
        score = "swiglu" if act == "swiglu" else "gelu"
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 3 * d))
        self.mlp_attn = Unit((2 * d + e) // h + config.n_genes, d, 1, score, dropout)
        self.edge_trans = Unit(3, e, e, act, dropout)
        self.W_output = Unit(d + e, d, d, act, dropout)

    @property
    def norm_and_qkv(self) -> tuple[nn.LayerNorm, nn.Linear]:
        """The two parts of `layernorm_qkv`."""
        return cast(nn.LayerNorm, self.layernorm_qkv[0]), cast(nn.Linear, self.layernorm_qkv[1])

    def edges(self, frames: Tensor) -> Tensor:
        """Edge of each pair, [N, k, E]: the mean over the four frames, which differ in the signs of the axes."""
        inner = [self.edge_trans.inner(frames * frames.new_tensor([*signs, 1])) for signs in SIGNS]
        return cast(Tensor, self.edge_trans.fc2(torch.stack(inner).mean(dim=0)))  # linear: the mean may come before it

    def forward(self, h: Tensor, y: Tensor, edges: Tensor, neighbors: Tensor) -> Tensor:
        k, heads = neighbors.shape[1], self.n_heads
        q, key, v = rearrange(self.layernorm_qkv(h), "n (part h d) -> part n h d", part=3, h=heads)
        e = rearrange(edges, "n k (h e) -> n k h e", h=heads)
        change = repeat(y[neighbors] - y[:, None], "n k g -> n k h g", h=heads)
        pairs = [repeat(q, "n h d -> n k h d", k=k), key[neighbors], e, change]
        weights = self.mlp_attn(torch.cat(pairs, dim=-1)).softmax(dim=1)  # [N, k, H, 1]
        attended = [rearrange((weights * each).sum(dim=1), "n h d -> n (h d)") for each in (v[neighbors], e)]
        return cast(Tensor, self.W_output(torch.cat(attended, dim=-1)))


class GeneUpdater(nn.Module):
    """Expression as a layer's tokens tell it."""

    def __init__(self, config: FlowConfig, dropout: float) -> None:
        super().__init__()
        d = config.d_model
        linears = nn.Linear(d, d), nn.Linear(d, config.n_genes)
        self.output = nn.Sequential(linears[0], nn.GELU(), nn.LayerNorm(d), nn.Dropout(dropout), linears[1])

    def forward(self, h: Tensor) -> Tensor:
        return cast(Tensor, self.output(h))


class FlowBlock(nn.Module):
    """Attention and an MLP, each added to its input, and the expression after them."""

    def __init__(self, config: FlowConfig, dropout: float) -> None:
        super().__init__()
        d = config.d_model
        self.attn = FrameAttention(config, dropout)
        self.mlp = Unit(d, 4 * d, d, config.activation, dropout)
        self.gene_updater = GeneUpdater(config, dropout)

    def forward(self, h: Tensor, y: Tensor, edges: Tensor, neighbors: Tensor) -> tuple[Tensor, Tensor]:
        h = h + self.attn(h, y, edges, neighbors)
        h = h + self.mlp(h)
        return h, self.gene_updater(h)


class Fourier(nn.Module):
    """A time as a token."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, d_model), nn.SiLU(), nn.Linear(d_model, d_model))

    def forward(self, t: Tensor) -> Tensor:
        i = torch.arange(FREQUENCIES, dtype=t.dtype, device=t.device)
        angles = t * torch.exp(-torch.log(t.new_tensor(1e4)) * i / FREQUENCIES)
        return cast(Tensor, self.mlp(torch.cat([angles.cos(), angles.sin()])))


class Backbone(nn.Module):
    """The row of blocks."""

    def __init__(self, config: FlowConfig, dropout: float) -> None:
        super().__init__()
        self.blks = nn.ModuleList(FlowBlock(config, dropout) for _ in range(config.n_layers))


class STFlow(nn.Module):
    """The denoiser and its sampler."""

    def __init__(self, config: FlowConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.image_transform = nn.Linear(config.n_features, config.d_model)
        self.fourier_proj = Fourier(config.d_model)
        self.backbone = Backbone(config, dropout)

    @property
    def blocks(self) -> list[FlowBlock]:
        """The blocks, in order."""
        return [cast(FlowBlock, block) for block in self.backbone.blks]

    def edges(self, coords: Tensor, neighbors: Tensor) -> list[Tensor]:
        """Edges of each block, [N, k, E]: they depend on neither time nor state."""
        weight = self.image_transform.weight
        # In float64, and by the runtime's own: of axes of equal length the last digits choose.
        found = frames_of(coords.double().cpu().numpy(), neighbors.cpu().numpy())
        frames = torch.from_numpy(np.concatenate([axes for _, axes, _ in found])).to(weight)  # [N, k, 3]
        return [block.attn.edges(frames) for block in self.blocks]

    def forward(self, tokens: Tensor, y: Tensor, t: Tensor, edges: list[Tensor], neighbors: Tensor) -> Tensor:
        """The expression that a state comes from, [N, G].

        Parameters
        ----------
        tokens
            [N, D], `image_transform` of the features.
        y
            [N, G], the state, log1p of raw counts.
        t
            Time, from 0 to 1, a tensor of no axes.
        edges, neighbors
            As `edges` gives them, of neighbours [N, k].
        """
        h = tokens + self.fourier_proj(t)
        predictions = []
        for block, edge in zip(self.blocks, edges, strict=True):
            h, y = block(h, y, edge, neighbors)
            predictions.append(y)
        return torch.stack(predictions).mean(dim=0)

    def sample(
        self, features: Tensor, coords: Tensor, start: Tensor, steps: int | None = None, neighbors: Tensor | None = None
    ) -> Tensor:
        """A sample of the expression, [N, G]: log1p of raw counts; it may be negative.

        Parameters
        ----------
        features
            [N, F].
        coords
            [N, 2], pixels of level 0; their unit matters, their place does not.
        start
            [N, G], the state to begin with.
        steps
            Points of the time grid, from 2: one less evaluations. None means the config's.
        neighbors
            [N, k]; None means the nearest spots.

        Examples
        --------
        >>> config = FlowConfig(n_genes=3, d_model=16, d_edge=8, n_layers=1, n_heads=2, n_features=4)
        >>> model = seeded_flow(config, seed=0)
        >>> model.sample(torch.ones(5, 4), torch.rand(5, 2), torch.zeros(5, 3), steps=2).shape
        torch.Size([5, 3])
        """
        if neighbors is None:
            neighbors = torch.from_numpy(neighbors_of(coords.cpu().numpy(), self.config.neighbors)).to(coords.device)
        *_, (_, found) = self.walk(features, self.edges(coords, neighbors), start, steps, neighbors)
        return found

    def walk(
        self, features: Tensor, edges: list[Tensor], start: Tensor, steps: int | None, neighbors: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The state before each step of `sample`, and the prediction of it, [N, G] each."""
        steps = steps if steps is not None else self.config.steps
        tokens, y = self.image_transform(features), start
        for step, t in enumerate(times(steps)):
            prediction = self(tokens, y, tokens.new_tensor(t), edges, neighbors)
            yield y, prediction
            y = y + (prediction - y) / (steps - 1 - step)


def seeded_flow(config: FlowConfig, seed: int) -> STFlow:
    """A model with random weights that a seed repeats: for tests, benchmarks and the demo, never for biology."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = STFlow(config)
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith(("output.2.weight", "output.2.bias")):
                nn.init.normal_(value, float(name.endswith("weight")), 0.1)
    return model.requires_grad_(False).eval()
