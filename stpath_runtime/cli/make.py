"""The commands that make something from an engine: `build` and `triton`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..progress import progress_bar
from .options import (
    count,
)

if TYPE_CHECKING:
    pass


def build(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder, or a tile encoder's.")],
    backend: Annotated[str, typer.Option(metavar="tensorrt|tensorrt_rtx", help="What to build plans of.")] = "tensorrt",
    device: Annotated[str, typer.Option(metavar="cuda:N", help="The GPU to build for.")] = "cuda:0",
    target: Annotated[
        str | None,
        typer.Option(metavar="sm_89", help="Build for such a GPU of another machine (TensorRT-RTX)."),
    ] = None,
    max_spots: Annotated[
        int, typer.Option(metavar="N", help="The largest slide for global attention; by kNN larger ones run, too.")
    ] = 32_768,
) -> None:
    """Build TensorRT plans from an engine's graphs, for one generation of GPUs, and keep them in the engine."""
    from ..backends.plan_builder import Build
    from ..manifest import ENCODER_GRAPH

    todo = Build.of(engine, backend, device, target, max_spots)
    tiles = todo.ranges.get(ENCODER_GRAPH)  # of a tile encoder
    most = (
        f"slides up to {count(max_spots, 'spot')}" if tiles is None else f"up to {tiles['tiles'][2][0]} tiles at once"
    )
    what = f"{count(len(todo.ranges), 'plan')} for {todo.target}, {most}"
    if todo.up_to_date():
        typer.echo(f"{todo.folder}: {what}, up to date")
        return
    typer.echo(f"building {what}; time: {todo.expected()}", err=True)
    with progress_bar(todo.folder.name) as on_step:
        plans = todo.run(on_step)
    typer.echo(f"{todo.folder}: {what} ({plans.seconds():,.1f} s)")


def triton(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    out: Annotated[Path, typer.Option(metavar="MODEL_REPOSITORY", help="The folder to make.")],
    device: Annotated[str, typer.Option(help="Where Triton runs it: cpu or cuda:N.")] = "cpu",
    encoder: Annotated[
        Path | None, typer.Option(metavar="ENCODER", help="A tile encoder's folder, for a model that takes tiles, too.")
    ] = None,
) -> None:
    """Write a model repository for a Triton Inference Server."""
    from ..serving.repository import write_model_repository

    typer.echo(f"{out}: {', '.join(write_model_repository(engine, out, device, encoder))}")
