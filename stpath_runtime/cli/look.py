"""The commands that show something: `view`, `plot` and `info`."""

from __future__ import annotations

import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError
from ..files import require_writable
from .options import gene_names, require_png


def view(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="What stpath predict wrote.")],
    engine: Annotated[
        Path | None,
        typer.Option(
            metavar="ENGINE", help="What predicted it: shows every gene, from the embeddings that PRED keeps."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="SLIDE", help="The slide image, to show below the spots.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; beyond 127.0.0.1 the network can.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: any that is free.")] = 0,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write one file that needs no server, to send to others, and end."),
    ] = None,
    genes: Annotated[str, typer.Option(metavar="A,B,C|FILE", help="With --save: the genes that it keeps.")] = "all",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open it in the browser.")] = True,
) -> None:
    """Look at a prediction: any gene on the tissue, and what is different in a region. Ends with Ctrl-C."""
    from ..engine import Engine
    from ..viewer.saved import save_page
    from ..viewer.server import OWN_NAMES, require_starlette, serve
    from ..viewer.shown import open_shown

    if save is not None:
        if save.suffix.lower() not in (".html", ".htm"):
            raise OptionError(f"--save {save}: a web page; give a name that ends in .html")
        require_writable(save)
    elif genes != "all":
        raise OptionError(f"--genes {genes}: goes with --save; the page finds every gene by its name")
    require_starlette()
    loaded = Engine.load(engine) if engine is not None else None

    def on_start(address: str) -> None:
        if host not in OWN_NAMES:
            typer.echo(f"warning: {host} can be reached from the network; who has the address sees the slide", err=True)
        typer.echo(address)
        sys.stdout.flush()
        if browser:
            webbrowser.open(address)

    with open_shown(prediction, loaded, image) as shown:
        if save is not None:
            error = save_page(shown, save, gene_names(genes))
            size = save.stat().st_size / 1e6
            typer.echo(f"{save}: {size:.1f} MB; its genes are within {error:.1e} of the engine's (relative L2)")
            return
        serve(shown, host, port, on_start)


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
