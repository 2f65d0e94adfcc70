"""The commands that predict: `predict`, `run` and `decode`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FileError, OptionError
from ..images.settings import TileSettings
from ..progress import progress_bar, tile_bars
from ..results.output import Format
from ..results.targets import choose_targets, require_target, sized
from .options import (
    Attention,
    Backend,
    ContextSpots,
    Device,
    DType,
    Embeddings,
    Encoder,
    EngineFolder,
    FeaturesKey,
    FillContext,
    Form,
    Genes,
    Memory,
    MinTissue,
    Mpp,
    Neighbors,
    Organ,
    Pitch,
    Precision,
    Samples,
    Sections,
    Seed,
    SpotsFile,
    Steps,
    Tech,
    Tissue,
    Type,
    chosen_backend,
    count,
    gene_names,
)

if TYPE_CHECKING:
    from ..engine import Engine
    from ..images.encoder import Encoder as TileEncoder
    from ..images.features import FeaturesJob
    from ..slides.slide import Slide

DEFAULTS = TileSettings()


def predict(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE...", help="Slide images, or files of features.")],
    engine: EngineFolder,
    out: Annotated[str, typer.Option(metavar="PATH", help="A .h5ad or .zarr for one slide, or a folder.")],
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
    embeddings: Annotated[
        bool | None,
        typer.Option(
            "--embeddings/--no-embeddings",
            help="Keep the embedding, to decode other genes later, and for stpath view; left out: of slide images.",
        ),
    ] = None,
    form: Form = None,
    dtype: Type = DType.FLOAT32,
    encoder: Encoder = None,
    mpp: Mpp = DEFAULTS.mpp,
    pitch: Pitch = DEFAULTS.pitch,
    min_tissue: MinTissue = DEFAULTS.min_tissue,
    tissue: Tissue = None,
    spots: SpotsFile = None,
    sections: Sections = None,
    steps: Steps = None,
    seed: Seed = None,
    samples: Samples = None,
) -> None:
    """Predict the expression of genes at every spot of one or more slides, images or files of features."""
    from ..engine import Engine
    from ..images.slide import features_job, require_encoder
    from ..readers import read_context
    from ..slides.context import choose_spots
    from ..slides.vocabulary import organ_token, technology_token

    if context is not None and len(slides) > 1:
        raise OptionError(
            f"--context {context}: the counts of one slide, for {len(slides)} slides; run each on its own"
        )
    _require_context(context is not None, context_spots, fill_context)
    settings = TileSettings(mpp, pitch, min_tissue, tissue, spots, sections)
    _require_there(slides)
    images = require_encoder(slides, encoder, settings)
    if any(images):  # what would be found only after their features are made
        settings.check()
        organ_token(organ), technology_token(tech)
    inputs = [*slides, *([context] if context is not None else [])]
    targets = choose_targets(slides, out, form)
    for target, _ in targets:
        require_target(target, inputs)
    names = gene_names(genes)
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    panel = loaded.vocabulary.panel(names)
    options = loaded.options(
        attention=attention,
        neighbors=neighbors,
        embeddings=embeddings,
        fill_context=fill_context,
        steps=steps,
        seed=seed,
        samples=samples,
    )
    loaded.check_context(context is not None)
    counts = read_context(context) if context is not None else None

    tiles = _tile_encoder(encoder, loaded, backend, device, precision)
    pairs = zip(slides, targets, images, strict=True)
    jobs = [features_job(path, target, settings) for path, (target, _), is_image in pairs if is_image]
    read = _slides(slides, images, jobs, tiles, loaded, organ, tech, features_key, sections)
    for path, (named, asked), is_image, (slide, picture) in zip(slides, targets, images, read, strict=True):
        target, chosen = sized(named, asked, (len(slide), len(panel)), dtype.value)
        require_target(target, inputs)
        measured = choose_spots(counts, slide, context_spots) if counts is not None and context_spots else counts
        with progress_bar(path.name) as on_tile:
            if "embeddings" in options and embeddings is None:
                options["embeddings"] = is_image
            (prediction,) = loaded.predict_many(
                [slide],
                [measured],
                genes=panel.names if names is not None else None,
                memory=memory,
                on_tile=on_tile,
                **options,
            )
        if picture:
            prediction.frame.uns["spatial"] = picture
        with progress_bar(f"write {target.name}") as on_tile:
            prediction.write(target, chosen, dtype.value, on_tile)
        what = f"{count(len(slide), 'spot')}, {count(len(panel), 'gene')}"
        typer.echo(f"{target}: {what} ({slide.organ}, {slide.technology or 'unknown technology'})")


def _require_there(slides: list[Path]) -> None:
    """Check that slides are there before it is said what an image of that name would need."""
    from ..readers.sources import reading

    for path in slides:
        with reading(path):  # a folder around it may not be read
            there = path.exists()
        if not there:
            raise FileError(f"{path}: no such file; expected a slide image or a file of features")


def _tile_encoder(
    encoder: str | None, engine: Engine, backend: str, device: str, precision: str | None
) -> TileEncoder | None:
    """The encoder that is asked for, checked to be one that the engine takes."""
    if encoder is None:
        return None
    from ..images.encoder import load_encoder, require_width

    chosen = chosen_backend(Path(encoder), backend, device, precision)
    loaded = load_encoder(encoder, backend=chosen, device=device, precision=precision)
    require_width(loaded.name, loaded.width, engine.manifest.model.n_features, str(engine.path))
    return loaded


def _slides(
    paths: list[Path],
    images: list[bool],
    jobs: list[FeaturesJob],
    tiles: TileEncoder | None,
    engine: Engine,
    organ: str | None,
    tech: str | None,
    features_key: str | None,
    sections: str | None,
) -> Iterator[tuple[Slide, dict[str, Any]]]:
    """Each slide, and of an image its tissue; files of features are all read first: a fault of one is named at once."""
    from ..checks import check_slide
    from ..images.slide import ImageSlides
    from ..readers import read_slide

    read = []
    for path, is_image in zip(paths, images, strict=True):
        if not is_image:
            read.append(read_slide(path, organ=organ, technology=tech, features_key=features_key, sections=sections))
            check_slide(read[-1], engine.manifest)
    if tiles is None:
        yield from ((slide, {}) for slide in read)
        return
    with closing(ImageSlides(jobs, tiles)) as made:
        for is_image in images:
            if is_image:
                with tile_bars(1) as on_batch:
                    found = made.next(organ, tech, on_batch)
                yield found
            else:
                yield read.pop(0), {}


def run(
    cohort: Annotated[
        str,
        typer.Argument(
            metavar="MANIFEST.csv|FOLDER",
            help="Slides: a table with the columns slide and, as need be, organ, technology, context, mpp, tissue, "
            "spots; or a folder.",
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
    encoder: Encoder = None,
    mpp: Mpp = DEFAULTS.mpp,
    pitch: Pitch = DEFAULTS.pitch,
    min_tissue: MinTissue = DEFAULTS.min_tissue,
    sections: Sections = None,
    steps: Steps = None,
    seed: Seed = None,
    samples: Samples = None,
) -> None:
    """Predict a cohort of slides: what is whole is skipped, a failing slide stops no other."""
    from ..cohort.pipeline import Settings
    from ..cohort.run import read_cohort, run_cohort
    from ..images.reading import endings_in_folder

    settings = Settings(
        engine=str(engine),
        backend=chosen_backend(engine, backend, device, precision),
        device=device,
        precision=precision,
        genes=gene_names(genes),
        features_key=features_key,
        context_spots=context_spots,
        fill_context=fill_context,
        attention=attention,
        neighbors=neighbors,
        memory=memory,
        embeddings=embeddings,
        form=form,
        dtype=dtype.value,
        resume=resume,
        encoder=encoder,
        encoder_backend=chosen_backend(Path(encoder), backend, device, precision) if encoder is not None else None,
        tiles=TileSettings(mpp, pitch, min_tissue, sections=sections),
        steps=steps,
        seed=seed,
        samples=samples,
    )
    jobs = read_cohort(cohort, out, form, organ, tech, endings_in_folder(mpp) if encoder is not None else ())
    _require_context(any(job.context for job in jobs), context_spots, fill_context)
    cluster = {"address": ray, "workers": workers, "cpus": cpus, "gpus": gpus} if ray is not None else None
    totals = run_cohort(jobs, out, settings, cluster)
    typer.echo(f"{out}: {totals}")
    if totals.failed:
        typer.echo(f"{count(totals.failed, 'slide')} failed, see {out.rstrip('/')}/failures.csv", err=True)
        raise typer.Exit(1)


def decode(
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="A prediction with --embeddings.")],
    engine: EngineFolder,
    genes: Genes,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A .h5ad or .zarr; left out: the prediction is rewritten.")
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: Precision = None,
    form: Form = None,
    dtype: Type = DType.FLOAT32,
) -> None:
    """Add genes to a prediction, from the embedding that it keeps; the encoder is not run again."""
    from ..decoding import add_genes
    from ..engine import Engine

    target, chosen = _decoded_target(prediction, out, form)
    loaded = Engine.load(
        engine, backend=chosen_backend(engine, backend, device, precision), device=device, precision=precision
    )
    names = gene_names(genes)
    with progress_bar(f"write {target.name}") as on_tile:
        spots, added, kept = add_genes(loaded, prediction, names, target, chosen, dtype.value, on_tile)
    typer.echo(f"{target}: {count(spots, 'spot')}, {count(added, 'gene')} added to {kept:,}")


def _require_context(given: bool, context_spots: str | None, fill_context: bool) -> None:
    if not given and (context_spots is not None or fill_context):
        option = "--fill-context" if context_spots is None else "--context-spots"
        raise OptionError(
            f"{option}: there is no context; give counts with --context, or the manifest's column context"
        )


def _decoded_target(prediction: Path, out: Path | None, form: Format | None) -> tuple[Path, Format]:
    """Where a prediction with more genes goes, and as what: as it was, where nothing else is said."""
    if out is None and form is not None:
        raise OptionError(f"--format {form}: give --out too; without it {prediction} is rewritten as it was")
    if out is None:
        spatial = (prediction / "tables").is_dir()
        return prediction, Format.SPATIALDATA if spatial else Format.ZARR if prediction.is_dir() else Format.H5AD
    (target, chosen), *_ = choose_targets([prediction], out, form)
    require_target(target, [prediction])
    return target, chosen or Format.H5AD
