"""The model that is evaluated: an exported engine or a checkpoint, behind the same two calls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from stpath_runtime.engine import Engine
from stpath_runtime.errors import FeaturesError, OptionError, VocabularyError
from stpath_runtime.files import sha256
from stpath_runtime.flow_engine import FlowEngine
from stpath_runtime.manifest import MANIFEST, ModelConfig
from stpath_runtime.results.output import DEVIATION
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import FIRST_GENE_TOKEN, GeneVocabulary
from stpath_train.store import Store

Floats = npt.NDArray[np.float32]


class Predictor(Protocol):
    """Embeds the spots of a slide, and decodes genes from the embeddings; `stpath_runtime.Engine` is one."""

    def embed(self, slide: Slide, *, context: Context | None = None) -> Floats:
        """Embedding of every spot, [N, d]."""
        ...

    def decode(self, embedding: Floats, genes: Sequence[str]) -> Floats:
        """Expression [N, G], log1p of raw counts."""
        ...


class CheckpointPredictor:
    """A checkpoint as a predictor: the model in PyTorch, in float32, attending as it was trained."""

    def __init__(self, path: Path, vocabulary: GeneVocabulary) -> None:
        from stpath_train.checkpoint import load_checkpoint

        self.vocabulary = vocabulary
        self.model = load_checkpoint(path)

    def embed(self, slide: Slide, *, context: Context | None = None) -> Floats:
        """Embedding of every spot, [N, d]: the last block's output, before the head."""
        import torch

        from stpath_train.inputs import knn_blocks, slide_inputs

        inputs = slide_inputs(slide, self.vocabulary, context)
        if self.model.config.attention == "knn":
            inputs["blocks"] = knn_blocks([slide.coords], self.model.config.neighbors)
        with torch.inference_mode():
            embedding: Floats = self.model.embed(**inputs).numpy()
        return embedding

    def decode(self, embedding: Floats, genes: Sequence[str]) -> Floats:
        """Expression [N, G], log1p of raw counts, from embeddings [N, d]."""
        import torch

        tokens = torch.from_numpy(self.vocabulary.tokens(genes))
        with torch.inference_mode():
            expression: Floats = self.model.decode(torch.from_numpy(embedding), tokens).numpy()
        return expression


class FlowPredictor:
    """An STFlow engine as a predictor: its "embedding" is the mean of its samples and their standard deviation."""

    def __init__(self, engine: FlowEngine, samples: int, seed: int) -> None:
        self.engine, self.samples, self.seed = engine, samples, seed

    def embed(self, slide: Slide, *, context: Context | None = None) -> Floats:
        """Mean and standard deviation of every gene of the model at every spot, [N, 2 G]."""
        self.engine.check_context(context is not None)
        adata = self.engine.predict(slide, samples=self.samples, seed=self.seed)
        spread = adata.layers[DEVIATION] if self.samples > 1 else np.zeros_like(adata.X)
        return np.concatenate([np.asarray(adata.X), spread], axis=1)

    def decode(self, embedding: Floats, genes: Sequence[str]) -> Floats:
        """Mean expression [N, G], log1p of raw counts."""
        return embedding[:, self._columns(genes)]

    def deviation(self, embedding: Floats, genes: Sequence[str]) -> Floats | None:
        """Standard deviation of the samples, [N, G]; None of one sample."""
        return embedding[:, len(self.engine.vocabulary) + self._columns(genes)] if self.samples > 1 else None

    def _columns(self, genes: Sequence[str]) -> npt.NDArray[np.int64]:
        return self.engine.vocabulary.tokens(genes) - FIRST_GENE_TOKEN


def open_predictor(
    engine: Path | None, checkpoint: Path | None, store: Store, samples: int | None = None, seed: int = 0
) -> tuple[Predictor, dict[str, Any]]:
    """The model to evaluate on a store, and its provenance.

    Parameters
    ----------
    samples, seed
        Of an STFlow engine.

    Raises
    ------
    InputError
        If both or neither are given, either cannot be read, or it has another vocabulary, or other features, than the
        store.
    """
    if (engine is None) == (checkpoint is None):
        raise OptionError("give one model to evaluate: --engine ENGINE or --checkpoint CKPT")
    from stpath_train.checkpoint import require_genes

    if engine is not None:
        loaded = Engine.load(engine)
        if isinstance(loaded, FlowEngine):
            _require_features(loaded.manifest.model.n_features, store, engine)
            made_of = {"engine": loaded.hash(), "checkpoint": loaded.manifest.checkpoint["sha256"]}
            about = {"path": str(engine), **made_of, "model": loaded.manifest.family, "samples": samples or 1}
            return FlowPredictor(loaded, samples or 1, seed), about | {"precision": loaded.precision}
        if samples is not None:
            raise OptionError(f"--samples {samples}: of STFlow engines; {engine} is an STPath engine: leave it out")
        store.require_vocabulary(loaded.vocabulary, str(engine))
        manifest = loaded.manifest
        _require_features(manifest.model.n_features, store, engine)
        made_of = {"engine": sha256(engine / MANIFEST), "checkpoint": manifest.checkpoint["sha256"]}
        return loaded, {"path": str(engine), **made_of, **_attention(manifest.model), "precision": manifest.precision}
    assert checkpoint is not None
    if samples is not None:
        raise OptionError(f"--samples {samples}: of STFlow engines; {checkpoint} is a checkpoint: leave it out")
    model = CheckpointPredictor(checkpoint, store.vocabulary)
    config = model.model.config
    if config.n_tokens != store.vocabulary.n_tokens:
        raise VocabularyError(
            f"{checkpoint}: a model of {config.n_tokens:,} gene tokens; the vocabulary of {store.path} has "
            f"{store.vocabulary.n_tokens:,}; give the store that the model was trained on, or one prepared as it was"
        )
    require_genes(checkpoint, store.vocabulary, str(store.path))
    _require_features(config.n_features, store, checkpoint)
    return model, {
        "path": str(checkpoint), "checkpoint": sha256(checkpoint), **_attention(config), "precision": "fp32"
    }  # fmt: skip


def _attention(model: ModelConfig) -> dict[str, Any]:
    return {"attention": model.attention, "neighbors": model.neighbors}


def _require_features(width: int, store: Store, name: Path) -> None:
    if width != store.n_features:
        raise FeaturesError(
            f"{name}: a model of features {width:,} wide; those of {store.path} are {store.n_features:,}; "
            "prepare the slides with the features that the model was trained on"
        )
