"""Means, variances and correlations of all genes over sets of spots, from embeddings, without decoding all genes.

With expression = A n + c (see `head`), over spots whose standardised embeddings n have mean m and covariance S:

    mean of gene g                  A_g m + c_g
    variance of gene g              A_g S A_g
    covariance of genes g and h     A_g S A_h

N spots, d width, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .head import EPSILON, Head

ROWS = 8_192  # spots that are standardised at once
FEW = 64  # spots of two sets whose spread is computed from their own values
Doubles = npt.NDArray[np.float64]
Spots = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Moments:
    """Number, sum [d] and sum of products [d, d] of standardised embeddings, less `Embedded.centre`."""

    spots: int
    sums: Doubles
    products: Doubles

    def __sub__(self, part: Moments) -> Moments:
        """Of the spots that are not in the part."""
        return Moments(self.spots - part.spots, self.sums - part.sums, self.products - part.products)

    @property
    def mean(self) -> Doubles:
        """[d]."""
        return self.sums / self.spots

    @property
    def scatter(self) -> Doubles:
        """Sum of products about the mean, [d, d]: the covariance, times spots - 1."""
        return self.products - np.outer(self.sums, self.sums) / self.spots


@dataclass(frozen=True, eq=False)
class Contrast:
    """All genes inside a set of spots, and in the spots that it is held against; [G] each."""

    inside: Floats  # means
    against: Floats
    difference: Floats
    effect: Floats  # the difference over the pooled standard deviation (n - 1); NaN where that is zero


class Embedded:
    """A slide's expression, as embeddings [N, d] and a head; the embeddings may be mapped from a file."""

    def __init__(self, embedding: npt.NDArray[np.floating], head: Head | Callable[[], Head]) -> None:
        self.embedding, self._head = embedding, head

    @cached_property
    def head(self) -> Head:
        """The head; made when a gene is first asked for."""
        return self._head if isinstance(self._head, Head) else self._head()

    def __len__(self) -> int:
        return len(self.embedding)

    @cached_property
    def _scale(self) -> Floats:
        """One over the standard deviation of each spot's embedding, [N]."""
        scale = np.empty(len(self), np.float32)
        for start in range(0, len(self), ROWS):
            rows = slice(start, start + ROWS)
            scale[rows] = 1 / np.sqrt(np.asarray(self.embedding[rows], np.float32).var(axis=1) + EPSILON)
        return scale

    def gene(self, gene: int) -> Floats:
        """Expression of a gene at every spot, [N]."""
        weights = self.head.weights[gene]  # their sum is zero, so the mean of an embedding does not matter
        if self.embedding.dtype == np.float32:
            return np.asarray(np.asarray(self.embedding) @ weights * self._scale + self.head.offsets[gene], np.float32)
        values = np.empty(len(self), np.float32)
        for start in range(0, len(self), ROWS):
            rows = slice(start, start + ROWS)
            values[rows] = np.asarray(self.embedding[rows], np.float32) @ weights
        return np.asarray(values * self._scale + self.head.offsets[gene], np.float32)

    def expression(self, rows: slice | Spots, genes: slice | npt.NDArray[np.int64]) -> Floats:
        """Expression of genes at spots, [len(rows), len(genes)]."""
        # As `gene` does: weights sum to zero, so the mean of an embedding does not matter.
        products = np.asarray(self.embedding[rows], np.float32) @ self.head.weights[genes].T
        return np.asarray(products * self._scale[rows, None] + self.head.offsets[genes], np.float32)

    def standardised(self) -> Floats:
        """The standardised embeddings of all spots, [N, d]: expression is linear in them."""
        return self._standardised(slice(None))

    def contrast(self, inside: Spots, against: Spots | None = None) -> Contrast:
        """Genes inside a set of spots against another set, or against the rest of the slide."""
        of_inside = self.moments(inside)
        of_others = self.moments(against) if against is not None else self._of_rest(inside, of_inside)
        difference = self.head.weights @ (of_inside.mean - of_others.mean).astype(np.float32)
        degrees = of_inside.spots + of_others.spots - 2
        if of_inside.spots + of_others.spots <= FEW:
            others = against if against is not None else np.setdiff1d(np.arange(len(self)), inside)
            deviation = self._deviation_of_few(inside, others) / np.sqrt(max(degrees, 1))
        else:
            pooled = (of_inside.scatter + of_others.scatter) / max(degrees, 1)
            deviation = np.sqrt(self._variances(pooled))
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = np.where((deviation > 0) & (degrees > 0), difference / deviation, np.nan)
        return Contrast(self._means(of_inside), self._means(of_others), difference, effect.astype(np.float32))

    def correlations(self, gene: int) -> Floats:
        """Pearson's r of a gene with every gene over all spots, [G]; NaN with one that does not vary."""
        covariance = self.head.weights @ (self._of_all.scatter @ self.head.weights[gene]).astype(np.float32)
        deviation = self._deviations
        with np.errstate(divide="ignore", invalid="ignore"):
            r: Floats = np.clip(covariance / (deviation * deviation[gene]), -1, 1)
        return r

    def moments(self, spots: Spots) -> Moments:
        """Of some spots."""
        return self._moments(self._standardised(part) for part in np.array_split(spots, -(-len(spots) // ROWS)))

    @cached_property
    def centre(self) -> Floats:
        """About the mean of all standardised embeddings, [d]: what is small beside it keeps its digits."""
        some = np.linspace(0, len(self) - 1, min(len(self), ROWS)).astype(np.int64)
        return np.asarray(self._standardised(some).mean(axis=0))

    @cached_property
    def _of_all(self) -> Moments:
        starts = range(0, len(self), ROWS)
        return self._moments(self._standardised(slice(start, start + ROWS)) for start in starts)

    @cached_property
    def _deviations(self) -> Floats:
        """Square roots of the sums of squares about the mean of each gene over all spots, [G]."""
        return np.asarray(np.sqrt(self._variances(self._of_all.scatter)))

    def _of_rest(self, inside: Spots, of_inside: Moments) -> Moments:
        """Of the spots that are not inside; of few by themselves, as little is left of a difference of large sums."""
        if len(inside) <= len(self) / 2:
            return self._of_all - of_inside
        return self.moments(np.setdiff1d(np.arange(len(self)), inside))

    def _deviation_of_few(self, *sets: Spots) -> Floats:
        """Square roots of the sums of squares of each gene about its means in sets of few spots, [G].

        Two or three spots may have nearly the same values, far smaller in spread than what sums of products keep.
        """
        about = [part - part.mean(axis=0, dtype=np.float64) for part in map(self._standardised, sets)]
        values = self.head.weights @ np.concatenate(about).astype(np.float32).T  # [G, spots]
        return np.asarray(np.sqrt(np.square(values).sum(axis=1)))

    def _moments(self, parts: Iterator[Floats]) -> Moments:
        spots, d = 0, self.embedding.shape[1]
        sums, products = np.zeros(d), np.zeros((d, d))
        for part in parts:
            from_centre = part - self.centre
            spots += len(part)
            sums += from_centre.sum(axis=0, dtype=np.float64)
            products += from_centre.T @ from_centre
        return Moments(spots, sums, products)

    def _standardised(self, rows: slice | Spots) -> Floats:
        """The embeddings of spots, less their means and over their standard deviations, [len(rows), d]."""
        part = np.asarray(self.embedding[rows], np.float32)
        part = part - part.mean(axis=1, keepdims=True)
        return np.asarray(part / np.sqrt((part**2).mean(axis=1, keepdims=True) + EPSILON))

    def _means(self, moments: Moments) -> Floats:
        return np.asarray(self.head.weights @ (self.centre + moments.mean).astype(np.float32) + self.head.offsets)

    def _variances(self, covariance: Doubles) -> Floats:
        """A S A of each gene, [G]: as squares, so that none falls below zero."""
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))  # S = root root^T
        return np.asarray(np.square(self.head.weights @ root.astype(np.float32)).sum(axis=1))
