"""The command that makes features of slide images: `features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import code_of, warn
from ..images.settings import TileSettings
from ..progress import tile_bars
from .options import (
    Backend,
    Device,
    MinTissue,
    Mpp,
    Pitch,
    Precision,
    Sections,
    SpotsFile,
    Tissue,
    chosen_backend,
    count,
)

DEFAULTS = TileSettings()


def features(
    slides: Annotated[
        list[Path], typer.Argument(metavar="SLIDE...", help="Slide images, or patches files of HEST (img, coords).")
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A .h5 file for one slide, or a folder.")],
    encoder: Annotated[
        str, typer.Option(metavar="ENCODER", help="A tile encoder's folder, or gigapath, uni, ... of timm (PyTorch).")
    ] = "gigapath",
    weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of a model of timm; left out: from the Hugging Face Hub.")
    ] = None,
    mpp: Mpp = DEFAULTS.mpp,
    pitch: Pitch = DEFAULTS.pitch,
    min_tissue: MinTissue = DEFAULTS.min_tissue,
    tissue: Tissue = None,
    spots: SpotsFile = None,
    sections: Sections = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Tiles at once; left out: what is fastest here.")
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
) -> None:
    """Compute the features of slide images, or of patches, with a tile encoder; a run that was stopped goes on."""
    from ..images.encoder import load_encoder
    from ..images.features import FeaturesJob, extract, find_targets, require_sources

    settings = TileSettings(mpp, pitch, min_tissue, tissue, spots, sections)
    settings.check()
    targets = find_targets(slides, out)
    chosen = chosen_backend(Path(encoder), backend, device, precision)
    loaded = load_encoder(encoder, weights, backend=chosen, device=device, precision=precision)
    require_sources(slides, loaded.size)
    jobs = [FeaturesJob(path, target, settings) for path, target in zip(slides, targets, strict=True)]
    failed: list[Exception] = []
    with tile_bars(len(jobs)) as bars:
        for made in extract(jobs, loaded, batch_size=batch_size, on_batch=bars):
            for warning in made.warnings:
                warn(warning)
            if made.error is None:
                typer.echo(f"{made.job.target}: {count(made.total, 'spot')}, {loaded.width:,} features")
            else:
                failed.append(made.error)
                if len(jobs) > 1:
                    typer.echo(f"error[{code_of(made.error)}]: {made.error}", err=True)
    if failed and len(jobs) == 1:
        raise failed[0]
    if failed:
        raise typer.Exit(2)
