"""An engine, loaded: slides in, expression out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import encoder
from .backends import Backend, open_backend
from .context import Context, ContextRows
from .encoder import AllSpots, NearestSpots, Spots
from .errors import EngineError, FeaturesError, GeneError, InputWarning, OptionError, PredictionError, SlideError
from .manifest import ATTENTIONS, GENES, MANIFEST, Manifest, sha256
from .neighbors import plan_blocks
from .prediction import EMBEDDING, Prediction, new_frame
from .progress import OnTile
from .slide import Patch, Slide
from .vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData


class Engine:
    """Predicts gene expression with an engine directory; make one with `Engine.load`."""

    def __init__(
        self, path: Path, manifest: Manifest, vocabulary: GeneVocabulary, backend: Backend, precision: str | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.backend = backend
        self.precision = precision or manifest.precision  # what the backend computes in
        self._approximation_told = False

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, {self.precision}, {self.backend.name} on {self.backend.device})"

    @classmethod
    def load(
        cls, path: str | Path, *, backend: str = "onnxruntime", device: str = "cpu", precision: str | None = None
    ) -> Engine:
        """Load an engine directory and check its manifest and the hash of every file.

        Parameters
        ----------
        backend
            What runs the graphs; see `stpath_runtime.backends.BACKENDS`.
        device
            "cpu" or "cuda:N". What is asked for runs, or an error is raised.
        precision
            What to compute in: "bf16" by the backend "openvino" on CPUs that have it; None means the engine's own.

        Raises
        ------
        InputError
            If the engine is missing, damaged or newer than this package, the backend or device is not there, or
            it lacks the precision.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        manifest.check_files(path)
        vocabulary = GeneVocabulary.read(path / GENES)
        if vocabulary.n_tokens != manifest.model.n_tokens:
            raise EngineError(
                f"{path}: the model has {manifest.model.n_tokens:,} gene tokens, its vocabulary "
                f"{vocabulary.n_tokens:,}; export the engine again"
            )
        opened = open_backend(backend, path, device, manifest.precision, precision)
        return cls(path, manifest, vocabulary, opened, precision)

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
        how = self.attention(attention, neighbors)
        self.check(slide)
        rows = context.resolve(slide, self.vocabulary) if context is not None else None
        return self._embed([slide], [rows], *how, memory, on_tile)[0]

    def _embed(
        self,
        slides: Sequence[Slide],
        contexts: Sequence[ContextRows | None],
        attention: str,
        neighbors: int,
        memory: int | None,
        on_tile: OnTile | None = None,
    ) -> list[npt.NDArray[np.float32]]:
        """Embeddings of slides, by one row of calls."""
        spots = Spots.of(slides, contexts)
        keys = self.keys(slides, spots, attention, neighbors)
        model, precision = self.manifest.model, self.precision
        embedding = encoder.encode(self.backend, model, precision, spots, keys, memory, on_tile=on_tile)
        return np.split(embedding, np.cumsum([len(slide) for slide in slides])[:-1])

    def check(self, slide: Slide) -> None:
        """Check that a slide is one, with features as wide as the engine expects.

        Raises
        ------
        InputError
            If it is not.
        """
        if not isinstance(slide, Slide):
            raise SlideError(
                f"expected a Slide, not {type(slide).__name__}; make one with read_slide(path) or Slide(...)"
            )
        width, expected = slide.features.shape[1], self.manifest.model.n_features
        if width != expected:
            raise FeaturesError(
                f"{slide.name}: the features are {width:,} wide; the engine expects {expected:,} "
                f"({self.manifest.encoder}); compute the features with that encoder"
            )

    def keys(self, slides: Sequence[Slide], spots: Spots, attention: str, neighbors: int) -> AllSpots | NearestSpots:
        """How the spots of slides attend: the keys of `stpath_runtime.encoder`."""
        if attention == "global":
            if len(slides) == 1:
                return AllSpots(spots, self.manifest.model, self.precision)
            neighbors = max(len(slide) for slide in slides)  # as many as there are: the same as global
        return NearestSpots(spots, self.manifest.model, plan_blocks([slide.coords for slide in slides], neighbors))

    def attention(self, attention: str | None, neighbors: int | None) -> tuple[str, int]:
        """How to attend, checked: the kind and the neighbors (0 for global), as trained where None.

        Warns, once, where that is an approximation.

        Raises
        ------
        InputError
            If the kind is unknown or the neighbors do not fit it.
        """
        kind, k = self._attention(attention, neighbors)
        trained = self.manifest.model
        if (kind, k) != (trained.attention, trained.neighbors) and not self._approximation_told:
            self._approximation_told = True
            warnings.warn(
                f"{_describe(kind, k)} on a model trained with {_describe(trained.attention, trained.neighbors)} is an "
                "approximation; stpath fidelity measures it",
                InputWarning,
                stacklevel=4,
            )
        return kind, k

    def _attention(self, attention: str | None, neighbors: int | None) -> tuple[str, int]:
        trained = self.manifest.model
        kind = trained.attention if attention is None else attention
        if kind not in ATTENTIONS:
            raise OptionError(f"unknown attention {attention!r}; known: {', '.join(ATTENTIONS)}")
        if kind == "global":
            if neighbors is not None:
                raise OptionError(f"global attention takes no neighbors ({neighbors!r} given); give attention knn")
            return kind, 0
        k = neighbors if neighbors is not None else trained.neighbors
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or (neighbors is not None and k < 1):
            raise OptionError(f"neighbors must be a whole number from 1, not {neighbors!r}")
        if k < 1:
            raise OptionError(
                "attention knn needs the number of neighbors: the model was trained globally and has none"
            )
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
        embedding = self.check_embedding(embedding, "embedding")
        tokens = self.vocabulary.tokens(genes) if genes is not None else self.vocabulary.all_tokens()
        expression = np.empty((len(embedding), len(tokens)), np.float32)
        for spots, columns, values in encoder.decode(self.backend, self.precision, embedding, tokens):
            expression[spots, columns] = values
            if on_tile is not None:
                on_tile(columns.start * len(embedding) + values.shape[1] * spots.stop, expression.size)
        return expression

    def check_embedding(self, embedding: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        """Check that an embedding is one of this engine's model, by its width.

        Raises
        ------
        InputError
            If it is not.
        """
        d_model = self.manifest.model.d_model
        embedding = np.asarray(embedding)
        if embedding.ndim != 2 or embedding.shape[1] != d_model or embedding.dtype.kind != "f":
            raise PredictionError(
                f"{name}: {embedding.dtype} of shape {list(embedding.shape)}; this engine's is float [N, {d_model}]"
            )
        return embedding

    def encode(
        self,
        slides: Sequence[Slide],
        contexts: Sequence[Context | ContextRows | None] | None = None,
        *,
        genes: Sequence[str] | None = None,
        attention: str | None = None,
        neighbors: int | None = None,
        memory: int | None = None,
        embeddings: bool = False,
        fill_context: bool = False,
        on_tile: OnTile | None = None,
    ) -> list[Prediction]:
        """Run the encoder on a slide, or on several small ones in one row of calls; genes are decoded later.

        What `Prediction.write` takes does not grow with the genes: for all genes of a large slide. No spot attends to
        another slide's. Parameters and errors are those of `predict`; a context, resolved or not, or None for each.
        """
        contexts = contexts if contexts is not None else [None] * len(slides)
        names, tokens = self.panel(genes)  # a misspelt gene is found before the work, not after it
        how = self.attention(attention, neighbors)
        rows = []
        for slide, context in zip(slides, contexts, strict=True):
            self.check(slide)
            rows.append(context.resolve(slide, self.vocabulary) if isinstance(context, Context) else context)
        found = self._embed(slides, rows, *how, memory, on_tile)
        predictions = []
        for slide, measured, embedding in zip(slides, rows, found, strict=True):
            facts = self._provenance(slide, *how) | {"context_filled": fill_context and measured is not None}
            frame = new_frame(slide, names, self.vocabulary.gene_ids(tokens), facts, measured)
            if embeddings:
                frame.obsm[EMBEDDING] = embedding
            predictions.append(Prediction(self, frame, embedding, tokens, measured if fill_context else None))
        return predictions

    def panel(self, genes: Sequence[str] | None) -> tuple[list[str], npt.NDArray[np.int64]]:
        """The names to show and the tokens of the genes asked for; None means all.

        Raises
        ------
        InputError
            If a gene is unknown, or none is asked for.
        """
        if genes is None:
            tokens = self.vocabulary.all_tokens()
            return self.vocabulary.names(tokens), tokens
        if isinstance(genes, str):
            raise GeneError(f"genes must be a list of names, not the text {genes!r}; give [{genes!r}]")
        names = _distinct([str(gene) for gene in genes])
        if not names:
            raise GeneError("no gene is asked for; name some, or give None for all")
        return names, self.vocabulary.tokens(names)

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
        fill_context: bool = False,
        on_tile: OnTile | None = None,
    ) -> AnnData:
        """Predicted expression of a slide.

        Parameters
        ----------
        genes
            Symbols, aliases or Ensembl ids; None means all 38,982 (156 KB a spot: see `encode`).
        context, attention, neighbors, memory
            As for `embed`.
        embeddings
            Whether to keep the embedding in `obsm["stpath_embedding"]`, from which any gene can be decoded later.
        fill_context
            Whether measured values, log1p of the raw counts, take the place of predicted ones.
        on_tile
            Called with (done, total) as the encoder goes on.

        Returns
        -------
        AnnData
            N spots: X float32, log1p of raw counts; obs_names the barcodes; var_names the names asked for, with
            `var["gene_ids"]`; `obsm["spatial"]` the coordinates that came in; with a context `obs["context"]`, whether
            a spot was a part of it; `uns["stpath"]` the provenance.

        Raises
        ------
        InputError
            As `embed` and `decode`, and if no gene is asked for.
        """
        how: dict[str, Any] = {"genes": genes, "attention": attention, "neighbors": neighbors, "memory": memory}
        how |= {"embeddings": embeddings, "fill_context": fill_context, "on_tile": on_tile}
        return self.encode([slide], [context], **how)[0].to_anndata()

    def hash(self) -> str:
        """SHA-256 of the manifest, which holds those of every file: what tells one engine from another."""
        return sha256(self.path / MANIFEST)

    def _provenance(self, slide: Slide, attention: str, neighbors: int) -> dict[str, Any]:
        model = self.manifest.model
        return {
            "engine": self.hash(),
            "checkpoint": self.manifest.checkpoint["sha256"],
            "attention": attention,
            "neighbors": neighbors,
            "trained_attention": model.attention,
            "trained_neighbors": model.neighbors,
            "precision": self.precision,
            "backend": self.backend.name,
            "device": self.backend.device,
            "organ": slide.organ or "",
            "technology": slide.technology or "",
            "patch": _known(slide.patch),
            "units": "log1p raw counts",
        }


def _known(patch: Patch | None) -> dict[str, float]:
    """What is known of a slide's patches; AnnData files hold no None."""
    return {name: value for name, value in asdict(patch).items() if value is not None} if patch is not None else {}


def _describe(attention: str, neighbors: int) -> str:
    return f"knn attention to {neighbors} spots" if attention == "knn" else "global attention"


def _distinct(names: list[str]) -> list[str]:
    distinct = list(dict.fromkeys(names))
    if len(distinct) < len(names):
        warnings.warn("some genes are asked for more than once; each is given once", InputWarning, stacklevel=3)
    return distinct
