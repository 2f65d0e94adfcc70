"""How a prediction was made: `uns["stpath"]`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..encoding.attention import Attention
from ..encoding.backend import Backend
from ..manifest import Manifest
from ..slides.slide import Patch, Slide


def provenance(
    slide: Slide, engine: str, manifest: Manifest, backend: Backend, precision: str, attention: Attention
) -> dict[str, Any]:
    """The facts of one slide's prediction; `engine` is the SHA-256 of the manifest that was loaded."""
    return {
        "engine": engine,
        "checkpoint": manifest.checkpoint["sha256"],
        "attention": attention.kind,
        "neighbors": attention.neighbors,
        "trained_attention": manifest.model.attention,
        "trained_neighbors": manifest.model.neighbors,
        "precision": precision,
        "backend": backend.name,
        "device": backend.device,
        "organ": slide.organ or "",
        "technology": slide.technology or "",
        "patch": _known(slide.patch),
        "units": "log1p raw counts",
    }


def _known(patch: Patch | None) -> dict[str, float]:
    """What is known of a slide's patches; AnnData files hold no None."""
    return {name: value for name, value in asdict(patch).items() if value is not None} if patch is not None else {}
