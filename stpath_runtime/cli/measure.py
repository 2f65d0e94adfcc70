"""The commands that measure an engine: `fidelity` and `doctor`; `bench` has a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import progress_bar
from .options import (
    Backend,
    Device,
    FeaturesKey,
    Memory,
    Organ,
    Precision,
    Tech,
    chosen_backend,
    require_png,
    whole_numbers,
)


def fidelity(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    slide: Annotated[Path, typer.Option(metavar="FILE", help="Features file to measure on.")],
    neighbors: Annotated[str, typer.Option(metavar="K,K,...", help="Numbers of neighbours.")] = "8,16,32,64,128",
    organ: Organ = None,
    tech: Tech = None,
    features_key: FeaturesKey = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("fidelity.png"),
    memory: Memory = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
) -> None:
    """Measure, for each k, what kNN attention changes against the way that the model was trained."""
    from ..engine import Engine
    from ..measures.fidelity import measure_fidelity, plot_fidelity, print_fidelity
    from ..readers import read_slide
    from ..results.plot import require_matplotlib

    require_png(out)
    require_matplotlib()
    counts = whole_numbers(neighbors, "--neighbors", "8,16,32")
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    read = read_slide(slide, organ=organ, technology=tech, features_key=features_key)
    with progress_bar(slide.name) as on_step:
        found = measure_fidelity(loaded, read, counts, memory, on_step)
    print_fidelity(found)
    plot_fidelity(found, out)
    typer.echo(str(out))


def doctor(
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="Engine folder, or a tile encoder's.")
    ] = None,
) -> None:
    """Print what each backend needs and finds on this machine and, with an engine, whether those that work agree."""
    from ..measures.doctor import examine

    examine(engine)
