"""Pictures of an evaluation. Each has a title, which `write_evaluation` adds to where slides are simulated.

N spots of a slide; coordinates [N, 2] in pixels, y grows downwards, as in the slide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from stpath_runtime.encoding.neighbors import usual_distance

from .results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONTEXTS = {"the other spots": "tab:blue", "none": "tab:gray"}  # of an imputation, and their colours
INPUTS = {"measured": "tab:gray", "predicted": "tab:blue", "embedding": "tab:orange"}  # of clustering
MOST_MAPS = 12  # slides that are drawn
MOST_NAMED = 14  # curves or regions that a legend names
MOST_GENES = 80  # whose names can be read
PALE = "#d9d9d9"


def counted(n: int, noun: str) -> str:
    """'1 slide', '12 slides'."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def expression_figure(rows: Sequence[Row], figures: Sequence[Row], title: str) -> Figure:
    """Pearson of each gene over the pooled spots, sorted, and the mean of each fold by predictor."""
    figure, axes = _figure(title, (12, 4.6), 2, width_ratios=(3, 1))
    genes = sorted((r for r in rows if r["protocol"] == "pooled"), key=lambda r: -np.nan_to_num(r["pearson"], nan=-2))
    pooled = next(row for row in figures if row["protocol"] == "pooled")
    x = np.arange(len(genes))
    low, value, high = (np.array([gene[name] for gene in genes], float) for name in ("low", "pearson", "high"))
    axes[0].axhspan(pooled["low"], pooled["high"], color="tab:orange", alpha=0.3, linewidth=0)
    defined = np.isfinite(pooled["value"])
    mean = f"mean {pooled['value']:.3f} [{pooled['low']:.3f}, {pooled['high']:.3f}]" if defined else "mean undefined"
    axes[0].axhline(pooled["value"], color="tab:orange", label=mean)
    axes[0].vlines(x, low, high, color="tab:blue", alpha=0.5, linewidth=2)
    axes[0].plot(x, value, "o", color="tab:blue", markersize=4, label="gene, 95% interval")
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set(
        ylabel="Pearson r, predicted and measured", xlabel=f"genes, sorted (n = {len(genes)})", xlim=(-1, len(genes))
    )
    if len(genes) <= MOST_GENES:
        size = 8 if len(genes) <= MOST_GENES // 2 else 6
        axes[0].set_xticks(x, [gene["gene"] for gene in genes], rotation=90, fontsize=size, style="italic")
    else:
        axes[0].set_xticks([])
    axes[0].set_title(f"pooled spots of all test slides (n = {pooled['spots']:,})", fontsize=10)
    axes[0].legend(frameon=False, loc="upper right", fontsize=8)
    _fold_strip(axes[1], rows, figures)
    return figure


def calibration_figure(rows: Sequence[Row], figure: Row, title: str) -> Figure:
    """Error by spread of the samples, in parts of equally many pairs of spot and gene."""
    drawn, (axes,) = _figure(title, (5.4, 4.6), 1)
    spread, error = (np.array([row[name] for row in rows]) for name in ("spread", "error"))
    axes.plot(spread, error, "o-", color="tab:blue", label="a tenth of the pairs of spot and gene")
    axes.set(xlabel="standard deviation of the samples (rms)", ylabel="error (rms), log1p of counts")
    axes.set(xlim=(0, 1.08 * spread.max() or None), ylim=(0, 1.08 * error.max() or None))
    times = np.sqrt(np.mean(error**2)) / max(np.sqrt(np.mean(spread**2)), 1e-300)
    axes.set_title(f"Spearman {figure['value']:.2f}; errors are {times:.1f} times the spread", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return drawn


def imputation_figure(figures: Sequence[Row], title: str) -> Figure:
    """Mean Pearson against the share of masked spots, with and without context."""
    figure, (axes,) = _figure(title, (6, 4.4), 1)
    for i, (context, color) in enumerate(CONTEXTS.items()):
        rows = [row for row in figures if row["protocol"] == "pooled" and row["context"] == context]
        x = [100 * row["masked"] for row in rows]
        low, value, high = (np.array([row[name] for row in rows]) for name in ("low", "value", "high"))
        places = np.array(x) + (i - 0.5) * 0.3  # side by side: they may lie upon each other
        axes.vlines(places, low, high, color=color, alpha=0.5, linewidth=2)
        axes.plot(places, value, "o-", color=color, label=f"context: {context}")
    axes.set_xticks(x, [f"{share:.0f}%\nn = {row['spots']:,}" for share, row in zip(x, rows, strict=True)])
    axes.set(xlabel="masked spots, on which it is scored", ylabel="mean Pearson r of the genes, 95% interval")
    bottom, top = axes.get_ylim()
    axes.set_ylim(min(bottom, (bottom + top) / 2 - 0.05), max(top, (bottom + top) / 2 + 0.05))
    axes.legend(frameon=False)
    return figure


def imputation_map(
    slide: str,
    gene: str,
    coords: npt.NDArray[Any],
    masked: npt.NDArray[np.int64],
    predicted: npt.NDArray[np.float32],
    measured: npt.NDArray[np.float32],
) -> Figure:
    """What is given of a slide, what is predicted at the masked spots, and what was measured, of one gene [N]."""
    title = f"{slide}: {gene}, {len(masked):,} of {len(coords):,} spots masked"
    figure, axes = _maps(title, coords, 3)
    given = np.setdiff1d(np.arange(len(coords)), masked)
    scale = tuple(np.percentile(measured, [1, 99]))
    _draw(axes[0], coords, PALE)
    _draw_values(figure, axes[0], coords, measured, given, scale)
    axes[0].set_title(f"given: {len(given):,} spots of context", fontsize=10)
    _draw(axes[1], coords, PALE)
    _draw_values(figure, axes[1], coords, predicted, masked, tuple(np.percentile(predicted[masked], [1, 99])))
    axes[1].set_title("predicted, masked spots", fontsize=10)
    _draw_values(figure, axes[2], coords, measured, np.arange(len(coords)), scale)
    axes[2].set_title("measured", fontsize=10)
    return figure


def regions_and_genes(
    title: str,
    coords: npt.NDArray[Any],
    marked: npt.NDArray[np.str_],
    genes: Mapping[str, npt.NDArray[np.float32]],
) -> Figure:
    """A pathologist's regions beside maps of genes, each [N]."""
    figure, axes = _maps(title, coords, 1 + len(genes), legend=True)
    _draw_labels(axes[0], coords, marked, legend=True)
    axes[0].set_title("regions, as marked", fontsize=10)
    for panel, (gene, values) in zip(axes[1:], genes.items(), strict=True):
        _draw_values(figure, panel, coords, values, np.arange(len(coords)), tuple(np.percentile(values, [1, 99])))
        panel.set_title(gene, fontsize=10)
    return figure


def region_maps(
    slide: str,
    coords: npt.NDArray[Any],
    marked: npt.NDArray[np.str_],
    clusters: Mapping[str, npt.NDArray[np.str_]],
    rows: Sequence[Row],
) -> Figure:
    """A pathologist's regions beside the clusters of each input."""
    found = {row["input"]: row["value"] for row in rows if row["slide"] == slide and row["metric"] == "ARI"}
    figure, axes = _maps(f"{slide}, {len(coords):,} spots", coords, 1 + len(clusters), legend=True)
    _draw_labels(axes[0], coords, marked, legend=True)
    axes[0].set_title("regions, as marked", fontsize=10)
    for panel, (kind, labels) in zip(axes[1:], clusters.items(), strict=True):
        _draw_labels(panel, coords, labels, legend=False)
        panel.set_title(f"{kind}: {len(set(labels))} clusters, ARI {found[kind]:.2f}", fontsize=10)
    return figure


def clustering_figure(rows: Sequence[Row], figures: Sequence[Row], title: str) -> Figure:
    """The scores of each input: a bar for the mean over the slides, a dot a slide."""
    figure, (axes,) = _figure(title, (7.5, 4), 1)
    names = list(dict.fromkeys(row["metric"] for row in figures))
    for i, (kind, color) in enumerate(INPUTS.items()):
        x = np.arange(len(names)) + (i - 1) * 0.27
        means = {row["metric"]: row["value"] for row in figures if row["input"] == kind}
        axes.bar(x, [means[name] for name in names], width=0.25, color=color, alpha=0.45, label=kind)
        for at, name in zip(x, names, strict=True):
            dots = [row for row in rows if row["input"] == kind and row["metric"] == name]
            places = at + (np.linspace(-0.08, 0.08, len(dots)) if len(dots) > 1 else np.zeros(1))
            low, value, high = (np.array([row[key] for row in dots]) for key in ("low", "value", "high"))
            axes.vlines(places, low, high, color=color, linewidth=1.2)
            axes.plot(places, value, "o", color=color, markersize=4)
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel="agreement with the regions (1: the same)")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.text(
        1, -0.12, "bar: mean of slides; dot: a slide, 95% interval", transform=axes.transAxes, ha="right", fontsize=8
    )
    axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1, 1), loc="upper left")
    return figure


def biomarker_figure(figures: Sequence[Row], title: str) -> Figure:
    """Each marker's scores, the mean over the slides."""
    metrics = list(dict.fromkeys(row["metric"] for row in figures))
    genes = list(dict.fromkeys(row["gene"] for row in figures))
    height = max(3.2, 1.4 + 0.26 * len(genes))
    panels = [[m for m in metrics if not m.startswith("AUC")], [m for m in metrics if m.startswith("AUC")]]
    panels = [panel for panel in panels if panel]
    figure, axes = _figure(title, (1.5 + 4.2 * len(panels), height), len(panels), sharey=True)
    for panel, names in zip(axes, panels, strict=True):
        for i, name in enumerate(names):
            rows = [next(r for r in figures if r["gene"] == gene and r["metric"] == name) for gene in genes]
            y = np.arange(len(genes)) + (i - 0.5) * 0.24
            value = np.array([row["value"] for row in rows], float)
            low = np.array([row.get("low", row["value"] - row.get("std", 0)) for row in rows], float)
            high = np.array([row.get("high", row["value"] + row.get("std", 0)) for row in rows], float)
            panel.hlines(y, low, high, color=f"C{i}", alpha=0.5, linewidth=2)
            panel.plot(value, y, "o", color=f"C{i}", markersize=5, label=name)
        of_region = names[0].startswith("AUC")
        panel.axvline(0.5 if of_region else 0, color="black", linewidth=0.8)
        panel.set(xlabel="AUC of the region" if of_region else "correlation, predicted and measured")
        panel.legend(frameon=False, fontsize=8, bbox_to_anchor=(0, 1), loc="lower left", ncols=2)
    axes[0].set_yticks(range(len(genes)), genes, style="italic")
    axes[0].set_ylim(len(genes) - 0.4, -0.6)
    return figure


def marker_roc_figure(
    curves: Mapping[str, tuple[npt.NDArray[np.int64], Mapping[str, npt.NDArray[np.float32]]]],
    rows: Sequence[Row],
    region: str,
) -> Figure:
    """ROC curves of the predicted markers for the region, a panel a slide."""
    from sklearn.metrics import roc_curve

    shown = list(curves.items())[:MOST_MAPS]
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = _figure(f"predicted markers of {region}", (5.6 * columns, 4.4 * lines), columns, rows=lines)
    found = {(r["slide"], r["gene"]): r["value"] for r in rows if r["metric"] == "AUC, predicted"}
    for panel, (slide, (positive, scores)) in zip(axes, shown, strict=False):
        for gene, values in scores.items():
            wrong, right, _ = roc_curve(positive, values)
            panel.plot(wrong, right, label=f"{gene} {found[slide, gene]:.2f}")
        _roc_frame(panel)
        panel.set_title(f"{slide}: {int(positive.sum()):,} of {len(positive):,} spots inside", fontsize=10)
        if len(scores) <= MOST_NAMED:
            panel.legend(
                frameon=False, fontsize=8, title="AUC", title_fontsize=8, bbox_to_anchor=(1, 1), loc="upper left"
            )
    for panel in axes[len(shown) :]:
        panel.set_axis_off()
    return figure


def roc_figure(
    classes: npt.NDArray[np.int64],
    probabilities: npt.NDArray[np.float64],
    labels: Sequence[str],
    figure_of: Row,
    title: str,
) -> Figure:
    """ROC curves of slides left out: of the second label where there are two, else of each against the rest."""
    from sklearn.metrics import roc_auc_score, roc_curve

    figure, (axes,) = _figure(title, (5.6, 5.2), 1)
    for k in range(len(labels)) if len(labels) > 2 else [1]:
        wrong, right, _ = roc_curve(classes == k, probabilities[:, k])
        area = roc_auc_score(classes == k, probabilities[:, k])
        axes.plot(wrong, right, linewidth=2, label=f"{labels[k]} (n = {int((classes == k).sum()):,}): {area:.2f}")
    _roc_frame(axes)
    axes.legend(frameon=False, fontsize=9, title="AUC", title_fontsize=9, loc="lower right")
    axes.set_title(f"AUC {figure_of['value']:.3f} [{figure_of['low']:.3f}, {figure_of['high']:.3f}]", fontsize=10)
    return figure


def _fold_strip(axes: Axes, rows: Sequence[Row], figures: Sequence[Row]) -> None:
    import pandas as pd

    table = pd.DataFrame([row for row in rows if row["protocol"] == "folds"])
    means = {str(name): of.groupby("fold")["pearson"].mean() for name, of in table.groupby("predictor", sort=False)}
    for i, (name, values) in enumerate(means.items()):
        figure = next(
            f for f in figures if f["protocol"] == "folds" and f["metric"] == "Pearson" and f["predictor"] == name
        )
        if np.isfinite(figure["value"]):
            axes.errorbar(i, figure["value"], figure["std"], fmt="D", color=f"C{i}", capsize=6, markersize=6, zorder=3)
        else:
            axes.annotate(
                "undefined:\nconstant", (i, 0), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        axes.plot(
            np.full(len(values), i) + np.linspace(-0.12, 0.12, len(values)), values, "o", color=f"C{i}", alpha=0.5
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(means)), list(means))
    axes.set_xlim(-0.6, len(means) - 0.4)
    axes.set(ylabel="mean Pearson r over the genes")
    folds = len(next(iter(means.values())))
    axes.set_title(f"folds (n = {folds}), mean and std", fontsize=10)


def _figure(
    title: str, size: tuple[float, float], columns: int, rows: int = 1, **options: Any
) -> tuple[Figure, Sequence[Axes]]:
    """A figure with its title, and its panels without frames."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=12, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.set_axisbelow(True)
    return figure, axes


def _maps(title: str, coords: npt.NDArray[Any], panels: int, legend: bool = False) -> tuple[Figure, Sequence[Axes]]:
    """A row of maps, each as high as the slide asks for."""
    span = np.ptp(coords.astype(float), axis=0)
    shape = float(np.clip(span[1] / (span[0] or 1), 0.4, 2.5))
    figure, axes = _figure(title, (3.6 * panels, 3.2 * shape + (2.0 if legend else 0.9)), panels)
    for panel in axes:
        panel.set_axis_off()
        panel.grid(visible=False)
    return figure, axes


def _draw(axes: Axes, coords: npt.NDArray[Any], colors: Any, spots: npt.NDArray[np.int64] | None = None) -> Any:
    """Discs as wide as the usual distance between neighbouring spots."""
    from matplotlib.collections import EllipseCollection

    coords = coords.astype(float)
    width = usual_distance(coords) or float(np.ptp(coords)) / 50 or 1.0
    places = coords if spots is None else coords[spots]
    discs = EllipseCollection(
        width, width, 0, units="xy", offsets=places, offset_transform=axes.transData, linewidths=0, rasterized=True
    )
    if colors is not None:
        discs.set_facecolor(colors)
    axes.add_collection(discs)
    (left, top), (right, bottom) = coords.min(axis=0) - width, coords.max(axis=0) + width
    axes.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", anchor="N")  # y grows downwards
    return discs


def _draw_values(
    figure: Figure,
    axes: Axes,
    coords: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    spots: npt.NDArray[np.int64],
    scale: tuple[float, float],
) -> None:
    discs = _draw(axes, coords, None, spots)
    discs.set(array=values[spots], cmap="magma", clim=(scale[0], max(scale[1], scale[0] + 1e-6)))
    bar = figure.colorbar(discs, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, shrink=0.8, panchor=False)
    bar.set_label("log1p counts", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _draw_labels(axes: Axes, coords: npt.NDArray[Any], labels: npt.NDArray[np.str_], legend: bool) -> None:
    """A colour a label, the most common first; spots without a label are pale."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    names, counts = np.unique(labels[labels != ""], return_counts=True)
    ordered = [str(name) for name in names[np.argsort(-counts, kind="stable")]]
    palette = colormaps["tab10" if len(ordered) <= 10 else "tab20"]
    color = {name: palette(i % palette.N) for i, name in enumerate(ordered)} | {"": PALE}
    _draw(axes, coords, [color[str(label)] for label in labels])
    if not legend:
        return
    shown = [*ordered[:MOST_NAMED], *([""] if (labels == "").any() else [])]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=color[name], label=name or "not marked") for name in shown
    ]
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7, frameon=False, ncols=2,
        handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip


def _roc_frame(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="gray", linestyle="--", linewidth=1)
    axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_aspect("equal")
