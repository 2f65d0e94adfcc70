"""A slide as the model's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stpath_runtime.encoding.neighbors import nearest, plan_blocks
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import GeneVocabulary

from .model import ContextTokens, KeyBlocks


def slide_inputs(
    slide: Slide,
    vocabulary: GeneVocabulary,
    context: Context | None = None,
    dtype: torch.dtype = torch.float32,
    neighbors: int | None = None,
) -> dict[str, Any]:
    """Arguments of `STPath.embed` for one slide, in the type of the model's weights.

    Coordinates are float64 for a float64 model and float32 for any other. With `neighbors`, for kNN attention.
    """
    tokens = None
    if context is not None:
        rows = context.resolve(slide, vocabulary)
        counts = torch.from_numpy(rows.log_counts.toarray()).to(dtype)
        tokens = ContextTokens(torch.from_numpy(rows.spots), torch.from_numpy(rows.tokens), counts)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    inputs: dict[str, Any] = {
        "features": torch.from_numpy(np.require(slide.features, requirements="W")).to(dtype),
        "coords": torch.from_numpy(slide.normalized_coords()).to(exact),
        "organ": torch.full((len(slide),), slide.organ_token),
        "technology": torch.full((len(slide),), slide.technology_token),
        "context": tokens,
    }
    if neighbors is not None:
        inputs["edge_index"] = knn_edges([slide.coords], neighbors)
    return inputs


def knn_edges(slides: Sequence[npt.NDArray[np.generic]], neighbors: int) -> Tensor:
    """Edges [2, E] from each spot's nearest spots to it, given the pixel coordinates of each slide in turn."""
    edges, spots = [], 0
    for coords in slides:
        source = nearest(coords, neighbors)  # [N, k]
        target = np.repeat(np.arange(len(source)), source.shape[1])
        edges.append(np.stack([source.ravel(), target]) + spots)
        spots += len(coords)
    return torch.from_numpy(np.concatenate(edges, axis=1))


def knn_blocks(slides: Sequence[npt.NDArray[np.generic]], neighbors: int) -> KeyBlocks:
    """The pairs of `knn_edges` as dense blocks."""
    plan = plan_blocks(slides, neighbors)
    tile = plan.tile(slice(0, plan.blocks))
    spot = np.maximum(plan.spot, 0)
    arrays = spot, plan.row, spot[tile.rows[tile.key_index]], tile.mask
    return KeyBlocks(*(torch.from_numpy(array) for array in arrays))
