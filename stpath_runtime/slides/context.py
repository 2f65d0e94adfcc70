"""Measured expression of some spots, from which the model predicts the others."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ContextError, OptionError, warn
from ..names import delimiter_of, listed_names
from .slide import Slide, first_repeated, own, require_anndata, text
from .vocabulary import GeneVocabulary, nearest_names

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix


@dataclass(frozen=True, eq=False)
class Context:
    """Raw counts of context spots.

    Parameters
    ----------
    ids
        [C], the spots: their barcodes (text), or their positions in the slide (integers from 0), which no file has:
            what a file names a spot by is text. Barcodes that the slide does not have are left out, with a warning.
    counts
        [C, P], raw counts, dense or scipy sparse; the model takes log1p of them.
    genes
        P names: symbols, aliases or Ensembl ids. Several names of one gene are resolved by the maximum, as in
        published training. Names that the engine does not know are left out, with a warning.

    Examples
    --------
    >>> context = Context(ids=[0, 2], counts=[[3, 0], [1, 2]], genes=["GENE1", "GENE2"])
    >>> adata = engine.predict(slide, genes=["GENE3"], context=context)
    >>> int(adata.obs["context"].sum())
    2
    """

    ids: Sequence[str] | Sequence[int] | npt.NDArray[np.generic]
    counts: Any  # numpy array or scipy sparse matrix
    genes: Sequence[str]

    @classmethod
    def from_anndata(cls, adata: AnnData, *, layer: str | None = None) -> Context:
        """Context spots of an AnnData in memory: what `read_context` gives of it in a file.

        Parameters
        ----------
        adata
            Raw counts in X or a layer; obs_names are barcodes of the slide, var_names genes.
        layer
            Where the counts are; None means X.

        Raises
        ------
        InputError
            If there are no such counts.

        Examples
        --------
        >>> from anndata import AnnData
        >>> import pandas as pd
        >>> genes = pd.DataFrame(index=["GATA3", "ERBB2"])
        >>> counts = AnnData(np.array([[3, 0], [1, 2]]), obs=pd.DataFrame(index=["AAAC-1", "AAAG-1"]), var=genes)
        >>> context = Context.from_anndata(counts)
        >>> context.ids, context.genes
        (['AAAC-1', 'AAAG-1'], ['GATA3', 'ERBB2'])
        """
        require_anndata(adata, "read_context reads files")
        if layer is not None and layer not in adata.layers:
            near = nearest_names(layer, adata.layers)
            raise ContextError(f"adata: no layer {layer!r}{near}; its layers: {', '.join(adata.layers) or 'none'}")
        counts = adata.layers[layer] if layer is not None else adata.X
        if counts is None:
            raise ContextError("adata: holds no X; expected raw counts there, or name a layer")
        if adata.isbacked:
            counts = counts[:]
        return cls(list(map(str, adata.obs_names)), counts, list(map(str, adata.var_names)))

    def resolve(self, slide: Slide, vocabulary: GeneVocabulary) -> ContextRows:
        """Check the context against a slide and the genes of an engine.

        Raises
        ------
        InputError
            If shapes do not fit, no spot is in the slide or one appears twice, no gene is known, or a count is
            negative, NaN or infinite.
        """
        name = f"context of {slide.name}"
        if isinstance(self.genes, str) or isinstance(self.ids, str):
            raise ContextError(f"{name}: ids and genes must be lists of names, not one text")
        counts = as_csr(self.counts, name)
        ids, genes = list(np.asarray(self.ids, object).ravel()), [text(gene, name) for gene in self.genes]
        if counts.shape != (len(ids), len(genes)):
            raise ContextError(
                f"{name}: counts have the shape {list(counts.shape)}; expected [{len(ids)} spots, {len(genes)} genes]"
            )
        spots = _positions(ids, slide)
        if (outside := spots < 0).any():
            strangers = [ids[row] for row in np.flatnonzero(outside)]
            warn(
                f"{name}: {len(strangers):,} of its {len(ids):,} spots are not in the slide and are left out, the "
                f"first is {strangers[0]!r}; {len(ids) - len(strangers):,} are used"
            )
            spots, counts = spots[~outside], counts[~outside]
        tokens, known, left_out = known_genes(counts, genes, vocabulary, name)
        if left_out:
            warn(f"{name}: {left_out:,} of {len(genes):,} genes are not known to the engine and are left out")
        if not is_whole(counts):
            warn(
                f"{name}: {(counts.data != np.rint(counts.data)).mean():.0%} of the counts are not whole numbers "
                f"(highest {counts.data.max():g}), as if log-transformed or normalised; the model was trained on log1p "
                "of raw counts, and takes log1p itself"
            )
        return ContextRows(spots, tokens, known.log1p())


@dataclass(frozen=True, eq=False)
class ContextRows:
    """A context as the model takes it: positions, tokens and log counts."""

    spots: npt.NDArray[np.int64]  # [C], positions in the slide
    tokens: npt.NDArray[np.int64]  # [P], distinct gene tokens
    log_counts: csr_matrix  # [C, P], log1p of raw counts

    def within(self, rows: npt.NDArray[np.int64]) -> ContextRows:
        """The context of some spots of the slide, [M] sorted, which then are all there are."""
        kept = np.flatnonzero(np.isin(self.spots, rows))
        return ContextRows(np.searchsorted(rows, self.spots[kept]), self.tokens, self.log_counts[kept])


def _positions(ids: Sequence[Any], slide: Slide) -> npt.NDArray[np.int64]:
    """Positions of context spots in the slide, [C]; -1 for barcodes that it does not have, if it has others."""
    names: list[Any] = [text(i, f"context of {slide.name}") if isinstance(i, bytes | str) else i for i in ids]
    if all(isinstance(i, str) for i in names):
        where = {barcode: position for position, barcode in enumerate(slide.obs_names)}
        spots = [where.get(name, -1) for name in names]
        if names and max(spots) < 0:
            raise ContextError(
                f"context of {slide.name}: none of its {len(names):,} barcodes is in the slide, the first is "
                f"{names[0]!r} (the slide's first is {slide.obs_names[0]!r}); give the counts of this slide"
            )
    elif all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in names):
        outside = [int(i) for i in names if not 0 <= i < len(slide)]
        if outside:
            raise ContextError(f"context of {slide.name}: spot {outside[0]} is not in 0..{len(slide) - 1}")
        spots = [int(i) for i in names]
    else:
        raise ContextError(f"context of {slide.name}: ids must be all barcodes or all integer positions")
    if len(set(names)) != len(names):
        twice = first_repeated(names)
        raise ContextError(f"context of {slide.name}: spot {twice!r} appears twice; give each one row of counts")
    return np.array(spots, dtype=np.int64)


def as_csr(counts: Any, name: str) -> csr_matrix:
    """Counts as a sparse matrix of float32, its indices checked (scipy trusts those of a file, and crashes).

    Raises
    ------
    InputError
        If they are not a matrix of numbers.
    """
    from scipy.sparse import csr_matrix, issparse

    try:
        counts = _own_sparse(counts) if issparse(counts) else own(counts)
        if counts.dtype.kind not in "iufb" or counts.ndim != 2:
            raise ValueError(f"type {counts.dtype}, shape {list(counts.shape)}")
        # In the model's type before entries that appear twice are added up: small integers would overflow.
        matrix = csr_matrix(counts.astype(np.float32, copy=False))
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ContextError(f"{name}: the counts are not a matrix [spots, genes] of numbers ({error})") from error
    matrix.sum_duplicates()
    return matrix


def _own_sparse(counts: Any) -> Any:
    """A copy of a sparse matrix: scipy sorts its arrays in place."""
    if counts.format not in ("csr", "csc", "bsr"):
        return counts.copy()
    parts = (np.array(part, part.dtype.newbyteorder("=")) for part in (counts.data, counts.indices, counts.indptr))
    copied = type(counts)(tuple(parts), shape=counts.shape)
    copied.check_format(full_check=True)
    return copied


def is_whole(counts: csr_matrix) -> bool:
    """Whether all counts are whole numbers, as raw ones are."""
    return bool((counts.data == np.rint(counts.data)).all())


def known_genes(
    counts: csr_matrix, genes: Sequence[str], vocabulary: GeneVocabulary, name: str
) -> tuple[npt.NDArray[np.int64], csr_matrix, int]:
    """The genes that the vocabulary knows, by token: tokens [P], their counts [N, P], and how many are left out.

    Several names of one gene are resolved by the maximum, as in published training.

    Raises
    ------
    InputError
        If a count is negative, NaN or infinite, or no gene is known.
    """
    _check_counts(counts, name)
    token_of = [vocabulary.find(gene) for gene in genes]
    known = np.flatnonzero([token is not None for token in token_of])
    if len(known) == 0:
        first = f" (the first is {genes[0]!r})" if len(genes) else ""
        raise ContextError(
            f"{name}: none of its {len(genes):,} genes is known to the model{first}; give symbols or Ensembl ids"
        )
    tokens = np.array([token_of[i] for i in known], dtype=np.int64)
    return *_merge_by_maximum(counts[:, known], tokens), len(genes) - len(known)


def _check_counts(counts: csr_matrix, name: str) -> None:
    values = counts.data
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise ContextError(f"{name}: {bad:,} counts are NaN or infinite; give raw counts")
    if (values < 0).any():
        raise ContextError(
            f"{name}: {int((values < 0).sum()):,} counts are negative (lowest {values.min():g}); give raw "
            "counts, not scaled or normalised values"
        )


def _merge_by_maximum(counts: csr_matrix, tokens: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], csr_matrix]:
    """One column a gene, the highest of those that share a token: distinct tokens [P], counts [N, P]."""
    from scipy.sparse import csr_matrix

    distinct, column = np.unique(tokens, return_inverse=True)
    coo = counts.tocoo()
    order = np.lexsort((coo.data, column[coo.col], coo.row))
    row, col, value = coo.row[order], column[coo.col][order], coo.data[order]
    # The last entry of each (row, column) is its highest.
    last = np.append((row[1:] != row[:-1]) | (col[1:] != col[:-1]), True)[: len(row)]
    shape = (counts.shape[0], len(distinct))
    return distinct, csr_matrix((value[last], (row[last], col[last])), shape=shape, dtype=np.float32)


def choose_spots(context: Context, slide: Slide, which: str) -> Context:
    """The part of a context file, by barcodes, that is to be the context.

    Parameters
    ----------
    which
        "5%": by the published rule, that share of the slide's spots, those farthest from the rightmost one; barcodes
        "A,B,C", or a .txt (one a line) or .json file of them; or a .csv file with the columns barcode and context (1 or
        0, true or false), a row a spot.

    Raises
    ------
    InputError
        If it is none of these, names a spot that has no counts, or chooses none.
    """
    name = f"context of {slide.name}"
    row = {barcode: i for i, barcode in enumerate(context.ids)}
    if len(row) < len(context.ids):
        twice = next(barcode for i, barcode in enumerate(context.ids) if row[barcode] != i)
        raise ContextError(f"{name}: spot {twice!r} appears twice; give each one row of counts")
    if share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", which.strip()):
        masked = masked_spots(slide.coords, 1 - _fraction(share[1]))
        others = np.setdiff1d(np.arange(len(slide)), masked)
        wanted = [slide.obs_names[spot] for spot in others]
        known = [barcode for barcode in wanted if barcode in row]
        if len(known) < len(wanted):
            lacking = f"{len(wanted) - len(known):,} of the {len(wanted):,} spots that {which} chooses have no counts"
            warn(f"{name}: {lacking}")
    else:
        known = _mask(Path(which)) if which.endswith(".csv") else listed_names(which, "--context-spots", "barcode")
        if missing := [barcode for barcode in known if barcode not in row]:
            raise ContextError(
                f"--context-spots {which}: {len(missing):,} of {len(known):,} barcodes have no counts, the first is "
                f"{missing[0]!r}"
            )
    if not known:
        raise ContextError(
            f"{name}: --context-spots {which} chooses no spot that has counts; choose others or leave it out"
        )
    return Context(known, as_csr(context.counts, name)[[row[barcode] for barcode in known]], context.genes)


def masked_spots(coords: npt.NDArray[Any], masked: float) -> npt.NDArray[np.int64]:
    """The masked spots of a slide, ascending: the int(N * masked) nearest to the rightmost spot, itself among them.

    As published (STPath's README and `PatchSampler.sample_nearest_patch`): the first spot of the largest x, and a
    KDTree on the coordinates [N, 2]. Of several rightmost spots the first in the file's order, which may not be that of
    the published files.
    """
    from scipy.spatial import KDTree

    count = int(len(coords) * masked)
    if count == 0:  # a slide of one spot
        return np.empty(0, np.int64)
    rightmost = coords[np.argmax(coords[:, 0])]
    _, nearest = KDTree(coords).query(rightmost, k=[*range(1, count + 1)])
    return np.sort(np.asarray(nearest, np.int64))


def _fraction(percent: str) -> float:
    share = float(percent) / 100
    if not 0 < share < 1:
        raise OptionError(f"--context-spots {percent}%: give a share above 0% and below 100%")
    return share


def _mask(path: Path) -> list[str]:
    """The barcodes that a mask file marks as context."""
    if not path.is_file():
        raise OptionError(f"--context-spots {path}: no such file")
    truth = {"1": True, "true": True, "0": False, "false": False}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = file.read()
        rows = csv.DictReader(io.StringIO(table, newline=""), delimiter=delimiter_of(table), strict=True)
        return [row["barcode"] for row in rows if truth[row["context"].strip().lower()]]
    except (KeyError, AttributeError, ValueError, csv.Error) as error:
        raise OptionError(
            f"--context-spots {path}: not a mask ({type(error).__name__}: {error}); give a .csv with the columns "
            "barcode and context, which is 1 or 0"
        ) from error
