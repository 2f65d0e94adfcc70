"""The commands `stpath export`, `stpath verify` and `stpath demo`; torch is imported when one runs."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stpath_runtime import commands
from stpath_runtime.commands import Backend, Device
from stpath_runtime.errors import CheckpointError
from stpath_runtime.progress import progress_bar
from stpath_train.cli import TRAIN, require

LIBRARIES = ("torch", "torch_geometric", "onnx", "onnxscript", "safetensors")


class Precision(StrEnum):
    """Type of an engine's weights."""

    FP32 = "fp32"
    FP16 = "fp16"


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="stfm.pth or a .safetensors file.")],
    out: Annotated[Path, typer.Option(metavar="ENGINE", help="The engine folder to write.")],
    genes: Annotated[
        Path | None,
        typer.Option(metavar="VOCABULARY", help="The model's symbol2ensembl.json; left out: STPath's published one."),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Type of the weights.")] = Precision.FP32,
) -> None:
    """Export a checkpoint as an engine, and prove its parity before it is published."""
    require_torch()
    from .exporter import export_engine

    with progress_bar(f"export {checkpoint.name}") as on_step:
        report = export_engine(checkpoint, out, genes, precision.value, on_step)
    worst = max(row["relative_l2"] for row in report["cases"])
    typer.echo(
        f"{out}: {precision.value}, {len(report['cases'])} comparisons with float64 passed, relative L2 <= {worst:.1e}"
    )


def verify(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    checkpoint: Annotated[Path, typer.Option(metavar="CHECKPOINT", help="The checkpoint that it was made from.")],
    slide: Annotated[Path | None, typer.Option(metavar="FILE", help="A features file to compare on, too.")] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: commands.Precision = None,
) -> None:
    """Repeat the proof of parity for an engine that exists, on a backend and in a precision that it can run."""
    require_torch()
    from rich.console import Console

    from stpath_runtime.info import print_parity
    from stpath_runtime.manifest import Manifest, sha256
    from stpath_runtime.readers import read_slide
    from stpath_train.checkpoint import load_checkpoint

    from .proof import prove, require_passed

    manifest = Manifest.read(engine)
    backend = commands.chosen_backend(engine, backend, device, precision)
    slides = [read_slide(slide)] if slide is not None else []
    model = load_checkpoint(checkpoint)
    if model.config != manifest.model:
        theirs, ours = asdict(model.config), asdict(manifest.model)
        different = ", ".join(f"{key} {theirs[key]} against {ours[key]}" for key in ours if theirs[key] != ours[key])
        raise CheckpointError(
            f"{checkpoint}: another model than {engine}'s ({different}); that engine was made from "
            f"{manifest.checkpoint['name']}"
        )
    if sha256(checkpoint) != manifest.checkpoint["sha256"]:
        typer.echo(f"warning: {checkpoint} is not the file that {engine} was made from (SHA-256 differs)", err=True)
    report = prove(engine, model, slides, backend=backend, device=device, precision=precision)
    print_parity(report, Console(width=None if Console().is_terminal else 160, highlight=False))
    require_passed(report)


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """Show what the model is for on the sample slide: export, predict in and out of context, score, verify, draw."""
    require_torch()
    require(TRAIN, "train")
    from .demo import run_demo

    run_demo(out)


def require_torch() -> None:
    """Raise InputError, with what to install, where a library of the exporter is not."""
    require(LIBRARIES, "export")
