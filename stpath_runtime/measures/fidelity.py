"""How much kNN attention changes the results of a model that was trained with another attention, for several k."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..checks import require_stpath
from ..encoding.attention import Attention
from ..encoding.sizes import GENES_AT_ONCE
from ..engine import Engine
from ..errors import InputWarning
from ..files import written_whole
from ..names import shown
from ..progress import OnTile, report_console
from ..slides.slide import Slide
from .agreement import gene_pearson, relative_l2

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Fidelity:
    """One k, compared with the attention that the model was trained with."""

    neighbors: int
    relative_l2: float  #: of the embedding
    pearson: tuple[float, ...]  #: QUANTILES over the genes, of r over the spots
    seconds: float  #: of the encoder


@dataclass(frozen=True)
class FidelityReport:
    """All k of one slide."""

    slide: str
    spots: int
    genes: int
    trained: str  #: "global", or "knn 32"
    trained_seconds: float  #: of the encoder, attending as trained
    rows: list[Fidelity]


def measure_fidelity(
    engine: Engine,
    slide: Slide,
    neighbors: Sequence[int],
    memory: int | str | None = None,
    on_step: OnTile | None = None,
) -> FidelityReport:
    """Compare kNN attention, for each number of neighbours, with attention as trained.

    Parameters
    ----------
    neighbors
        Numbers of neighbours, the spot itself included.
    memory
        As for `Engine.embed`.
    on_step
        Called with (done, total) after each k.
    """
    require_stpath(engine.path, engine.manifest, "stpath fidelity")
    model = engine.manifest.model
    engine.embed(Slide(slide.coords[:1], slide.features[:1]))  # loads the graphs: not a part of the times
    seconds, exact = _timed(engine, slide, memory)
    rows = []
    for done, k in enumerate(neighbors):
        if on_step is not None:
            on_step(done + 1, len(neighbors) + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)  # that it is an approximation is what this measures
            engine.embed(Slide(slide.coords[:1], slide.features[:1]), attention=Attention("knn", k))
            taken, found = _timed(engine, slide, memory, Attention("knn", k))
        error = relative_l2(found, exact)
        r = _pearson_by_gene(engine, found, exact)
        rows.append(Fidelity(k, error, tuple(np.quantile(r, QUANTILES).tolist()) if len(r) else (), taken))
    trained = model.attention + (f" {model.neighbors}" if model.neighbors else "")
    return FidelityReport(slide.name, len(slide), len(engine.vocabulary), trained, seconds, rows)


def print_fidelity(report: FidelityReport) -> None:
    """Print the report as a table."""
    from rich.table import Table

    console = report_console()
    title = f"kNN against {report.trained} attention: {report.spots:,} spots, {report.genes:,} genes"
    table = Table(title=title)
    for column in ("k", "embedding, relative L2", *(f"Pearson {q:.0%}" for q in QUANTILES), "encoder, s"):
        table.add_column(column, justify="right")
    for row in report.rows:
        quantiles = [f"{r:.4f}" for r in row.pearson] or ["-"] * len(QUANTILES)
        table.add_row(str(row.neighbors), f"{row.relative_l2:.3f}", *quantiles, f"{row.seconds:.2f}")
    table.add_row(report.trained, "0", *["1"] * len(QUANTILES), f"{report.trained_seconds:.2f}")
    console.print(table)
    console.print("Pearson: of each gene over the spots; the columns are quantiles over the genes.")


def plot_fidelity(report: FidelityReport, path: Path) -> None:
    """Draw error, correlation and time against k, and write them as PNG."""
    from matplotlib.figure import Figure

    ks = [row.neighbors for row in report.rows]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(f"{shown(Path(report.slide).name)}: kNN against {report.trained} attention, {report.spots:,} spots")
    error, correlation, seconds = figure.subplots(1, 3)
    error.plot(ks, [row.relative_l2 for row in report.rows], "o-", color="tab:red")
    error.set(ylabel="relative L2 of the embedding", ylim=(0, None))
    if all(row.pearson for row in report.rows):
        low, lower, middle, upper, high = np.array([row.pearson for row in report.rows]).T
        correlation.fill_between(ks, low, high, alpha=0.15, color="tab:blue", label="5 to 95% of genes")
        correlation.fill_between(ks, lower, upper, alpha=0.3, color="tab:blue", label="25 to 75%")
        correlation.plot(ks, middle, "o-", color="tab:blue", label="median gene")
        correlation.legend(loc="lower right", frameon=False)
    correlation.set(ylabel="Pearson of a gene")
    seconds.plot(ks, [row.seconds for row in report.rows], "o-", color="tab:green", label="knn")
    seconds.axhline(report.trained_seconds, color="gray", linestyle="--", label=report.trained)
    seconds.set(ylabel="encoder, seconds", ylim=(0, None))
    seconds.legend(frameon=False)
    for axes in (error, correlation, seconds):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.set_xlabel("neighbours k")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png", facecolor="white")


def _timed(
    engine: Engine, slide: Slide, memory: int | str | None, attention: Attention | None = None
) -> tuple[float, npt.NDArray[np.float32]]:
    start = time.perf_counter()
    embedding = engine.embed(slide, memory=memory, attention=attention)
    return time.perf_counter() - start, embedding


def _pearson_by_gene(
    engine: Engine, found: npt.NDArray[np.float32], exact: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Pearson r over the spots, of each gene that varies; genes are decoded in groups."""
    genes, all_r = engine.vocabulary.ensembl_ids, []
    for start in range(0, len(genes), GENES_AT_ONCE):
        part = genes[start : start + GENES_AT_ONCE]
        all_r.append(gene_pearson(engine.decode(found, part), engine.decode(exact, part)))
    return np.concatenate(all_r)
