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
from .encoder import AllSpots, NearestSpots
from .errors import InputError, InputWarning
from .manifest import ATTENTIONS, GENES, MANIFEST, Manifest
from .neighbors import plan_blocks
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
        self._approximation_told = False

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
        vocabulary = GeneVocabulary.read(path / GENES)
        if vocabulary.n_tokens != manifest.model.n_tokens:
            raise InputError(
                f"{path}: the model has {manifest.model.n_tokens:,} gene tokens, its vocabulary "
                f"{vocabulary.n_tokens:,}; export the engine again"
            )
        return cls(path, manifest, vocabulary, open_backend(backend, path, device))

    def embed(
        self,
        slide: Slide,
        *,
        context: Context | None = None,
        attention: str | None = None,
        neighbors: int | None = None,
        memory: int | None = None,
        on_tile: OnTile | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embedding of every spot, float32 [N, d]: the last block's output, before the head.

        Parameters
        ----------
        context
            Measured expression of some spots.
        attention
            "global": every spot to every spot of the slide; "knn": to its nearest. None means as the model was trained.
            The other way is an approximation, and warns; `stpath fidelity` measures it.
        neighbors
            With "knn": to how many spots, itself included; more than the slide has means all. None means as trained.
        memory
            Bytes that this may take beyond the features; None means half of what the device has available. The result
            does not depend on it.
        on_tile
            Called with (done, total) as the work goes on.

        Raises
        ------
        InputError
            If the features are not as wide as the engine expects, the context does not fit the slide, the attention is
            unknown or lacks its neighbors, or the memory is too small for one tile.
        """
        self._tell_of_approximation(*self._attention(attention, neighbors))
        self.check(slide)
        rows = context.resolve(slide, self.vocabulary) if context is not None else None
        keys = self.keys(slide, attention, neighbors)
        model, precision = self.manifest.model, self.manifest.precision
        return encoder.encode(self.backend, model, precision, slide, keys, rows, memory, on_tile=on_tile)

    def check(self, slide: Slide) -> None:
        """Check that a slide is one, with features as wide as the engine expects.

        Raises
        ------
        InputError
            If it is not.
        """
        if not isinstance(slide, Slide):
            raise InputError(
                f"expected a Slide, not {type(slide).__name__}; make one with read_slide(path) or Slide(...)"
            )
        width, expected = slide.features.shape[1], self.manifest.model.n_features
        if width != expected:
            raise InputError(
                f"{slide.name}: the features are {width:,} wide; the engine expects {expected:,} "
                f"({self.manifest.encoder}); compute the features with that encoder"
            )

    def keys(self, slide: Slide, attention: str | None = None, neighbors: int | None = None) -> AllSpots | NearestSpots:
        """How the spots of a slide attend: the keys of `stpath_runtime.encoder`."""
        kind, k = self._attention(attention, neighbors)
        if kind == "global":
            return AllSpots(slide, self.manifest.model)
        return NearestSpots(slide, self.manifest.model, plan_blocks([slide.coords], k))

    def _attention(self, attention: str | None, neighbors: int | None) -> tuple[str, int]:
        """Check how to attend; returns the kind and the neighbors (0 for global)."""
        trained = self.manifest.model
        kind = trained.attention if attention is None else attention
        if kind not in ATTENTIONS:
            raise InputError(f"unknown attention {attention!r}; known: {', '.join(ATTENTIONS)}")
        if kind == "global":
            if neighbors is not None:
                raise InputError(f"global attention takes no neighbors ({neighbors!r} given); give attention knn")
            return kind, 0
        k = neighbors if neighbors is not None else trained.neighbors
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or (neighbors is not None and k < 1):
            raise InputError(f"neighbors must be a whole number from 1, not {neighbors!r}")
        if k < 1:
            raise InputError("attention knn needs the number of neighbors: the model was trained globally and has none")
        return kind, int(k)

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
        embedding = np.asarray(embedding)
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
        attention: str | None = None,
        neighbors: int | None = None,
        memory: int | None = None,
        embeddings: bool = False,
        on_tile: OnTile | None = None,
    ) -> AnnData:
        """Predicted expression of a slide.

        Parameters
        ----------
        genes
            Symbols, aliases or Ensembl ids; None means all 38,982 (156 KB a spot).
        context, attention, neighbors, memory
            As for `embed`.
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
        if isinstance(genes, str):
            raise InputError(f"genes must be a list of names, not the text {genes!r}; give [{genes!r}]")
        names = None if genes is None else _distinct([str(gene) for gene in genes])
        if names is not None and not names:
            raise InputError("no gene is asked for; name some, or give None for all")
        # A misspelt gene is found before the work, not after it.
        tokens = self.vocabulary.all_tokens() if names is None else self.vocabulary.tokens(names)
        embedding = self.embed(
            slide, context=context, attention=attention, neighbors=neighbors, memory=memory, on_tile=on_tile
        )
        expression = encoder.decode(self.backend, self.manifest.precision, embedding, tokens)
        adata = self._to_anndata(slide, names, tokens, expression)
        adata.uns["stpath"] = self._provenance(slide, *self._attention(attention, neighbors))
        if embeddings:
            adata.obsm["stpath_embedding"] = embedding
        return adata

    def _tell_of_approximation(self, attention: str, neighbors: int) -> None:
        """Warn, once, where a model attends otherwise than it was trained."""
        trained = self.manifest.model
        if (attention, neighbors) != (trained.attention, trained.neighbors) and not self._approximation_told:
            self._approximation_told = True
            warnings.warn(
                f"{_describe(attention, neighbors)} on a model trained with "
                f"{_describe(trained.attention, trained.neighbors)} is an approximation; stpath fidelity measures it",
                InputWarning,
                stacklevel=4,
            )

    def _to_anndata(
        self,
        slide: Slide,
        names: list[str] | None,
        tokens: npt.NDArray[np.int64],
        expression: npt.NDArray[np.float32],
    ) -> AnnData:
        import pandas as pd
        from anndata import AnnData

        var_names = names if names is not None else self.vocabulary.names(tokens)
        return AnnData(
            X=expression,
            obs=pd.DataFrame(index=pd.Index(slide.obs_names)),
            var=pd.DataFrame({"gene_ids": self.vocabulary.gene_ids(tokens)}, index=pd.Index(var_names)),
            obsm={"spatial": np.array(slide.coords)},
        )

    def _provenance(self, slide: Slide, attention: str, neighbors: int) -> dict[str, Any]:
        model = self.manifest.model
        return {
            "engine": hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest(),
            "checkpoint": self.manifest.checkpoint["sha256"],
            "attention": attention,
            "neighbors": neighbors,
            "trained_attention": model.attention,
            "trained_neighbors": model.neighbors,
            "precision": self.manifest.precision,
            "backend": self.backend.name,
            "device": self.backend.device,
            "organ": slide.organ or "",
            "technology": slide.technology or "",
            "units": "log1p raw counts",
        }


def _describe(attention: str, neighbors: int) -> str:
    return f"knn attention to {neighbors} spots" if attention == "knn" else "global attention"


def _distinct(names: list[str]) -> list[str]:
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        warnings.warn("some genes are asked for more than once; each is given once", InputWarning, stacklevel=3)
    return distinct
