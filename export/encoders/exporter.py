"""Writes a tile encoder as an engine, and publishes it only after its proof."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from stpath_runtime.errors import OptionError
from stpath_runtime.files import sha256, written_whole
from stpath_runtime.images.encoder import require_width
from stpath_runtime.machine import installed
from stpath_runtime.manifest import (
    ENCODER_GRAPH,
    ENCODER_MANIFEST,
    ENCODER_SCHEMA,
    PRECISIONS,
    WEIGHTS,
    EncoderManifest,
    Scale,
)
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.slide import PUBLISHED_MICRONS
from stpath_train.encoders import EncoderModel, find_encoder

from ..writing import OPSET, SharedWeights, require_free
from .graph import Parts
from .proof import Report, prove, require_passed

if TYPE_CHECKING:
    from stpath_runtime.engine import Engine

LIBRARIES = ("stpath-engine", "torch", "timm", "onnx", "onnx_ir", "onnxruntime", "numpy")


def export_encoder(
    name: str,
    out: Path,
    precision: str = "fp32",
    engine: Engine | None = None,
    on_step: OnTile | None = None,
) -> EncoderManifest:
    """Export a tile encoder, prove its parity with timm in float64, and only then publish it at `out`.

    Parameters
    ----------
    name
        A name that we know, hf-hub:OWNER/NAME, or a folder as the Hub has it.
    precision
        "fp32", "fp16" or "bf16".
    engine
        An STPath engine that will take the features: the report then says what the precision changes in expression.
    on_step
        Called with (done, total) as the proof goes on.

    Raises
    ------
    InputError
        If `out` exists, or the encoder cannot be found or is of no kind that is exported.
    ParityError
        If it misses the bar; nothing is left at `out`.
    """
    require_free(out)
    return publish_encoder(find_encoder(name), out, precision, engine, on_step)


def publish_encoder(
    encoder: EncoderModel,
    out: Path,
    precision: str = "fp32",
    engine: Engine | None = None,
    on_step: OnTile | None = None,
) -> EncoderManifest:
    """The same of an encoder that is read already.

    Raises
    ------
    InputError
        If the precision is unknown, or the engine takes features of another width.
    ParityError
        If it misses the bar; nothing is left at `out`.
    """
    if precision not in PRECISIONS:
        raise OptionError(f"unknown precision {precision!r}; known: {', '.join(PRECISIONS)}")
    if engine is not None:
        require_width(encoder.name, encoder.width, engine.manifest.model.n_features, str(engine.path))
    with written_whole(out) as directory:
        directory.mkdir()
        parts = Parts(encoder, precision, SharedWeights(directory / WEIGHTS))
        ir.save(parts.graph(0, parts.last), directory / f"{ENCODER_GRAPH}.onnx")
        report = prove(directory, parts, on_step, engine)
        require_passed(report)
        manifest = _manifest(encoder, parts, directory, report)
        manifest.write(directory)
    return manifest


def _manifest(encoder: EncoderModel, parts: Parts, directory: Path, report: Report) -> EncoderManifest:
    microns = encoder.microns_a_pixel
    files = sorted(path for path in directory.iterdir() if path.name != ENCODER_MANIFEST)
    return EncoderManifest(
        schema=ENCODER_SCHEMA,
        encoder=encoder.name,
        architecture=encoder.architecture,
        precision=parts.precision,
        opset=OPSET,
        size=encoder.size,
        width=encoder.width,
        depth=encoder.depth,
        pooling=encoder.pooling,
        operations=float(operations(parts)),
        activations=activations(parts),
        trained=Scale(microns, microns * encoder.size) if microns is not None else None,
        wanted=Scale(PUBLISHED_MICRONS / encoder.size, float(PUBLISHED_MICRONS)),
        mean=encoder.mean,
        std=encoder.std,
        licence=encoder.licence,
        weights={"name": encoder.weights.path.name, "sha256": sha256(encoder.weights.path)},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.name: sha256(path) for path in files},
        versions={name: found for name in LIBRARIES if (found := installed(name)) is not None},
        parity=report,
    )


def operations(parts: Parts) -> int:
    """Floating-point operations of one tile: twice the multiplications of its products and attentions."""
    encoder, tokens, d = parts.encoder, parts.tokens, int(parts.encoder.model.embed_dim)
    products = encoder.model.blocks[0].mlp.parameters()
    mlp: int = sum(weight.numel() for weight in products if weight.ndim == 2)
    patches: int = encoder.model.patch_embed.num_patches * encoder.model.patch_embed.proj.weight.numel()

    def block(queries: int) -> int:
        """Of a block whose queries and mlp have fewer rows than its keys."""
        return queries * (2 * d * d + mlp) + tokens * 2 * d * d + 2 * queries * tokens * d

    return 2 * (patches + (encoder.depth - 1) * block(tokens) + block(1 if parts.alone else tokens))


def activations(parts: Parts) -> int:
    """Numbers that one tile takes while it runs, at most: what enters and leaves the widest products of a block."""
    encoder = parts.encoder
    hidden = int(encoder.model.blocks[0].mlp.fc2.weight.shape[1])
    return parts.tokens * (4 * hidden + 6 * int(encoder.model.embed_dim))
