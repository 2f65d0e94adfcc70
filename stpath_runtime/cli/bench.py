"""The commands `stpath bench ENGINE` and `stpath bench compare OLD NEW`; what they need is imported when one runs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import OptionError
from ..files import require_writable, written_whole
from ..progress import progress_bar

if TYPE_CHECKING:
    from ..measures.bench.results import Results

REGRESSION = 4  # the exit code
MEASURE, COMPARE = "ENGINE", "compare"  # the first is what has no name
NEIGHBORS = 32  # for a model that attends globally


class Attentions(StrEnum):
    """Which ways to attend to measure."""

    GLOBAL = "global"
    KNN = "knn"
    BOTH = "both"


class _EngineOrCompare(TyperGroup):
    """`bench ENGINE`, unless the first word is a command: `bench compare OLD NEW`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _named(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, _named(args))
        return "" if name == MEASURE else name, command, rest  # its usage reads `stpath bench ENGINE`


def _named(args: list[str]) -> list[str]:
    return args if args[:1] in ([MEASURE], [COMPARE]) else [MEASURE, *args]


bench = typer.Typer(
    cls=_EngineOrCompare,
    help="Measure an engine on this machine, or compare two results.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.command(MEASURE, no_args_is_help=True)
def measure(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder, or a tile encoder's.")],
    spots: Annotated[str, typer.Option(metavar="N,N,...", help="Sizes of the random slides.")] = "500,2000,5000,20000",
    attention: Annotated[Attentions, typer.Option(help="Which ways to attend.")] = Attentions.BOTH,
    neighbors: Annotated[
        int | None, typer.Option(metavar="K", min=1, help="With knn; left out: as trained, or 32.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Only this one; left out: all that work here.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="fp32|fp16|bf16", help="Only this one; left out: all that work here.")
    ] = None,
    genes: Annotated[int, typer.Option(metavar="N", min=1, help="Genes to decode.")] = 50,
    tiles: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Of a tile encoder: tiles at once; left out: what it takes.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Timed calls of each, in turn.")] = 5,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write bench.json, bench.md and pictures there.")
    ] = None,
) -> None:
    """Measure an engine or a tile encoder here: seconds, memory and parity of each backend and precision that works.

    Two results are compared by: stpath bench compare OLD NEW
    """
    from ..manifest import Manifest, is_encoder, is_flow
    from ..measures.bench.measure import measure_engine, ways_here
    from ..measures.bench.results import Row
    from ..measures.bench.tiles import measure_encoder
    from .options import whole_numbers

    if attention is Attentions.GLOBAL and neighbors is not None:
        raise OptionError(f"--neighbors {neighbors}: global attention takes none; leave it out or give --attention knn")
    sizes = whole_numbers(spots, "--spots", "500,2000")
    if out is not None:
        _require_folder(out)
    ways = ways_here(engine, backend, precision)
    if is_encoder(engine):
        batches = whole_numbers(tiles, "--tiles", "1,8") if tiles is not None else []
        with progress_bar(engine.name) as on_step:
            measured = measure_encoder(engine, ways, batches, rounds, on_step)
        _show(measured, out)
        _keep(engine, measured)
        return
    if is_flow(engine):
        raise OptionError(f"{engine}: an STFlow engine; stpath bench measures STPath engines and tile encoders")
    if tiles is not None:
        raise OptionError(f"--tiles {tiles}: of a tile encoder, and {engine} is an STPath engine; give --spots")
    k = neighbors or Manifest.read(engine).model.neighbors or NEIGHBORS
    kinds = {"global": 0, "knn": k}
    asked = kinds if attention is Attentions.BOTH else {attention.value: kinds[attention.value]}
    todo = [Row("", attention=kind, neighbors=k, spots=n, genes=genes) for kind, k in asked.items() for n in sizes]
    with progress_bar(engine.name) as on_step:
        results = measure_engine(engine, ways, todo, rounds, on_step)
    _show(results, out)
    _keep(engine, results)


def _show(results: Results, out: Path | None) -> None:
    from ..measures.bench.tables import print_table

    print_table(results)
    if out is not None:
        typer.echo("\n".join(str(path) for path in _write(results, out)))


def _keep(engine: Path, results: Results) -> None:
    """Keep the seconds for `--backend auto`, and print what it takes from now on."""
    from ..backends.choice import choose_backend, keep_seconds

    for (device, precision), seconds in results.seconds_of_backends().items():
        keep_seconds(engine, device, precision, seconds)
        typer.echo(choose_backend(engine, device, precision)[1])


@bench.command(COMPARE)
def compare(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="A bench.json.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="A later one, of the same sizes.")],
    ratio: Annotated[
        float, typer.Option(metavar="R", min=1, help="From how many times the seconds or memory a row is a regression.")
    ] = 1.1,
) -> None:
    """Compare two results of stpath bench, row by row; exit code 4 if one became slower or takes more memory."""
    from ..measures.bench.comparison import pairs, print_pairs, warn_of_differences
    from ..measures.bench.results import Results

    before, after = Results.read(old), Results.read(new)
    warn_of_differences(before, after)
    found = pairs(before, after)
    worse = print_pairs(found, ratio)
    typer.echo(f"{len(found)} rows compared, {worse} above {ratio:g} times and beyond the spread")
    if worse:
        raise typer.Exit(REGRESSION)


def _require_folder(out: Path) -> None:
    from ..errors import OutputError
    from ..results.plot import require_matplotlib

    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: a file; give a folder")
    require_writable(out / "bench.json")
    require_matplotlib()


def _write(results: Results, out: Path) -> list[Path]:
    """Write the results, the table and the pictures; returns their paths."""
    from ..measures.bench.plots import plot_latency, plot_memory
    from ..measures.bench.tables import markdown

    names = ["bench.json", "bench.md"]
    names += ["latency.png", "memory.png"] if any(row.spots for row in results.rows) else []
    paths = [out / name for name in names]
    results.write(paths[0])
    with written_whole(paths[1]) as partial:
        partial.write_text(markdown(results), encoding="utf-8", errors="backslashreplace")
    if len(paths) > 2:
        plot_latency(results, paths[2])
        plot_memory(results, paths[3])
    return paths
