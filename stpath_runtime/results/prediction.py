"""A prediction: a slide's embedding, and its genes, decoded when they are read or written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoding.attention import Attention
from ..encoding.backend import Backend
from ..encoding.encoder import ExpressionTile, decode
from ..encoding.sizes import CHUNK, GENES_AT_ONCE
from ..manifest import FlowManifest, Manifest
from ..progress import OnTile
from ..slides.context import ContextRows
from ..slides.slide import Patch, Slide
from .output import Format, write_frame

if TYPE_CHECKING:
    from anndata import AnnData

EMBEDDING = "stpath_embedding"  # in obsm
CONTEXT, SECTION = "context", "section"  # in obs


class Result:
    """A predicted slide of N spots and G genes, whose X comes tile by tile."""

    frame: AnnData  #: the result but for X

    def tiles(self) -> Iterator[ExpressionTile]:
        """Expression, log1p of raw counts, tile by tile; no two overlap, and together they are X."""
        raise NotImplementedError

    def to_anndata(self) -> AnnData:
        """The result in memory."""
        adata = self.frame.copy()
        adata.X = np.empty(adata.shape, np.float32)
        for spots, genes, values in self.tiles():
            adata.X[spots, genes] = values
        return adata

    def write(
        self, path: Path, form: Format = Format.H5AD, dtype: npt.DTypeLike = np.float32, on_tile: OnTile | None = None
    ) -> None:
        """Write the result, tile by tile: the memory that this takes does not grow with spots or genes.

        Parameters
        ----------
        dtype
            Of X: float32 or float16.
        on_tile
            Called with (done, total) as the work goes on.

        Raises
        ------
        InputError
            If the file cannot be written; nothing is left of it then, and what stood there before still does.
        """
        done, total = 0, self.frame.n_obs * self.frame.n_vars
        with write_frame(self.frame, path, form, np.dtype(dtype)) as put:
            for spots, genes, values in self.tiles():
                put(spots, genes, values.astype(dtype, copy=False))
                done += values.size
                if on_tile is not None:
                    on_tile(done, total)


@dataclass(frozen=True, eq=False)
class Prediction(Result):
    """A slide, encoded, and the genes to decode."""

    backend: Backend
    precision: str
    frame: AnnData  #: the result but for X
    embedding: npt.NDArray[np.floating]  #: [N, d]
    tokens: npt.NDArray[np.int64]  #: [G]; the last G of the frame's genes
    measured: ContextRows | None = None  #: measured values that replace predicted ones
    earlier: Any = None  #: X of a file, whose genes come first

    def tiles(self) -> Iterator[ExpressionTile]:
        """Expression, log1p of raw counts, tile by tile; no two overlap, and together they are X."""
        kept = self.frame.n_vars - len(self.tokens)
        if kept:
            yield from _copied(self.earlier)
        for spots, genes, values in decode(self.backend, self.precision, self.embedding, self.tokens):
            if self.measured is not None:
                _fill(values, spots, self.tokens[genes], self.measured)
            yield spots, slice(genes.start + kept, genes.stop + kept), values


@dataclass(frozen=True, eq=False)
class Sampled(Result):
    """A slide, sampled."""

    frame: AnnData  #: the result but for X
    values: npt.NDArray[np.float32]  #: [N, G]

    def tiles(self) -> Iterator[ExpressionTile]:
        """Expression, in tiles of rows."""
        for start in range(0, len(self.values), CHUNK[0]):
            spots = slice(start, min(start + CHUNK[0], len(self.values)))
            yield spots, slice(0, self.values.shape[1]), self.values[spots]


def new_frame(
    slide: Slide, names: Sequence[str], gene_ids: Sequence[str], facts: dict[str, Any], context: ContextRows | None
) -> AnnData:
    """The result but for X: spots, genes, coordinates, which spots were context, sections, and provenance."""
    import pandas as pd
    from anndata import AnnData

    obs = pd.DataFrame(index=pd.Index(slide.obs_names, dtype=object))
    if context is not None:
        obs[CONTEXT] = np.isin(np.arange(len(slide)), context.spots)
    if slide.sections is not None:
        obs[SECTION] = pd.Categorical(list(slide.sections), categories=list(dict.fromkeys(slide.sections)))
    var = pd.DataFrame({"gene_ids": list(gene_ids)}, index=pd.Index(list(names), dtype=object))
    return AnnData(obs=obs, var=var, obsm={"spatial": np.array(slide.coords)}, uns={"stpath": facts})


def _copied(x: Any) -> Iterator[ExpressionTile]:
    """The tiles of X of a file."""
    n_spots, n_genes = x.shape
    for first in range(0, n_genes, GENES_AT_ONCE):
        genes = slice(first, min(first + GENES_AT_ONCE, n_genes))
        for start in range(0, n_spots, CHUNK[0]):
            spots = slice(start, min(start + CHUNK[0], n_spots))
            yield spots, genes, np.asarray(x[spots, genes], np.float32)


def _fill(values: npt.NDArray[np.float32], spots: slice, tokens: npt.NDArray[np.int64], measured: ContextRows) -> None:
    """Put the measured values of a tile in the place of its predicted ones."""
    inside = np.flatnonzero((measured.spots >= spots.start) & (measured.spots < spots.stop))
    column = {token: i for i, token in enumerate(measured.tokens.tolist())}
    genes = [i for i, token in enumerate(tokens.tolist()) if token in column]
    if len(inside) and genes:
        known = measured.log_counts[inside][:, [column[int(tokens[i])] for i in genes]]
        values[np.ix_(measured.spots[inside] - spots.start, genes)] = known.toarray()


def provenance(
    slide: Slide, engine: str, manifest: Manifest | FlowManifest, backend: Backend, precision: str
) -> dict[str, Any]:
    """The facts of one slide's prediction; `engine` is the SHA-256 of the manifest that was loaded."""
    return {
        "engine": engine,
        "checkpoint": manifest.checkpoint["sha256"],
        "precision": precision,
        "backend": backend.name,
        "device": backend.device,
        "organ": slide.organ or "",
        "technology": slide.technology or "",
        "patch": _known(slide.patch),
        "units": "log1p raw counts",
    }


def attended(manifest: Manifest, attention: Attention) -> dict[str, Any]:
    """The facts of how spots attended."""
    return {
        "attention": attention.kind,
        "neighbors": attention.neighbors,
        "trained_attention": manifest.model.attention,
        "trained_neighbors": manifest.model.neighbors,
    }


def _known(patch: Patch | None) -> dict[str, float]:
    """What is known of a slide's patches; AnnData files hold no None."""
    return {name: value for name, value in asdict(patch).items() if value is not None} if patch is not None else {}
