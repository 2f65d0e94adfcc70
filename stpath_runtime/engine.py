"""An engine, loaded: slides in, expression out."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import encoder
from .backends import Backend, open_backend
from .context import Context
from .errors import InputError, InputWarning
from .manifest import GENES, MANIFEST, Manifest
from .progress import OnTile
from .slide import Slide
from .vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData


class Engine:
    """Predicts gene expression with an engine directory; make one with `Engine.load`."""

    def __init__(self, path: Path, manifest: Manifest, vocabulary: GeneVocabulary, backend: Backend) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.backend = backend

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, {self.manifest.precision}, {self.backend.name} on {self.backend.device})"

    @classmethod
    def load(cls, path: str | Path, *, backend: str = "onnxruntime", device: str = "cpu") -> Engine:
        """Load an engine directory and check its manifest and the hash of every file.

        Parameters
        ----------
        backend
            What runs the graphs; see `stpath_runtime.backends.BACKENDS`.
        device
            "cpu" or "cuda:N". What is asked for runs, or an error is raised.

        Raises
        ------
        InputError
            If the engine is missing, damaged or newer than this package, or the backend or device is not there.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        manifest.check_files(path)
        return cls(path, manifest, GeneVocabulary.read(path / GENES), open_backend(backend, path, device))

    def embed(
        self, slide: Slide, *, context: Context | None = None, on_tile: OnTile | None = None
    ) -> npt.NDArray[np.float32]:
        """Embedding of every spot, float32 [N, d]: the last block's output, before the head.

        Parameters
        ----------
        context
            Measured expression of some spots.
        on_tile
            Called with (done, total) as the work goes on.

        Raises
        ------
        InputError
            If the features are not as wide as the engine expects, or the context does not fit the slide.
        """
        expected = self.manifest.model.n_features
        if slide.features.shape[1] != expected:
            raise InputError(
                f"{slide.name}: the features are {slide.features.shape[1]:,} wide; the engine expects {expected:,} "
                f"({self.manifest.encoder}); compute the features with that encoder"
            )
        rows = context.resolve(slide, self.vocabulary) if context is not None else None
        model, precision = self.manifest.model, self.manifest.precision
        return encoder.encode(self.backend, model, precision, slide, rows, on_tile=on_tile)

    def decode(
        self, embedding: npt.NDArray[np.floating], genes: Sequence[str] | None = None, *, on_tile: OnTile | None = None
    ) -> npt.NDArray[np.float32]:
        """Expression from embeddings that `embed` made: float32 [N, G], log1p of raw counts.

        Parameters
        ----------
        embedding
            [N, d].
        genes
            Symbols, aliases or Ensembl ids; None means all, in token order.

        Raises
        ------
        InputError
            If a gene is unknown or the embedding is of another width.
        """
        d_model = self.manifest.model.d_model
        if embedding.ndim != 2 or embedding.shape[1] != d_model:
            raise InputError(f"embedding: the shape is {list(embedding.shape)}; this engine's is [N, {d_model}]")
        tokens = self.vocabulary.tokens(genes) if genes is not None else self.vocabulary.all_tokens()
        return encoder.decode(self.backend, self.manifest.precision, embedding, tokens, on_tile)

    def predict(
        self,
        slide: Slide,
        *,
        genes: Sequence[str] | None = None,
        context: Context | None = None,
        embeddings: bool = False,
        on_tile: OnTile | None = None,
    ) -> AnnData:
        """Predicted expression of a slide.

        Parameters
        ----------
        genes
            Symbols, aliases or Ensembl ids; None means all 38,982 (156 KB a spot).
        context
            Measured expression of some spots.
        embeddings
            Whether to keep the embedding in `obsm["stpath_embedding"]`.
        on_tile
            Called with (done, total) as the encoder goes on.

        Returns
        -------
        AnnData of N spots: X float32, log1p of raw counts; obs_names the barcodes; var_names the names asked for, with
        `var["gene_ids"]`; `obsm["spatial"]` the coordinates that came in; `uns["stpath"]` the provenance.

        Raises
        ------
        InputError
            As `embed` and `decode`, and if no gene is asked for.
        """
        names = None if genes is None else _distinct([str(gene) for gene in genes])
        if names is not None and not names:
            raise InputError("no gene is asked for; name some, or give None for all")
        # A misspelt gene is found before the work, not after it.
        tokens = self.vocabulary.all_tokens() if names is None else self.vocabulary.tokens(names)
        embedding = self.embed(slide, context=context, on_tile=on_tile)
        expression = encoder.decode(self.backend, self.manifest.precision, embedding, tokens)
        return self._to_anndata(slide, names, tokens, expression, embedding if embeddings else None)

    def _to_anndata(
        self,
        slide: Slide,
        names: list[str] | None,
        tokens: npt.NDArray[np.int64],
        expression: npt.NDArray[np.float32],
        embedding: npt.NDArray[np.float32] | None,
    ) -> AnnData:
        import pandas as pd
        from anndata import AnnData

        var_names = names if names is not None else self.vocabulary.names(tokens)
        adata = AnnData(
            X=expression,
            obs=pd.DataFrame(index=pd.Index(slide.obs_names)),
            var=pd.DataFrame({"gene_ids": self.vocabulary.gene_ids(tokens)}, index=pd.Index(var_names)),
            obsm={"spatial": np.array(slide.coords)},
            uns={"stpath": self._provenance(slide)},
        )
        if embedding is not None:
            adata.obsm["stpath_embedding"] = embedding
        return adata

    def _provenance(self, slide: Slide) -> dict[str, Any]:
        return {
            "engine": hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest(),
            "checkpoint": self.manifest.checkpoint["sha256"],
            "attention": self.manifest.attention,
            "precision": self.manifest.precision,
            "backend": self.backend.name,
            "device": self.backend.device,
            "organ": slide.organ or "",
            "technology": slide.technology or "",
            "units": "log1p raw counts",
        }


def _distinct(names: list[str]) -> list[str]:
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        warnings.warn(
            f"{len(names) - len(distinct)} genes are asked for twice; each is given once", InputWarning, stacklevel=3
        )
    return distinct
