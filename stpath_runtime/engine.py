"""An engine, loaded: slides in, expression out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from .backends import open_backend
from .checks import check_embedding, check_slide
from .encoding.attention import Attention, Spots, keys_of
from .encoding.backend import Backend
from .encoding.encoder import decode, encode
from .errors import EngineError, OptionError, warn
from .files import sha256
from .machine import parse_bytes
from .manifest import GENES, MANIFEST, Manifest, read_engine
from .progress import OnTile
from .results.prediction import EMBEDDING, Prediction, attended, new_frame, provenance
from .slides.context import Context, ContextRows
from .slides.slide import Slide, by_section
from .slides.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData


class Engine:
    """Predicts gene expression with an engine folder; make one with `Engine.load`.

    Parameters
    ----------
    path
        The engine folder.
    manifest, vocabulary, backend
        Its manifest and genes, and what runs its graphs.
    precision
        What the backend computes in: "fp32", "fp16" or "bf16".
    digest
        SHA-256 of the manifest, as it was read.

    Examples
    --------
    >>> with Engine.load(engine_path) as engine:
    ...     adata = engine.predict(slide, genes=["GENE1", "GENE2"])
    >>> adata.var_names.tolist()
    ['GENE1', 'GENE2']
    """

    _of_manifests: ClassVar[dict[type, type[Engine]]] = {}  # engines of other models, which make themselves known

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        vocabulary: GeneVocabulary,
        backend: Backend,
        precision: str,
        digest: str,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.backend = backend
        self.precision = precision
        self._digest = digest
        self._warned_of_approximation = False

    def __init_subclass__(cls, manifest: type | None = None) -> None:
        """`manifest` is the kind of manifest for which `load` gives this class."""
        if manifest is not None:
            cls._of_manifests[manifest] = cls

    def __repr__(self) -> str:
        return f"Engine({str(self.path)!r}, {self.precision}, {self.backend.name} on {self.backend.device})"

    @classmethod
    def load(
        cls, path: str | Path, *, backend: str = "onnxruntime", device: str = "cpu", precision: str | None = None
    ) -> Engine:
        """Load an engine folder, and check its manifest and the hash of every file.

        Of STFlow's engines it gives a `FlowEngine`, which samples.

        A file that has not changed since it was last read, by its size, inode and times, is not read again.

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

        Examples
        --------
        >>> Engine.load(engine_path).precision
        'fp32'
        """
        path = Path(path)
        manifest = read_engine(path)
        digest = sha256(path / MANIFEST)
        manifest.check_files(path, afresh=False)
        vocabulary = GeneVocabulary.read(path / GENES)
        if len(vocabulary) != manifest.n_genes:
            raise EngineError(
                f"{path}: the model has {manifest.n_genes:,} genes, its vocabulary {len(vocabulary):,}; export the "
                "engine again"
            )
        opened = open_backend(backend, path, device, manifest.precision, precision)
        kind = cls._of_manifests.get(type(manifest), cls)
        return kind(path, manifest, vocabulary, opened, precision or manifest.precision, digest)  # type: ignore[arg-type]

    def close(self) -> None:
        """Free what the engine holds on its device; it cannot predict afterwards. Called twice, it does nothing."""
        self.backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def predict(
        self,
        slide: Slide,
        *,
        genes: Sequence[str] | None = None,
        context: Context | None = None,
        attention: str | Attention | None = None,
        neighbors: int | None = None,
        memory: int | str | None = None,
        embeddings: bool = False,
        fill_context: bool = False,
        on_tile: OnTile | None = None,
    ) -> AnnData:
        """Predicted expression of a slide.

        Parameters
        ----------
        genes
            Symbols, aliases or Ensembl ids; each gene is given once, in this order. None means all 38,982, which take
            156 KB a spot: `predict_many` writes them without holding them.
        context
            Measured expression of some spots.
        attention
            "global": every spot to every spot of the slide; "knn:32": to its 32 nearest, itself included ("knn" with
            `neighbors` says the same); more than the slide has means all. None means as the model was trained; the
            other way is an approximation, and warns: `stpath fidelity` measures it.
        neighbors
            With "knn": to how many spots.
        memory
            What this may take beyond the features, in bytes or as text such as "8G"; None means half of what the
            device has available. The result does not depend on it.
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
            If the features are not as wide as the engine expects, the context does not fit the slide, a gene is
            unknown or none is asked for, the attention is unknown or lacks its neighbors, or the memory is too small
            for one tile.

        Examples
        --------
        >>> adata = engine.predict(slide, genes=["GENE1", "GENE2"], memory="1G")
        >>> adata.n_vars, adata.uns["stpath"]["units"]
        (2, 'log1p raw counts')
        """
        (prediction,) = self.predict_many(
            [slide],
            [context],
            genes=genes,
            attention=attention,
            neighbors=neighbors,
            memory=memory,
            embeddings=embeddings,
            fill_context=fill_context,
            on_tile=on_tile,
        )
        return prediction.to_anndata()

    def predict_many(
        self,
        slides: Sequence[Slide],
        contexts: Sequence[Context | ContextRows | None] | None = None,
        *,
        genes: Sequence[str] | None = None,
        attention: str | Attention | None = None,
        neighbors: int | None = None,
        memory: int | str | None = None,
        embeddings: bool = False,
        fill_context: bool = False,
        on_tile: OnTile | None = None,
    ) -> list[Prediction]:
        """Predict a slide, or several small ones in one go; their genes are decoded when they are asked for or written.

        No spot attends to another slide's. What `Prediction.write` takes does not grow with the genes: for all genes
        of a large slide.

        Parameters
        ----------
        slides, contexts
            Slides, and for each its context, resolved or not, or None.
        genes, attention, neighbors, memory, embeddings, fill_context, on_tile
            What `predict` takes by these names; the memory is that of all slides together.

        Returns
        -------
        list of Prediction
            One for each slide: `to_anndata()` gives it in memory, `write(path)` writes it.

        Raises
        ------
        InputError
            What `predict` raises; no slide is predicted then.

        Examples
        --------
        >>> first, second = engine.predict_many([slide, slide], genes=["GENE1"])
        >>> second.to_anndata().var_names.tolist()
        ['GENE1']
        """
        contexts = contexts if contexts is not None else [None] * len(slides)
        panel = self.vocabulary.panel(genes)  # a misspelt gene is named before the work, not after it
        chosen = self.attention(attention, neighbors)
        rows = []
        for slide, context in zip(slides, contexts, strict=True):
            check_slide(slide, self.manifest)
            rows.append(context.resolve(slide, self.vocabulary) if isinstance(context, Context) else context)
        predictions = []
        embeddings_of = self._embed_sections(slides, rows, chosen, memory, on_tile)
        for slide, measured, embedding in zip(slides, rows, embeddings_of, strict=True):
            facts = provenance(slide, self.hash(), self.manifest, self.backend, self.precision)
            facts |= attended(self.manifest, chosen) | {"context_filled": fill_context and measured is not None}
            frame = new_frame(slide, panel.names, panel.gene_ids, facts, measured)
            if embeddings:
                frame.obsm[EMBEDDING] = embedding
            filled = measured if fill_context else None
            predictions.append(Prediction(self.backend, self.precision, frame, embedding, panel.tokens, filled))
        return predictions

    encode = predict_many  # its name before 0.1.0

    def embed(
        self,
        slide: Slide,
        *,
        context: Context | None = None,
        attention: str | Attention | None = None,
        neighbors: int | None = None,
        memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> npt.NDArray[np.float32]:
        """Embedding of every spot, float32 [N, d]: the last block's output, before the head.

        Parameters
        ----------
        context, attention, neighbors, memory, on_tile
            What `predict` takes by these names.

        Raises
        ------
        InputError
            If the slide, the context, the attention or the memory is not as `predict` needs it.

        Examples
        --------
        >>> embedding = engine.embed(slide)
        >>> embedding.shape == (len(slide), engine.manifest.model.d_model)
        True
        """
        chosen = self.attention(attention, neighbors)
        check_slide(slide, self.manifest)
        rows = context.resolve(slide, self.vocabulary) if context is not None else None
        return self._embed_sections([slide], [rows], chosen, memory, on_tile)[0]

    def decode(
        self, embedding: npt.NDArray[np.floating], genes: Sequence[str] | None = None, *, on_tile: OnTile | None = None
    ) -> npt.NDArray[np.float32]:
        """Expression from embeddings that `embed` made: float32 [N, G], log1p of raw counts.

        Parameters
        ----------
        embedding
            [N, d].
        genes
            Symbols, aliases or Ensembl ids; a column for each gene, once, in this order. None means all, in the order
            of the vocabulary.
        on_tile
            Called with (done, total) as the work goes on.

        Raises
        ------
        InputError
            If a gene is unknown, none is asked for, or the embedding is of another width.

        Examples
        --------
        >>> engine.decode(engine.embed(slide), ["GENE1", "GENE2"]).shape == (len(slide), 2)
        True
        """
        embedding = check_embedding(embedding, "embedding", self.manifest)
        panel = self.vocabulary.panel(genes)
        expression = np.empty((len(embedding), len(panel)), np.float32)
        for spots, columns, values in decode(self.backend, self.precision, embedding, panel.tokens):
            expression[spots, columns] = values
            if on_tile is not None:
                on_tile(columns.start * len(embedding) + values.shape[1] * spots.stop, expression.size)
        return expression

    def attention(self, attention: str | Attention | None = None, neighbors: int | None = None) -> Attention:
        """The attention for these arguments; warns, once, if the model was trained with another.

        Raises
        ------
        InputError
            If the kind is unknown or the neighbors do not fit it.

        Examples
        --------
        >>> engine.attention() == Attention.trained(engine.manifest.model)
        True
        """
        model = self.manifest.model
        chosen, trained = Attention.choose(attention, neighbors, model), Attention.trained(model)
        if chosen != trained and not self._warned_of_approximation:
            self._warned_of_approximation = True
            warn(
                f"{chosen.description} on a model trained with {trained.description} is an approximation; stpath "
                "fidelity measures it"
            )
        return chosen

    def options(
        self,
        *,
        attention: str | Attention | None = None,
        neighbors: int | None = None,
        embeddings: bool | None = None,
        fill_context: bool = False,
        steps: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
    ) -> dict[str, Any]:
        """The keywords of `predict_many` for what commands take for either model, checked.

        Raises
        ------
        InputError
            If one is of the other model, or the attention is unknown; the message names it.

        Examples
        --------
        >>> engine.options(attention="global")["attention"]
        Attention(kind='global', neighbors=0)
        """
        given = {"steps": steps, "seed": seed, "samples": samples}
        self._refuse({name: value for name, value in given.items() if value is not None}, "STFlow", "STPath")
        chosen = self.attention(attention, neighbors)
        return {"attention": chosen, "embeddings": bool(embeddings), "fill_context": fill_context}

    def check_context(self, given: bool) -> None:
        """Check, before counts are read, that the model takes a context, if one is given.

        Raises
        ------
        InputError
            If it does not.

        Examples
        --------
        >>> engine.check_context(given=True)  # STPath takes one
        """

    def _refuse(self, given: dict[str, object], whose: str, ours: str) -> None:
        """Refuse options of the other model, by name."""
        if given:
            named = " and ".join(name.replace("_", "-") for name in given)
            raise OptionError(f"{named}: of {whose} engines; {self.path} is an {ours} engine: leave it out")

    def hash(self) -> str:
        """SHA-256 of the loaded manifest, which holds the hash of every file: it identifies the engine."""
        return self._digest

    def _embed_sections(
        self,
        slides: Sequence[Slide],
        contexts: Sequence[ContextRows | None],
        attention: Attention,
        memory: int | str | None,
        on_tile: OnTile | None,
    ) -> list[npt.NDArray[np.float32]]:
        """Embeddings of slides: those without sections together, of others one section after the other."""
        if all(slide.sections is None for slide in slides):
            return self._embed(slides, contexts, attention, memory, on_tile)
        found = []
        for slide, context in zip(slides, contexts, strict=True):
            embedding = np.empty((len(slide), self.manifest.model.d_model), np.float32)
            for rows, section in by_section(slide):
                measured = context.within(rows) if context is not None else None
                (embedding[rows],) = self._embed([section], [measured], attention, memory, on_tile)
            found.append(embedding)
        return found

    def _embed(
        self,
        slides: Sequence[Slide],
        contexts: Sequence[ContextRows | None],
        attention: Attention,
        memory: int | str | None,
        on_tile: OnTile | None,
    ) -> list[npt.NDArray[np.float32]]:
        """Embeddings of slides, computed together."""
        size = parse_bytes(memory) if memory is not None else None
        model, spots = self.manifest.model, Spots.of(slides, contexts)
        keys = keys_of(slides, spots, model, self.precision, attention)
        embedding = encode(self.backend, model, self.precision, spots, keys, size, on_tile=on_tile)
        return np.split(embedding, np.cumsum([len(slide) for slide in slides])[:-1])
