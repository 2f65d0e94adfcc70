"""Pictures of what `stpath bench` measured: latency with the machine's roofline, and memory, against spots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import written_whole
from .results import Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOTS_PER_INCH = 130
STYLES = {"fp32": "o-", "fp16": "^-.", "bf16": "s--"}


def plot_latency(results: Results, path: Path) -> None:
    """Draw the seconds of the encoder against spots, log axes, a panel a way to attend, and write them as PNG."""
    gflops, gbytes, by = (results.peaks[name] for name in ("gflops", "gbytes", "by"))
    _draw(
        results,
        "encode",
        lambda row: row.median,
        "encoder, seconds a slide",
        f"Roofline: what the float32 matrix peak, {gflops:.0f} GFLOP/s, and {gbytes:.1f} GB/s of copies would allow "
        f"here (by {by}).\nA lower precision has a higher peak, and may pass below. "
        "Points: median of the rounds; bars: least to most.",
        path,
    )


def plot_memory(results: Results, path: Path) -> None:
    """Draw the peak memory of fresh processes against spots, log axes, and write it as PNG."""
    _draw(
        results,
        "first call",
        lambda row: row.peak_bytes / 1e9 if row.peak_bytes is not None else None,
        "peak memory of a process, GB",
        "Each is a fresh process that loads the engine and predicts one slide, whose features are in it.",
        path,
    )


def _draw(results: Results, what: str, value: Callable[[Row], float | None], label: str, note: str, path: Path) -> None:
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if row.what == what and value(row) is not None]
    attentions = sorted({(row.attention, row.neighbors) for row in rows})
    names = list(dict.fromkeys((row.backend, row.device) for row in rows))
    figure = Figure(figsize=(5.6 * len(attentions) + 0.6, 5.2), layout="constrained")
    facts = results.machine
    figure.suptitle(f"{results.title}\n{facts['cores']} cores of {facts['cpu']}", fontsize=11)
    panels = figure.subplots(1, len(attentions), sharey=True, squeeze=False)[0]
    for axes, (attention, neighbors) in zip(panels, attentions, strict=True):
        here = [row for row in rows if (row.attention, row.neighbors) == (attention, neighbors)]
        for by in dict.fromkeys(row.by for row in here):
            line = sorted((row for row in here if row.by == by), key=lambda row: row.spots)
            _line(axes, line, value, f"C{names.index((line[0].backend, line[0].device))}")
        limits = sorted({(row.spots, row.limit) for row in here if row.limit is not None})
        if limits and what == "encode":
            axes.plot(*zip(*limits, strict=True), ":", color="black", label="roofline, fp32")
        _scale(axes, sorted({row.spots for row in here}))
        axes.set(xlabel="spots", title=f"{attention} {neighbors}" if neighbors else attention)
        axes.legend(frameon=False, fontsize=9)
    panels[0].set_ylabel(label)
    figure.supxlabel(note, fontsize=8, color="dimgray")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, format="png", facecolor="white")


def _line(axes: Axes, rows: Sequence[Row], value: Callable[[Row], float | None], color: str) -> None:
    x, y = [row.spots for row in rows], [value(row) or 0.0 for row in rows]
    bars: Any = None
    if all(len(row.seconds) > 1 for row in rows):
        bars = [[m - min(row.seconds) for m, row in zip(y, rows, strict=True)]]
        bars += [[max(row.seconds) - m for m, row in zip(y, rows, strict=True)]]
    name = rows[0].by.removeprefix(f"{rows[0].variant}, ")
    axes.errorbar(x, y, bars, fmt=STYLES[rows[0].precision], color=color, markersize=5, capsize=3, label=name)


def _scale(axes: Axes, spots: Sequence[int]) -> None:
    """Log axes with plain numbers, and a tick a number of spots."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(xscale="log", yscale="log")
    axes.set_xticks(spots, [f"{n:,}" for n in spots])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, which="both")
