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
from stpath_runtime.manifest import MANIFEST, ModelConfig
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import GeneVocabulary
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


def open_predictor(engine: Path | None, checkpoint: Path | None, store: Store) -> tuple[Predictor, dict[str, Any]]:
    """The model to evaluate on a store, and its provenance.

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
        store.require_vocabulary(loaded.vocabulary, str(engine))
        manifest = loaded.manifest
        _require_features(manifest.model, store, engine)
        made_of = {"engine": sha256(engine / MANIFEST), "checkpoint": manifest.checkpoint["sha256"]}
        return loaded, {"path": str(engine), **made_of, **_attention(manifest.model), "precision": manifest.precision}
    assert checkpoint is not None
    model = CheckpointPredictor(checkpoint, store.vocabulary)
    config = model.model.config
    if config.n_tokens != store.vocabulary.n_tokens:
        raise VocabularyError(
            f"{checkpoint}: a model of {config.n_tokens:,} gene tokens; the vocabulary of {store.path} has "
            f"{store.vocabulary.n_tokens:,}; give the store that the model was trained on, or one prepared as it was"
        )
    require_genes(checkpoint, store.vocabulary, str(store.path))
    _require_features(config, store, checkpoint)
    return model, {
        "path": str(checkpoint), "checkpoint": sha256(checkpoint), **_attention(config), "precision": "fp32"
    }  # fmt: skip


def _attention(model: ModelConfig) -> dict[str, Any]:
    return {"attention": model.attention, "neighbors": model.neighbors}


def _require_features(model: ModelConfig, store: Store, name: Path) -> None:
    if model.n_features != store.n_features:
        raise FeaturesError(
            f"{name}: a model of features {model.n_features:,} wide; those of {store.path} are {store.n_features:,}; "
            "prepare the slides with the features that the model was trained on"
        )
