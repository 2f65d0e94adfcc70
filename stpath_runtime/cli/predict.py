"""The commands of `stpath` that need nothing but the runtime; libraries that a command needs are imported in it."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import OptionError, OutputError
from .names import listed_names
from .output import Format, require_writable
from .progress import progress_bar
from .targets import choose_targets, require_target, sized

if TYPE_CHECKING:
    from .slide import Slide


class DType(StrEnum):
    """Type of the expression in a file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


EngineFolder = Annotated[Path, typer.Option("--engine", metavar="ENGINE", help="Engine folder.")]
Organ = Annotated[str | None, typer.Option(help="Organ, as HEST-1k or STPath name it; left out: Others.")]
Tech = Annotated[str | None, typer.Option(help="Visium, Xenium, ...; left out: unknown.")]
Genes = Annotated[str, typer.Option(metavar="A,B,C|FILE", help="Names, or a .txt (one a line) or .json file of them.")]
FeaturesKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Where the features are: the obsm key of an AnnData, the table of a SpatialData."),
]
ContextSpots = Annotated[
    str | None,
    typer.Option(
        metavar="5%|A,B,C|FILE",
        help="Which spots with counts are context: a share by the published rule, barcodes, or a .csv of barcode and "
        "context (1 or 0); left out: all.",
    ),
]
FillContext = Annotated[bool, typer.Option("--fill-context", help="Write the measured values of context spots.")]
Attention = Annotated[str | None, typer.Option(help="global or knn; left out: as the model was trained.")]
Neighbors = Annotated[int | None, typer.Option(metavar="K", help="With knn: attend to the K nearest spots.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory to take, such as 6G; left out: half of what there is.")
]
Backend = Annotated[
    str,
    typer.Option(help="What runs the engine: onnxruntime, openvino, tensorrt, tensorrt_rtx, or auto, which says what."),
]
Device = Annotated[str, typer.Option(help="cpu or cuda:N.")]
Precision = Annotated[
    str | None, typer.Option(metavar="fp32|fp16|bf16", help="What to compute in; left out: the engine's own.")
]
Embeddings = Annotated[bool, typer.Option("--embeddings", help="Keep the embedding, to decode other genes later.")]
Form = Annotated[
    Format | None, typer.Option("--format", help="What to write; left out: by the name, zarr where X is above 2 GiB.")
]
Type = Annotated[DType, typer.Option("--dtype", help="Type of the expression written.")]


def predict(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE...", help="Files of features.")],
    engine: EngineFolder,
    out: Annotated[Path, typer.Option(metavar="PATH", help="A .h5ad or .zarr for one slide, or a folder.")],
    organ: Organ = None,
    tech: Tech = None,
    genes: Genes = "all",
    features_key: FeaturesKey = None,
    context: Annotated[
        Path | None, typer.Option(metavar="COUNTS.h5ad", help="Raw counts of some spots; obs_names are barcodes.")
    ] = None,
    context_spots: ContextSpots = None,
    fill_context: FillContext = False,
    attention: Attention = None,
    neighbors: Neighbors = None,
    memory: Memory = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
    embeddings: Embeddings = False,
    form: Form = None,
    dtype: Type = DType.FLOAT32,
) -> None:
    """Predict the expression of genes at every spot of one or more slides."""
    from .context import choose_spots
    from .engine import Engine
    from .memory import parse_bytes
    from .readers import read_context, read_slide

    if context is not None and len(slides) > 1:
        raise OptionError(
            f"--context {context}: the counts of one slide, for {len(slides)} slides; run each on its own"
        )
    _require_context(context is not None, context_spots, fill_context)
    inputs = [*slides, *([context] if context is not None else [])]
    targets = choose_targets(slides, out, form)
    for target, _ in targets:
        require_target(target, inputs)
    names = _gene_names(genes)
    how: dict[str, Any] = {"genes": names, "attention": attention, "neighbors": neighbors}
    how |= {"embeddings": embeddings, "fill_context": fill_context}
    how["memory"] = parse_bytes(memory) if memory is not None else None
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    n_genes = len(loaded.panel(names)[0])
    counts = read_context(context) if context is not None else None

    def read(path: Path) -> Slide:
        slide = read_slide(path, organ=organ, technology=tech, features_key=features_key)
        loaded.check(slide)
        return slide

    if len(slides) > 1:  # a fault in the last is found before the first is run
        for path in slides:
            read(path)
    for path, (named, asked) in zip(slides, targets, strict=True):
        slide = read(path)
        target, chosen = sized(named, asked, (len(slide), n_genes), dtype.value)
        require_target(target, inputs)
        measured = choose_spots(counts, slide, context_spots) if counts is not None and context_spots else counts
        with progress_bar(path.name) as on_tile:
            prediction = loaded.encode([slide], [measured], **how, on_tile=on_tile)[0]
        with progress_bar(f"write {target.name}") as on_tile:
            prediction.write(target, chosen, dtype.value, on_tile)
        what = f"{_count(len(slide), 'spot')}, {_count(n_genes, 'gene')}"
        typer.echo(f"{target}: {what} ({slide.organ}, {slide.technology or 'unknown technology'})")


def decode(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="A prediction with --embeddings.")],
    engine: EngineFolder,
    genes: Genes,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A .h5ad or .zarr; left out: the prediction is written anew.")
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
    form: Form = None,
    dtype: Type = DType.FLOAT32,
) -> None:
    """Add genes to a prediction, from the embedding that it keeps; the encoder is not run again."""
    from .decoding import add_genes
    from .engine import Engine

    target, chosen = _decoded_target(prediction, out, form)
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    names = _gene_names(genes)
    with progress_bar(f"write {target.name}") as on_tile:
        spots, added, kept = add_genes(loaded, prediction, names, target, chosen, dtype.value, on_tile)
    typer.echo(f"{target}: {_count(spots, 'spot')}, {_count(added, 'gene')} added to {kept:,}")


def run(
    cohort: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST.csv|FOLDER",
            help="Slides: a table with the columns slide and, as need be, organ, technology, context; or a folder.",
        ),
    ],
    engine: EngineFolder,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder, or URL, for a result a slide.")],
    organ: Organ = None,
    tech: Tech = None,
    genes: Genes = "all",
    features_key: FeaturesKey = None,
    context_spots: ContextSpots = None,
    fill_context: FillContext = False,
    attention: Attention = None,
    neighbors: Neighbors = None,
    memory: Memory = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
    embeddings: Embeddings = False,
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = Format.H5AD,
    dtype: Type = DType.FLOAT32,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Skip slides with a whole result of the same settings.")
    ] = True,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="Run on a Ray cluster, or on a local one.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="With --ray: engines at once.")] = 1,
    cpus: Annotated[float, typer.Option(metavar="C", min=0, help="With --ray: CPUs of an engine.")] = 1,
    gpus: Annotated[float, typer.Option(metavar="G", min=0, help="With --ray: GPUs of an engine.")] = 0,
) -> None:
    """Predict a cohort of slides: what is whole is skipped, a failing slide stops no other."""
    from .cohort import read_cohort, run_cohort
    from .memory import parse_bytes
    from .pipeline import Settings

    settings = Settings(
        engine=str(engine),
        backend=chosen_backend(engine, backend, device, precision),
        device=device,
        precision=precision,
        genes=_gene_names(genes),
        features_key=features_key,
        context_spots=context_spots,
        fill_context=fill_context,
        attention=attention,
        neighbors=neighbors,
        memory=parse_bytes(memory) if memory is not None else None,
        embeddings=embeddings,
        form=form,
        dtype=dtype.value,
        resume=resume,
    )
    jobs = read_cohort(cohort, out, form, organ, tech)
    _require_context(any(job.context for job in jobs), context_spots, fill_context)
    cluster = {"address": ray, "workers": workers, "cpus": cpus, "gpus": gpus} if ray is not None else None
    totals = run_cohort(jobs, out, settings, cluster)
    typer.echo(f"{out}: {totals}")
    if totals.failed:
        typer.echo(f"{_count(totals.failed, 'slide')} failed, see {out.rstrip('/')}/failures.csv", err=True)
        raise typer.Exit(1)


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
    from .engine import Engine
    from .fidelity import measure_fidelity, plot_fidelity, print_fidelity
    from .memory import parse_bytes
    from .plot import require_matplotlib
    from .readers import read_slide

    _require_png(out)
    require_matplotlib()
    counts = whole_numbers(neighbors, "--neighbors", "8,16,32")
    size = parse_bytes(memory) if memory is not None else None
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    read = read_slide(slide, organ=organ, technology=tech, features_key=features_key)
    with progress_bar(slide.name) as on_step:
        found = measure_fidelity(loaded, read, counts, size, on_step)
    print_fidelity(found)
    plot_fidelity(found, out)
    typer.echo(str(out))


def plot(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="What stpath predict wrote.")],
    genes: Annotated[list[str], typer.Argument(metavar="GENE...", help="Genes of the prediction.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="The picture to write.")],
) -> None:
    """Draw spatial maps of predicted genes."""
    from .plot import plot_genes
    from .readers import open_prediction

    _require_png(out)
    with open_prediction(prediction) as (adata, x):
        note = adata.uns["stpath"].get("note")  # what the demo says of its simulated features
        title = f"{prediction.stem} ({note})" if note else prediction.stem
        plot_genes(adata, genes, out, title=title, x=x)
    typer.echo(str(out))


def info(engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")]) -> None:
    """Print what an engine is: its model, precision, checkpoint and proof of parity."""
    from .info import print_manifest
    from .manifest import Manifest

    manifest = Manifest.read(engine)
    manifest.check_files(engine)
    print_manifest(engine, manifest)


def triton(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
    out: Annotated[Path, typer.Option(metavar="MODEL_REPOSITORY", help="The folder to make.")],
    device: Annotated[str, typer.Option(help="Where Triton runs it: cpu or cuda:N.")] = "cpu",
) -> None:
    """Write a model repository for a Triton Inference Server."""
    from .triton import write_model_repository

    typer.echo(f"{out}: {', '.join(write_model_repository(engine, out, device))}")


def build(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.")],
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
    from .plan_builder import Build

    todo = Build.of(engine, backend, device, target, max_spots)
    what = f"{_count(len(todo.ranges), 'plan')} for {todo.target}, slides up to {_count(max_spots, 'spot')}"
    if todo.up_to_date():
        typer.echo(f"{todo.folder}: {what}, up to date")
        return
    typer.echo(f"building {what}; time: {todo.expected()}", err=True)
    with progress_bar(todo.folder.name) as on_step:
        plans = todo.run(on_step)
    typer.echo(f"{todo.folder}: {what} ({plans.seconds():,.1f} s)")


def doctor(engine: Annotated[Path | None, typer.Argument(metavar="[ENGINE]", help="Engine folder.")] = None) -> None:
    """Print what each backend needs and finds on this machine and, with an engine, whether those that work agree."""
    from .doctor import examine

    examine(engine)


COMMANDS: tuple[Callable[..., None], ...] = (predict, decode, run, fidelity, plot, info, triton, build, doctor)


def chosen_backend(engine: Path, backend: str, device: str, precision: str | None) -> str:
    """The backend that is asked for; with auto the one that is chosen, which is told on stderr."""
    from .backends.choice import AUTO, choose_backend

    if backend != AUTO:
        return backend
    name, why = choose_backend(engine, device, precision)
    typer.echo(why, err=True)
    return name


def _gene_names(genes: str) -> list[str] | None:
    """The genes asked for; None means all."""
    return None if genes.casefold() == "all" else listed_names(genes, "--genes", "gene")


def _require_context(given: bool, context_spots: str | None, fill_context: bool) -> None:
    if not given and (context_spots is not None or fill_context):
        option = "--fill-context" if context_spots is None else "--context-spots"
        raise OptionError(
            f"{option}: there is no context; give counts with --context, or the manifest's column context"
        )


def _decoded_target(prediction: Path, out: Path | None, form: Format | None) -> tuple[Path, Format]:
    """Where a prediction with more genes goes, and as what: as it was, where nothing else is said."""
    if out is None and form is not None:
        raise OptionError(f"--format {form}: give --out too; without it {prediction} is written anew as it was")
    if out is None:
        spatial = (prediction / "tables").is_dir()
        return prediction, Format.SPATIALDATA if spatial else Format.ZARR if prediction.is_dir() else Format.H5AD
    (target, chosen), *_ = choose_targets([prediction], out, form)
    require_target(target, [prediction])
    return target, chosen or Format.H5AD


def _require_png(out: Path) -> None:
    if out.suffix.lower() != ".png":
        raise OutputError(f"--out {out}: the picture is a PNG; give a name that ends in .png")
    require_writable(out)


def whole_numbers(text: str, option: str, example: str) -> list[int]:
    """Distinct numbers from a text such as '8,16,32', each above 0, sorted."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise OptionError(f"{option} {text}: give whole numbers from 1, such as {example}")
    return sorted({int(word) for word in words})


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
