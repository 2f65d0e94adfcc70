"""What is checked of what comes with an engine: that a slide, an embedding or a prediction fits it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import EngineError, FeaturesError, PredictionError, SlideError
from .manifest import FlowManifest, Manifest
from .readers import keys_of_width
from .slides.slide import Slide


def check_slide(slide: Slide, manifest: Manifest | FlowManifest) -> None:
    """Check that this is a Slide, and that its features have the width that the engine expects.

    Raises
    ------
    InputError
        If it is not.
    """
    if not isinstance(slide, Slide):
        raise SlideError(
            f"expected a Slide, not {type(slide).__name__}; make one with read_slide(path) or Slide.from_anndata(adata)"
        )
    width, expected = slide.features.shape[1], manifest.model.n_features
    if width != expected:
        fix = "compute the features with that encoder"
        if keys := keys_of_width(slide.name, expected):
            fix = f"{', '.join(map(repr, keys))} in the file has that width: name it with --features-key {keys[0]}"
        raise FeaturesError(
            f"{slide.name}: the features are {width:,} wide; the engine expects {expected:,} "
            f"({manifest.encoder}); {fix}"
        )


def check_embedding(embedding: npt.NDArray[Any], name: str, manifest: Manifest) -> npt.NDArray[Any]:
    """Check that an embedding has the width of the engine's model.

    Raises
    ------
    InputError
        If it is not.
    """
    d_model = manifest.model.d_model
    embedding = np.asarray(embedding)
    if embedding.ndim != 2 or embedding.shape[1] != d_model or embedding.dtype.kind != "f":
        raise PredictionError(
            f"{name}: {embedding.dtype} of shape {list(embedding.shape)}; this engine's is float [N, {d_model}]"
        )
    return embedding


def require_stpath(path: Path, manifest: Manifest | FlowManifest, what: str) -> None:
    """Check that an engine is STPath's, and not STFlow's.

    Parameters
    ----------
    path, manifest
        The engine's.
    what
        What takes STPath's only, for the message.

    Raises
    ------
    InputError
        If it is not.
    """
    if isinstance(manifest, FlowManifest):
        raise EngineError(
            f"{path}: an STFlow engine; {what} is of STPath engines, whose embeddings and attention it is about"
        )


def require_made_by(engine: Path, digest: str, facts: Mapping[str, Any], path: Path) -> None:
    """Check that the engine of this digest made a prediction, by its provenance `uns["stpath"]`.

    Raises
    ------
    InputError
        If another engine did, or the prediction does not say which.
    """
    made_by = facts.get("engine")
    if made_by is None:
        raise PredictionError(
            f"{path}: does not say which engine made it (uns['stpath'] is gone, as after anndata.concat without "
            "uns_merge); take the parts that it was joined of, or predict it again"
        )
    if made_by != digest:
        raise PredictionError(
            f"{path}: predicted by another engine ({str(made_by)[:12]}…, not {engine}, {digest[:12]}…); "
            "give that one, or predict it again with this one"
        )
