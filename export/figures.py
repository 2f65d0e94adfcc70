"""Pictures of a parity report: a panel or a pair of them for each trace (see `stpath_export.trace`)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .trace import Trace, edges

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {"engine": "tab:blue", "pytorch": "tab:gray"}
LABELS = {"engine": "engine", "pytorch": "PyTorch, same precision"}
BAR_COLOR = "tab:red"
SIZE = 3.6  # inches, the height of a row of panels


def stages_figure(traces: Sequence[Trace], title: str) -> Figure:
    """Relative L2 by stage, the worst of its outputs: the stage's own error, and the accumulated one."""
    figure, panels = _figure(title, -(-len(traces) // 2), min(2, len(traces)), sharey=True)
    for axes, trace in zip(panels.ravel(), traces, strict=False):
        stages = list(dict.fromkeys(row["stage"] for row in trace.rows))
        worst = {
            (who, which): [_worst(trace, stage, who, which) for stage in stages]
            for who in COLORS
            for which in ("own", "accumulated")
        }
        x = np.arange(len(stages))
        for who, color in COLORS.items():
            axes.plot(x, worst[who, "accumulated"], "-", color=color, label=f"{LABELS[who]}: accumulated")
        for i, (who, color) in enumerate(COLORS.items()):  # side by side: they may lie upon each other
            shape = {"marker": "od"[i], "markersize": 7, "linestyle": "none"}
            axes.plot(x + 0.16 * i - 0.08, worst[who, "own"], **shape, color=color, label=f"{LABELS[who]}: own")
        bars = [max(row["own_bar"] for row in trace.rows if row["stage"] == stage) for stage in stages]
        axes.hlines(bars, x - 0.35, x + 0.35, color=BAR_COLOR, linewidth=1.5, label="bar of a stage's own error")
        if (row := trace.enters()) is not None:
            at = stages.index(row["stage"])
            axes.axvspan(at - 0.5, at + 0.5, color=BAR_COLOR, alpha=0.12, linewidth=0, label="the error enters here")
        axes.set_yscale("log")
        axes.set_xticks(x, [stage.replace("_", " ") for stage in stages], rotation=30, ha="right")
        axes.set_xlim(-0.6, len(stages) - 0.4)
        _name(axes, trace)
    for axes in panels[:, 0]:
        axes.set_ylabel("relative L2, the worst of x, k and v")
    for axes in panels.ravel()[len(traces) :]:
        axes.set_axis_off()
    labels: dict[str, Any] = {}
    for axes in panels.ravel():
        labels |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def scatter_figure(traces: Sequence[Trace], title: str) -> Figure:
    """Expression by the engine against the reference, and what both it and PyTorch are off by."""
    figure, panels = _figure(title, len(traces), 2)
    for (both, off), trace in zip(panels, traces, strict=True):
        exact, dots = trace.shown["reference"], {"s": 7, "linewidths": 0, "alpha": 0.5, "zorder": 2}
        both.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=1)
        both.scatter(exact, trace.shown["engine"], color=COLORS["engine"], **dots)
        both.set(xlabel="reference (float64), log1p counts", ylabel="engine, log1p counts")
        for who, color in COLORS.items():
            off.scatter([], [], color=color, label=LABELS[who])
        differences = {who: trace.shown[who] - exact for who in COLORS}
        for who in sorted(COLORS, key=lambda who: -differences[who].std()):  # the narrower is seen on the wider
            off.scatter(exact, differences[who], color=COLORS[who], **dots)
        off.axhline(0, color="black", linewidth=0.8)
        off.set(xlabel="reference (float64), log1p counts", ylabel="difference from the reference")
        off.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
        off.legend(fontsize=8, loc="upper right", edgecolor="none", framealpha=0.9)
        for axes in (both, off):
            _name(axes, trace)
    return figure


def histogram_figure(traces: Sequence[Trace], title: str) -> Figure:
    """How often the expression is off by how much."""
    figure, panels = _figure(title, -(-len(traces) // 2), min(2, len(traces)), sharex=True)
    bins = edges()
    for axes, trace in zip(panels.ravel(), traces, strict=False):
        for who, fill in (("engine", True), ("pytorch", False)):  # the line is seen on the filled one
            look = {"fill": fill, "color": COLORS[who], "alpha": 0.5 if fill else 1, "linewidth": 1.3}
            axes.stairs(trace.histograms[who], bins, **look, label=LABELS[who])
        highest = max(max(counts) for counts in trace.histograms.values())
        axes.set(xscale="log", yscale="log", ylim=(0.7, max(15, 4 * highest)))  # a single value shows
        axes.set(xlabel="absolute error of the expression, log1p counts", ylabel="values, spots times genes")
        axes.legend(frameon=False, fontsize=8, loc="upper left")
        _name(axes, trace)
    seen = np.sum([counts for trace in traces for counts in trace.histograms.values()], axis=0)
    filled = np.flatnonzero(seen)
    panels.ravel()[0].set_xlim(bins[max(0, filled[0] - 1)], bins[min(len(seen), filled[-1] + 2)])
    for axes in panels.ravel()[len(traces) :]:
        axes.set_axis_off()
    return figure


def _worst(trace: Trace, stage: str, who: str, which: str) -> float:
    return float(np.max([row[who][which]["relative_l2"] for row in trace.rows if row["stage"] == stage]))


def _figure(title: str, rows: int, columns: int, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * columns, SIZE * rows + 1), layout="constrained")
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _name(axes: Axes, trace: Trace) -> None:
    axes.set_title("\n".join(textwrap.wrap(trace.name, 60)), fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
