"""The commands that show something: `plot` and `info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    require_png,
)

if TYPE_CHECKING:
    pass


def plot(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="What stpath predict wrote.")],
    genes: Annotated[list[str], typer.Argument(metavar="GENE...", help="Genes of the prediction.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")],
) -> None:
    """Draw spatial maps of predicted genes."""
    from ..results.plot import plot_genes
    from ..results.reading import open_prediction

    require_png(out)
    with open_prediction(prediction) as (adata, x):
        note = adata.uns["stpath"].get("note")  # what the demo says of its simulated features
        title = f"{prediction.stem} ({note})" if note else prediction.stem
        plot_genes(adata, genes, out, title=title, x=x)
    typer.echo(str(out))


def info(engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder, or a tile encoder's.")]) -> None:
    """Print what an engine or a tile encoder is: its model, precision, checkpoint and proof of parity."""
    from ..manifest import read_manifest
    from .info import print_manifest

    manifest = read_manifest(engine)
    manifest.check_files(engine)
    print_manifest(engine, manifest)
