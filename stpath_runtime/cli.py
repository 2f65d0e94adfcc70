"""The command `stpath`.

Exit codes: 0 done, 1 a fault of this program, 2 the input or the call is at fault, 3 parity failed.
"""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .errors import InputError, InputWarning, ParityError
from .names import listed_names
from .output import is_prediction, require_writable
from .progress import progress_bar

if TYPE_CHECKING:
    from anndata import AnnData

    from .slide import Slide

INTERRUPTED = 130

app = typer.Typer(
    help="Predict the expression of 38,982 genes at every spot of a pathology slide, with STPath engines.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stpath-engine {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None: ...


@app.command()
def predict(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE...", help="Features files (HDF5).")],
    engine: Annotated[Path, typer.Option(metavar="ENGINE", help="Engine folder.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="A .h5ad file for one slide, or a folder.")],
    organ: Annotated[str | None, typer.Option(help="Organ, as HEST-1k or STPath name it; left out: Others.")] = None,
    tech: Annotated[str | None, typer.Option(help="Visium, Xenium, ...; left out: unknown.")] = None,
    genes: Annotated[
        str, typer.Option(metavar="A,B,C|FILE", help="Names, or a .txt (one a line) or .json file of them.")
    ] = "all",
    context: Annotated[
        Path | None, typer.Option(metavar="COUNTS.h5ad", help="Raw counts of some spots; obs_names are barcodes.")
    ] = None,
    attention: Annotated[str | None, typer.Option(help="global or knn; left out: as the model was trained.")] = None,
    neighbors: Annotated[int | None, typer.Option(metavar="K", help="With knn: attend to the K nearest spots.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to take, such as 6G; left out: half of what there is.")
    ] = None,
    backend: Annotated[str, typer.Option(help="What runs the engine.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Keep the embedding in obsm.")] = False,
) -> None:
    """Predict the expression of genes at every spot of one or more slides."""
    from .engine import Engine
    from .memory import parse_bytes
    from .output import write_h5ad
    from .readers import read_context, read_slide

    targets = _targets(slides, out, context)
    names = None if genes.casefold() == "all" else listed_names(genes, "--genes", "gene")
    loaded = Engine.load(engine, backend=backend, device=device)
    if names is not None:
        loaded.vocabulary.tokens(names)
    counts = read_context(context) if context is not None else None
    how: dict[str, Any] = {"context": counts, "attention": attention, "neighbors": neighbors, "embeddings": embeddings}
    how["memory"] = parse_bytes(memory) if memory is not None else None

    def read(path: Path) -> Slide:
        slide = read_slide(path, organ=organ, technology=tech)
        loaded.check(slide)
        return slide

    if len(slides) > 1:  # a fault in the last is found before the first is run
        for path in slides:
            read(path)
    for path, target in zip(slides, targets, strict=True):
        slide = read(path)
        with progress_bar(path.name) as on_tile:
            adata = loaded.predict(slide, genes=names, **how, on_tile=on_tile)
        write_h5ad(adata, target)
        typer.echo(f"{target}: {_describe(adata, slide)}")


@app.command()
def fidelity(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    slide: Annotated[Path, typer.Option(metavar="FILE", help="Features file to measure on.")],
    neighbors: Annotated[str, typer.Option(metavar="K,K,...", help="Numbers of neighbours.")] = "8,16,32,64,128",
    organ: Annotated[str | None, typer.Option(help="Organ; left out: Others.")] = None,
    tech: Annotated[str | None, typer.Option(help="Technology; left out: unknown.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")] = Path("fidelity.png"),
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory to take, such as 6G.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the engine.")] = "onnxruntime",
    device: Annotated[str, typer.Option(help="cpu or cuda:N.")] = "cpu",
) -> None:
    """Measure, for each k, what kNN attention changes against the way that the model was trained."""
    from .engine import Engine
    from .fidelity import measure_fidelity, plot_fidelity, print_fidelity
    from .memory import parse_bytes
    from .plot import require_matplotlib
    from .readers import read_slide

    _require_png(out)
    require_matplotlib()
    counts = _whole_numbers(neighbors)
    size = parse_bytes(memory) if memory is not None else None
    loaded = Engine.load(engine, backend=backend, device=device)
    with progress_bar(slide.name) as on_step:
        found = measure_fidelity(loaded, read_slide(slide, organ=organ, technology=tech), counts, size, on_step)
    print_fidelity(found)
    plot_fidelity(found, out)
    typer.echo(str(out))


@app.command()
def plot(
    prediction: Annotated[Path, typer.Argument(metavar="PRED.h5ad", help="What stpath predict wrote.")],
    genes: Annotated[list[str], typer.Argument(metavar="GENE...", help="Genes of the prediction.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")],
) -> None:
    """Draw spatial maps of predicted genes."""
    from .plot import plot_genes
    from .readers import read_prediction

    _require_png(out)
    adata = read_prediction(prediction)
    note = adata.uns["stpath"].get("note")  # what the demo says of its simulated features
    plot_genes(adata, genes, out, title=f"{prediction.stem} ({note})" if note else prediction.stem)
    typer.echo(str(out))


@app.command()
def info(engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")]) -> None:
    """Print what an engine is: its model, precision, checkpoint and proof of parity."""
    from .info import print_manifest
    from .manifest import Manifest

    manifest = Manifest.read(engine)
    manifest.check_files(engine)
    print_manifest(engine, manifest)


@app.command()
def triton(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    out: Annotated[Path, typer.Option(metavar="MODEL_REPOSITORY", help="The folder to make.")],
    device: Annotated[str, typer.Option(help="Where Triton runs it: cpu or cuda:N.")] = "cpu",
) -> None:
    """Write a model repository for a Triton Inference Server."""
    from .triton import write_model_repository

    typer.echo(f"{out}: {', '.join(write_model_repository(engine, out, device))}")


def _require_png(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    require_writable(out)


def _whole_numbers(text: str) -> list[int]:
    """Numbers from '8,16,32', each above 0."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise InputError(f"--neighbors {text}: give whole numbers from 1, such as 8,16,32")
    return sorted({int(word) for word in words})


def _describe(adata: AnnData, slide: Slide) -> str:
    spots, genes = (
        f"{n:,} {noun}{'' if n == 1 else 's'}" for n, noun in zip(adata.shape, ("spot", "gene"), strict=True)
    )
    return f"{spots}, {genes} ({slide.organ}, {slide.technology or 'unknown technology'})"


def _targets(slides: Sequence[Path], out: Path, context: Path | None) -> list[Path]:
    """The output file of each slide; none of them an input, nor a file that stpath did not write."""
    targets = _target_names(slides, out)
    inputs = {path.resolve(): path for path in [*slides, *([context] if context is not None else [])]}
    if context is not None and len(slides) > 1:
        raise InputError(f"--context {context}: the counts of one slide, for {len(slides)} slides; run each on its own")
    for target in targets:
        if target.resolve() in inputs:
            raise InputError(f"--out {out}: {target} would overwrite an input; choose another name or folder")
        if target.exists() and not is_prediction(target):
            raise InputError(
                f"--out {out}: {target} exists and is no prediction of stpath; choose another name or folder"
            )
        require_writable(target)
    return targets


def _target_names(slides: Sequence[Path], out: Path) -> list[Path]:
    if out.name in ("", ".h5ad"):
        raise InputError(f"--out {str(out)!r}: no name; give a .h5ad file or a folder")
    if out.suffix == ".h5ad" and not out.is_dir():
        if len(slides) > 1:
            raise InputError(f"--out {out}: one file for {len(slides)} slides; give a folder")
        return [out]
    if out.suffix and not out.is_dir():
        raise InputError(f"--out {out}: give a name that ends in .h5ad, or a folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file stands there; give a folder")
    targets = [out / f"{slide.stem}.h5ad" for slide in slides]
    for i, target in enumerate(targets):
        if target in targets[:i]:
            first = slides[targets.index(target)]
            raise InputError(f"{first} and {slides[i]} would both be written to {target}; run them into two folders")
    return targets


def _is_own(given: Sequence[str]) -> bool:
    """Whether a command of the runtime is asked for, which needs none of the other packages."""
    asked = next((word for word in given if not word.startswith("-")), None)
    return asked in {command.callback.__name__ for command in app.registered_commands if command.callback is not None}


@cache
def _add_commands() -> None:
    """Add the commands of the packages that need more than the runtime (see pyproject.toml)."""
    for entry in sorted(entry_points(group="stpath.commands"), key=lambda entry: entry.name):
        command = entry.load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # taken anywhere on the line, as users put it last
    given = [word for word in given if word != "--debug"]
    for ending in (signal.SIGTERM, signal.SIGHUP):  # as a cluster or a closed terminal sends: tidy up on the way out
        signal.signal(ending, _stop)
    try:
        with warnings.catch_warnings():
            if not debug:  # other libraries' notes to their developers are no use to a user
                warnings.simplefilter("ignore")
            warnings.simplefilter("always", InputWarning)
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            if not _is_own(given):
                _add_commands()
            code = app(given, standalone_mode=False)
        if code == INTERRUPTED:  # typer takes Ctrl-C itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except Exception as error:
        if debug:
            raise
        return _report(error)
    except KeyboardInterrupt:
        typer.echo("error: interrupted; nothing half-written is left", err=True)
        return INTERRUPTED


def _stop(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    typer.echo(f"warning: {message}", err=True)


def _report(error: Exception) -> int:
    """Print one line for an error; returns the exit code."""
    if isinstance(error, ParityError):
        line, code = f"parity failed: {error}", 3
    elif isinstance(error, InputError):
        line, code = str(error), 2
    elif isinstance(error, typer.TyperException) and not error.format_message():
        return 2  # no command given: the help was printed
    elif isinstance(error, typer.TyperException):
        line, code = f"{error.format_message().rstrip('.')}; see stpath --help", 2
    elif isinstance(error, OSError):
        line, code = f"{error.filename or 'files'}: {error.strerror or error}", 2
    elif isinstance(error, MemoryError):
        line, code = f"not enough memory ({error}); ask for fewer genes or smaller slides", 2
    else:
        line, code = (
            f"{type(error).__name__}: {error}; a fault of stpath-engine: run again with --debug and report it",
            1,
        )
    typer.echo("error: " + " ".join(line.split()), err=True)
    return code
