"""One evaluation, from what the command line names to its files.

What each task needs is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from stpath_runtime.errors import EvaluationError, OptionError
from stpath_runtime.names import listed_names
from stpath_runtime.progress import OnTile, progress_bar

if TYPE_CHECKING:
    from stpath_train.store import Store, Task

    from .predictor import Predictor
    from .results import Evaluation

FOLDS = 5


class TaskName(StrEnum):
    """What is evaluated."""

    EXPRESSION = "expression"
    IMPUTATION = "imputation"
    CLUSTERING = "clustering"
    BIOMARKERS = "biomarkers"
    CLASSIFICATION = "classification"


@dataclass(frozen=True)
class Choices:
    """What the command line names of the slides and genes; None or False where it does not."""

    benchmark: str | None = None
    genes: str | None = None
    slides: str | None = None
    train_slides: str | None = None
    baselines: bool = False
    regions: str | None = None
    positive: str | None = None
    folds: int | None = None
    fold: int | None = None
    samples: int | None = None


# What each task takes of the choices.
TAKES = {
    TaskName.EXPRESSION: {"benchmark", "fold", "genes", "slides", "train_slides", "baselines", "samples"},
    TaskName.IMPUTATION: {"benchmark", "genes", "slides"},
    TaskName.CLUSTERING: {"genes", "slides", "regions"},
    TaskName.BIOMARKERS: {"genes", "slides", "regions", "positive"},
    TaskName.CLASSIFICATION: {"genes", "slides", "folds"},
}


def run(
    name: TaskName, engine: Path | None, checkpoint: Path | None, data: Path, out: Path, choices: Choices, seed: int
) -> None:
    """Evaluate a model on a store, write the results, and print them.

    Raises
    ------
    InputError
        If what is named does not fit the task, the store or the model.
    """
    from stpath_runtime.files import sha256
    from stpath_train.store import GENES, Store

    from .predictor import open_predictor
    from .results import print_figures, require_folder, write_evaluation
    from .slides import simulated

    check(name, choices)
    require_folder(out)
    store = Store.open(data)
    genes = list(dict.fromkeys(listed_names(choices.genes, "--genes", "gene"))) if choices.genes is not None else None
    benchmark = benchmark_task(store, choices, genes) if name in (TaskName.EXPRESSION, TaskName.IMPUTATION) else None
    slides = slides_of(store, name, choices, benchmark)
    predictor, model = open_predictor(engine, checkpoint, store, choices.samples, seed)
    with progress_bar(f"evaluate {name}") as on_slide:
        found = _evaluate(name, predictor, store, genes, slides, benchmark, choices, seed, on_slide)
    about = {
        "model": model,
        "store": {"path": str(data), "genes": sha256(data / GENES)},
        "choices": {key: value for key, value in vars(choices).items() if value not in (None, False)},
        "genes": benchmark.genes if benchmark is not None else genes,
        "slides": slides,
        "seed": seed,
    }
    of_simulated = simulated(store, slides)
    write_evaluation(found, out, about, of_simulated)
    print_figures(found, of_simulated)


def check(name: TaskName, choices: Choices) -> None:
    """Check that the choices are those of the task.

    Raises
    ------
    InputError
        If one is of another task, or a needed one is missing.
    """
    given = {field.name for field in fields(choices) if getattr(choices, field.name) not in (None, False)}
    if wrong := sorted(given - TAKES[name]):
        tasks = [task for task, takes in TAKES.items() if wrong[0] in takes]
        raise OptionError(f"{_option(wrong[0])} is not an option of {name}; it is one of {', '.join(tasks)}")
    if "benchmark" in given and (both := sorted(given & {"genes", "slides", "train_slides"})):
        raise OptionError(
            f"{_option(both[0])} beside --benchmark, which names the genes and the slides; give one of them"
        )
    if name in (TaskName.EXPRESSION, TaskName.IMPUTATION) and not given & {"benchmark", "genes"}:
        raise OptionError(f"{name} needs genes: give --benchmark NAME, or --genes A,B or a file of them")
    if name is TaskName.BIOMARKERS and "genes" not in given:
        raise OptionError("biomarkers needs the markers: give --genes A,B or a file of them")
    if name is TaskName.CLUSTERING and "regions" not in given:
        raise OptionError("clustering needs the regions to score against: give --regions COLUMN, an obs column")
    if name is TaskName.BIOMARKERS and len(given & {"regions", "positive"}) == 1:
        raise OptionError("--regions COLUMN and --positive VALUE name a region together; give both or neither")
    if ("train_slides" in given) > choices.baselines:
        raise OptionError("--train-slides are what the baselines learn from; add --baselines, or leave it out")
    if choices.baselines and not given & {"benchmark", "train_slides"}:
        raise OptionError("--baselines need slides to learn from: give --benchmark NAME or --train-slides A,B")
    if choices.fold is not None and "benchmark" not in given:
        raise OptionError(f"--fold {choices.fold}: of a benchmark; give --benchmark NAME, or leave it out")
    if choices.folds is not None and choices.folds < 2:
        raise OptionError(f"--folds {choices.folds}: cross-validation needs 2 folds or more")


def benchmark_task(store: Store, choices: Choices, genes: list[str] | None) -> Task:
    """The benchmark of the store, or the genes and slides that are named, each slide a fold of its own.

    Raises
    ------
    InputError
        If it has no test slide, or tests on what the baselines learn from.
    """
    from stpath_train.store import Task

    if choices.benchmark is not None:
        task = store.task(choices.benchmark)
        if choices.fold is not None:
            if not 0 <= choices.fold < len(task.folds):
                raise OptionError(f"--fold {choices.fold}: {choices.benchmark} has {len(task.folds)} folds, from 0")
            task = Task(task.genes, [task.folds[choices.fold]])
    else:
        train = listed_names(choices.train_slides, "--train-slides", "slide") if choices.train_slides else []
        task = Task(genes or [], [{"train": train, "test": [slide]} for slide in _named_slides(store, choices)])
        _require_apart(store, train, [slide for fold in task.folds for slide in fold["test"]])
    named = f"task {choices.benchmark!r}" if choices.benchmark is not None else "--slides"
    for i, fold in enumerate(task.folds):
        if not fold["test"]:
            raise EvaluationError(f"{store.path}: fold {i} of {named} has no test slide; prepare the task again")
        if both := sorted(set(fold["train"]) & set(fold["test"])):
            raise EvaluationError(
                f"{store.path}: fold {i} of {named} has slide {both[0]!r} on both sides; keep it on one"
            )
        if choices.baselines and not fold["train"]:
            raise EvaluationError(f"{store.path}: fold {i} of {named} has no training slide for --baselines")
    return task


def slides_of(store: Store, name: TaskName, choices: Choices, benchmark: Task | None) -> list[str]:
    """The slides that are evaluated."""
    from .expression import test_slides

    if benchmark is not None:
        return test_slides(benchmark)
    if name is TaskName.CLASSIFICATION and choices.slides is None:
        labelled = [slide for slide, record in store.records.items() if record.label]
        if store.records and not labelled:
            raise EvaluationError(f"{store.path}: no slide has a label in slides.csv; classification needs labels")
        return labelled
    return _named_slides(store, choices)


def _named_slides(store: Store, choices: Choices) -> list[str]:
    """The slides named, each once, or all of the store."""
    if choices.slides is None:
        return list(store.records)
    slides = list(dict.fromkeys(listed_names(choices.slides, "--slides", "slide")))
    store.require_slides(slides)
    return slides


def _require_apart(store: Store, train: Sequence[str], test: Sequence[str]) -> None:
    """Raise InputError where a slide, or a patient, is both learned from and tested on."""
    store.require_slides(train)
    if both := sorted(set(train) & set(test)):
        raise EvaluationError(
            f"slide {both[0]!r} is among --train-slides and among the test slides; keep it on one side"
        )
    patients = {store.records[slide].patient: slide for slide in train if store.records[slide].patient}
    for slide in test:
        if other := patients.get(store.records[slide].patient):
            raise EvaluationError(
                f"slides {other!r} (training) and {slide!r} (test) are of one patient, "
                f"{store.records[slide].patient!r}; keep a patient on one side"
            )


def _evaluate(
    name: TaskName,
    predictor: Predictor,
    store: Store,
    genes: list[str] | None,
    slides: list[str],
    benchmark: Task | None,
    choices: Choices,
    seed: int,
    on_slide: OnTile | None,
) -> Evaluation:
    if name is TaskName.EXPRESSION:
        from .expression import evaluate_expression

        assert benchmark is not None
        return evaluate_expression(predictor, store, benchmark, choices.baselines, seed=seed, on_slide=on_slide)
    if name is TaskName.IMPUTATION:
        from .imputation import evaluate_imputation

        assert benchmark is not None
        return evaluate_imputation(predictor, store, benchmark.genes, slides, seed=seed, on_slide=on_slide)
    if name is TaskName.CLUSTERING:
        from .clustering import evaluate_clustering

        return evaluate_clustering(predictor, store, genes, slides, choices.regions or "", seed=seed, on_slide=on_slide)
    if name is TaskName.BIOMARKERS:
        from .biomarkers import evaluate_biomarkers

        positive = [value.strip() for value in (choices.positive or "").split(",")]
        region = (choices.regions, positive) if choices.regions is not None else None
        return evaluate_biomarkers(predictor, store, genes or [], slides, region, seed=seed, on_slide=on_slide)
    from .classification import evaluate_classification

    return evaluate_classification(
        predictor, store, genes, slides, choices.folds or FOLDS, seed=seed, on_slide=on_slide
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
