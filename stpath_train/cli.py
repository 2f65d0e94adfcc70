"""The commands `stpath data`, `stpath train` and `stpath evaluate`.

The libraries that a command needs are imported when it runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from stpath_runtime.errors import ConfigError, InstallError
from stpath_runtime.progress import progress_bar

from .evaluation.run import TaskName
from .sources import Counts, Layout

TRAIN = ("torch", "torch_geometric", "safetensors", "lightning", "pydantic", "yaml", "scanpy", "sklearn", "matplotlib")
EVALUATE = ("torch", "pandas", "scanpy", "igraph", "sklearn", "matplotlib")

data = typer.Typer(no_args_is_help=True, help="Prepare slides with measured expression for training and evaluation.")


@data.command()
def prepare(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of the data set, as it was downloaded.")],
    layout: Annotated[Layout, typer.Option(help="How the folder is laid out.")],
    out: Annotated[Path, typer.Option(metavar="STORE", help="The training store, new or to be added to.")],
    features: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of features, ID.h5; left out with stpath: SOURCE.")
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="A row a slide; left out: the data set's own.")
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Slides to leave out: an id, or column=value, a line.")
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="What to predict of a whole slide.")] = None,
    counts: Annotated[Counts, typer.Option(help="What the files hold.")] = Counts.RAW,
    hvg: Annotated[int, typer.Option(metavar="N", min=1, help="Highly variable genes to mark on a slide.")] = 200,
    genes: Annotated[
        Path | None, typer.Option(metavar="VOCABULARY", help="symbol2ensembl.json; left out: STPath's published one.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes.")] = 1,
) -> None:
    """Take the slides of a data set into a training store, or go on with it; a slide that fails stops no other."""
    require(("pandas", "scanpy"), "train")
    from .prepare import prepare as run
    from .store import FAILURES

    with progress_bar(f"prepare {source.name}") as on_slide:
        found = run(
            source,
            layout,
            out,
            features=features,
            metadata=metadata,
            genes=genes,
            exclude_rules=exclude,
            label=label,
            hvg=hvg,
            counts=counts,
            workers=workers,
            on_slide=on_slide,
        )
    for rule, slides in found.excluded.items():
        typer.echo(f"excluded by {rule}: {slides:,}")
    for name, failure in found.failed.items():
        typer.echo(f"failed[{failure.code}]: {name}: {failure.reason}", err=True)
    typer.echo(f"{out}: {found}")
    if found.failed:
        typer.echo(f"{len(found.failed):,} failed, see {out / FAILURES}", err=True)
        raise typer.Exit(1)


@data.command()
def download(
    name: Annotated[str, typer.Argument(metavar="hest|hest-bench|stimage", help="The data set.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for its files.")],
    slides: Annotated[str, typer.Option(metavar="A,B,C", help="Slides to fetch; left out: all.")] = "",
    pattern: Annotated[
        list[str] | None, typer.Option(help="Other files than prepare and features read; may be repeated.")
    ] = None,
) -> None:
    """Download a public data set from the Hugging Face Hub: the files that prepare and features read.

    HEST-1k is open to those who accept its terms on its page, and run: hf auth login.
    """
    require(("huggingface_hub",), "features")
    from .download import download as run

    ids = [slide.strip() for slide in slides.split(",") if slide.strip()]
    typer.echo(f"{run(name, out, slides=ids, patterns=pattern or [])}: downloaded")


def train(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG.yaml", help="The run, every choice of it.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a config with every field, and stop.")] = False,
) -> None:
    """Train a model by masked gene modelling, or go on with a run that was stopped."""
    require(TRAIN, "train")
    from .config import example as example_config
    from .config import read_config

    if example:
        typer.echo(example_config(), nl=False)
        return
    if config is None:
        raise ConfigError("stpath train: give a config file; stpath train --example > config.yaml writes one")
    found = read_config(config)
    try:
        from .training import train as run
    except RuntimeError as error:  # torchmetrics, which Lightning loads, loads torchvision where it is there
        raise InstallError(
            f"Lightning cannot be loaded ({error}); install torch and torchvision of one build, or no torchvision"
        ) from error
    run(found)


def evaluate(
    task: Annotated[TaskName, typer.Argument(metavar="TASK", help=", ".join(TaskName) + ".")],
    store: Annotated[Path, typer.Option("--data", metavar="STORE", help="Training store with the slides.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results.json, results.csv and pictures.")],
    engine: Annotated[Path | None, typer.Option(metavar="ENGINE", help="The model: an exported engine,")] = None,
    checkpoint: Annotated[Path | None, typer.Option(metavar="CKPT", help="or a checkpoint.")] = None,
    benchmark: Annotated[
        str | None, typer.Option(metavar="NAME", help="Expression, imputation: genes and folds of a store's task.")
    ] = None,
    genes: Annotated[
        str | None, typer.Option(metavar="A,B,C|FILE", help="Names, or a .txt (one a line) or .json file of them.")
    ] = None,
    slides: Annotated[
        str | None, typer.Option(metavar="A,B,C|FILE", help="Slides to evaluate on; left out: all that fit the task.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Expression: mean and ridge regression of the training slides too.")
    ] = False,
    train_slides: Annotated[
        str | None, typer.Option(metavar="A,B,C|FILE", help="What the baselines learn from, without --benchmark.")
    ] = None,
    regions: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Clustering, biomarkers: obs column of marked regions.")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="A,B", help="Biomarkers: values of --regions that are the region sought.")
    ] = None,
    folds: Annotated[
        int | None, typer.Option(metavar="N", help="Classification: folds of the cross-validation; left out: 5.")
    ] = None,
    fold: Annotated[
        int | None, typer.Option(metavar="N", help="Expression: this fold of --benchmark alone, from 0.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Expression, by STFlow; from 2 on its calibration, too."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of bootstraps, clusters, folds, training and samples.")] = 0,
) -> None:
    """Evaluate a model on slides with measured expression, by the published protocols."""
    require(EVALUATE, "train")
    from .evaluation.run import Choices, run

    choices = Choices(benchmark, genes, slides, train_slides, baselines, regions, positive, folds, fold, samples)
    run(task, engine, checkpoint, store, out, choices, seed)


def require(libraries: tuple[str, ...], extra: str) -> None:
    """Raise InputError, with what to install, where a library is not."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise InstallError(f"this command needs {', '.join(missing)}; run: pip install 'stpath-engine[{extra}]'")
