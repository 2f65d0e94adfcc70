"""The same numbers as `statistics`, of genes whose values a file holds: predictions without embeddings, measured data.

N spots, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .statistics import Contrast, Doubles, Floats, Spots

READ = 64 << 20  # bytes of values that are read at once


class Columns:
    """A slide's expression, as values [N, G] of an open file, read by genes; a sum is over float64."""

    def __init__(self, values: Any) -> None:
        self.values = values
        self.shape: tuple[int, int] = tuple(values.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def gene(self, gene: int) -> Floats:
        """Expression of a gene at every spot, [N]."""
        return np.asarray(self.values[:, gene : gene + 1], np.float32)[:, 0]

    def expression(self, rows: slice | Spots, genes: slice | npt.NDArray[np.int64]) -> Floats:
        """Expression of genes at spots, [len(rows), len(genes)]."""
        columns = np.arange(self.shape[1])[genes]
        part = np.empty((len(np.arange(len(self))[rows]), len(columns)), np.float32)
        for i, gene in enumerate(columns.tolist()):
            part[:, i] = self.gene(gene)[rows]
        return part

    def contrast(self, inside: Spots, against: Spots | None = None) -> Contrast:
        """Genes inside a set of spots against another set, or against the rest of the slide."""
        if against is None:
            against = np.setdiff1d(np.arange(len(self)), inside)
        found = [np.empty(self.shape[1]) for _ in range(4)]
        degrees = len(inside) + len(against) - 2
        for genes, part in self._parts():
            means = [part[spots].mean(axis=0) for spots in (inside, against)]
            squares = [((part[s] - mean) ** 2).sum(axis=0) for s, mean in zip((inside, against), means, strict=True)]
            difference = means[0] - means[1]
            with np.errstate(divide="ignore", invalid="ignore"):
                deviation = np.sqrt((squares[0] + squares[1]) / degrees)
                effect = np.where(deviation > 0, difference / deviation, np.nan)
            for whole, values in zip(found, (*means, difference, effect), strict=True):
                whole[genes] = values
        return Contrast(*(values.astype(np.float32) for values in found))

    def correlations(self, gene: int) -> Floats:
        """Pearson's r of a gene with every gene over all spots, [G]; NaN with one that does not vary."""
        own = self.gene(gene).astype(np.float64)
        own -= own.mean()
        r = np.empty(self.shape[1], np.float32)
        for genes, part in self._parts():
            from_mean = part - part.mean(axis=0)
            with np.errstate(divide="ignore", invalid="ignore"):
                r[genes] = own @ from_mean / np.sqrt((own @ own) * np.square(from_mean).sum(axis=0))
        return np.asarray(np.clip(r, -1, 1))

    def _parts(self) -> Iterator[tuple[slice, Doubles]]:
        """Genes, and their values at all spots [N, genes]."""
        step = max(1, READ // (8 * len(self)))
        for start in range(0, self.shape[1], step):
            genes = slice(start, min(start + step, self.shape[1]))
            yield genes, np.asarray(self.values[:, genes], np.float64)
