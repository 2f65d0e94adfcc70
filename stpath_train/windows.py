"""Windows of slides, masked for training: what the model is shown, and what it is asked for.

Masked gene modelling as published: the spots nearest to a random one; of the masked ones most get the mask
token, the others lose part of the genes asked for; the model is to predict those genes at every masked spot. Token
rows stay sparse, as indices and values, until they are on the device of the model.

N spots of a batch, n of a window, F features, C spots with a token row, P distinct tokens among them, M masked spots,
G genes asked for, E nonzero values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from stpath_runtime.errors import ConfigError
from stpath_runtime.slides.vocabulary import PAD_TOKEN, organ_token, technology_token

from .config import Data, Masking
from .inputs import knn_blocks
from .model import ContextTokens, KeyBlocks
from .store import Store, StoredSlide, open_slide

Ints = npt.NDArray[np.int64]


class Rows(NamedTuple):
    """A sparse matrix: some spots' log1p of counts, [spots, tokens]."""

    spots: Tensor  # positions in the batch
    tokens: Tensor  # distinct gene tokens, of the columns
    row: Tensor  # [E]
    column: Tensor  # [E]
    value: Tensor  # [E], float32

    def dense(self) -> Tensor:
        """[spots, tokens], on the device that the rows are on."""
        shape = len(self.spots), len(self.tokens)
        return torch.zeros(shape, dtype=self.value.dtype, device=self.value.device).index_put_(
            (self.row, self.column), self.value
        )


class Window(NamedTuple):
    """A masked window of one slide."""

    features: Tensor  # [n, F], as stored
    coords: Tensor  # [n, 2], float32, normalised over the whole slide
    pixels: npt.NDArray[np.generic]  # [n, 2]
    organ: Tensor  # [n]
    technology: Tensor  # [n]
    known: Rows  # the token rows of the spots that do not have the mask token
    asked: Rows  # the expression to predict: masked spots, and genes asked for


@dataclass
class Batch:
    """Windows, one after another; a class that Lightning moves to a device field by field."""

    features: Tensor  # [N, F]
    coords: Tensor  # [N, 2]
    organ: Tensor  # [N]
    technology: Tensor  # [N]
    known: Rows
    asked: list[Rows]  # one a window
    sizes: list[int]
    blocks: KeyBlocks | None  # with kNN attention

    def context(self) -> ContextTokens:
        """The token rows as the model takes them."""
        return ContextTokens(self.known.spots, self.known.tokens, self.known.dense())


class Windows(Dataset[Window]):
    """Masked windows of a store's slides. Draw d is of slide d % slides in epoch d // slides, and always the same."""

    def __init__(self, store: Store, slides: Sequence[str], data: Data, masking: Masking, seed: Sequence[int]) -> None:
        self.store, self.data, self.masking, self.seed = store, data, masking, list(seed)
        self.slides = [slide for slide in slides for _ in range(data.windows_per_slide)]

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, draw: int) -> Window:
        epoch, index = divmod(draw, len(self.slides))
        # Windows depend on the draw alone: not on the process that loads them, nor on those drawn before a resume.
        rng = np.random.default_rng([*self.seed, epoch, index])
        slide = open_slide(self.store, self.slides[index])
        low, high = self.data.spots
        spots = nearest_spots(slide.coords, int(rng.integers(len(slide))), int(rng.integers(low, high, endpoint=True)))
        return masked_window(slide, spots, self.masking, rng)


class DrawSampler(DistributedSampler[int]):
    """Draws of `Windows`: each slide once an epoch, shared out among the processes of a run."""

    def __iter__(self) -> Iterator[int]:
        return (self.epoch * len(self.dataset) + index for index in super().__iter__())  # type: ignore[arg-type]


def nearest_spots(coords: npt.NDArray[np.float32], centre: int, n: int) -> Ints:
    """The n spots nearest to one, ascending (all, where there are no more), by normalised coordinates as published."""
    if n >= len(coords):
        return np.arange(len(coords))
    distance = np.square(coords - coords[centre]).sum(axis=1)
    return np.sort(np.argpartition(distance, n - 1)[:n])


def require_windows(slide: StoredSlide, masking: Masking) -> None:
    """Raise InputError where a window of a slide would be empty: of fewer than two spots, or asked for no gene."""
    name = slide.record.slide
    if len(slide) < 2:
        raise ConfigError(f"slide {name}: {len(slide)} spots, and a window has two or more; leave it out (data.slides)")
    if masking.highly_variable > 0 and not slide.highly_variable.any():
        raise ConfigError(
            f"slide {name}: none of its genes is marked as highly variable; leave it out (data.slides), prepare it "
            "again, or set masking.highly_variable to 0"
        )


def masked_window(slide: StoredSlide, spots: Ints, masking: Masking, rng: np.random.Generator) -> Window:
    """Mask a window.

    Parameters
    ----------
    spots
        [n] positions in the slide, ascending.
    rng
        Decides what is masked.
    """
    n = len(spots)
    features, log_counts = slide.read(spots)
    asked = np.arange(len(slide.tokens))
    if rng.random() < masking.highly_variable:
        asked = np.flatnonzero(slide.highly_variable)
    masked = rng.permutation(n)[: max(1, int(rng.beta(*masking.ratio) * n))]
    whole, part = np.split(masked, [int(masking.whole * len(masked))])
    lost = rng.permutation(asked)[: int(masking.genes_lost * len(asked))]
    masked.sort()

    known = np.setdiff1d(np.arange(n), whole)
    visible = log_counts[known].tocoo()
    kept = ~(np.isin(visible.col, lost) & np.isin(known[visible.row], part))
    target = log_counts[masked][:, asked].tocoo()

    technology = np.full(n, technology_token(slide.record.technology or None))
    technology[rng.random(n) < masking.technology_dropped] = PAD_TOKEN
    return Window(
        torch.from_numpy(features),
        torch.from_numpy(slide.coords[spots]),
        slide.pixels[spots],
        torch.full((n,), organ_token(slide.record.organ)),
        torch.from_numpy(technology),
        _rows(known, slide.tokens, visible.row[kept], visible.col[kept], visible.data[kept]),
        _rows(masked, slide.tokens[asked], target.row, target.col, target.data),
    )


def collate(windows: Sequence[Window], neighbors: int = 0) -> Batch:
    """One batch of windows, in the order given; `neighbors` for kNN attention within each."""
    sizes = [len(window.features) for window in windows]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    asked = [
        window.asked._replace(spots=window.asked.spots + start) for window, start in zip(windows, starts, strict=True)
    ]
    return Batch(
        torch.cat([window.features for window in windows]),
        torch.cat([window.coords for window in windows]),
        torch.cat([window.organ for window in windows]),
        torch.cat([window.technology for window in windows]),
        _joined([window.known for window in windows], starts),
        asked,
        sizes,
        knn_blocks([window.pixels for window in windows], neighbors) if neighbors else None,
    )


def _joined(parts: Sequence[Rows], starts: Sequence[int]) -> Rows:
    """Rows of several windows over the tokens of all."""
    tokens, column = torch.unique(torch.cat([part.tokens for part in parts]), return_inverse=True)
    columns = torch.split(column, [len(part.tokens) for part in parts])
    above = np.cumsum([0, *(len(part.spots) for part in parts)]).tolist()
    return Rows(
        torch.cat([part.spots + start for part, start in zip(parts, starts, strict=True)]),
        tokens,
        torch.cat([part.row + rows for part, rows in zip(parts, above[:-1], strict=True)]),
        torch.cat([column[part.column] for part, column in zip(parts, columns, strict=True)]),
        torch.cat([part.value for part in parts]),
    )


def _rows(spots: Ints, tokens: Ints, row: Any, column: Any, value: npt.NDArray[np.float32]) -> Rows:
    arrays = spots, tokens, row.astype(np.int64), column.astype(np.int64), value
    return Rows(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
