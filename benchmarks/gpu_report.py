"""What `gpu.py` finds: rows, their tables, and the files that it writes as it goes."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stpath_runtime.files import written_whole

TIMES = ("median, ms", "spread", "of peak", "first, ms")
COLUMNS = ("variant", "features", "precision", *TIMES, "peak, GB", "relative L2")


@dataclass
class Row:
    """One variant at one number of spots."""

    variant: str
    attention: str  # global or knn; of a tile encoder empty
    precision: str
    spots: int  # or tiles
    features: str = "host"  # where a call finds them: host or device
    context: int = 0  # spots with measured expression
    relative_l2: float | None = None  # of the expression, against float64; None: no reference of that size
    first: float | None = None  # milliseconds of the first call, with all that it compiles and loads
    milliseconds: list[float] = field(default_factory=list)
    operations: float = 0.0  # that a call needs at least
    peak_bytes: int | None = None  # of the device: what a call of PyTorch allocates, or a process of an engine takes
    failed: str = ""

    @property
    def median(self) -> float | None:
        """Milliseconds of a call."""
        return statistics.median(self.milliseconds) if self.milliseconds else None


def print_rows(report: dict[str, Any], rows: list[Row]) -> None:
    """Print the rows of one slide as a table."""
    first = rows[0]
    what = f"{first.spots:,} spots, {first.attention}" if first.attention else f"{first.spots} tiles"
    table = Table(title=what + (f" {report['neighbors']}" if first.attention == "knn" else ""))
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right")
    for row in rows:
        names = (row.variant, row.features, row.precision)
        error = "-" if row.relative_l2 is None else f"{row.relative_l2:.1e}"
        if row.failed:
            table.add_row(*names, row.failed)
            continue
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        times = ("-", "-", "-")
        if row.median is not None:
            spread = f"{min(row.milliseconds):.1f} to {max(row.milliseconds):.1f}"
            share = row.operations / (row.median * 1e-3) / report["peaks"][row.precision]
            times = (f"{row.median:.1f}", spread, f"{share:.0%}")
        table.add_row(*names, *times, f"{row.first or 0:.0f}", memory, error)
    Console(width=None if Console().is_terminal else 160).print(table)


def write_report(report: dict[str, Any], rows: list[Row], out: Path) -> tuple[Path, Path]:
    """Write all that was found so far, JSON and PNG, named by the device; returns their paths."""
    name = ("dry-run-" if report["dry_run"] else "") + "-".join(report["device"].lower().split())
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / f"{name}.json") as partial:
        table = [{**asdict(row), "median": row.median} for row in rows]
        partial.write_text(json.dumps({**report, "rows": table}, indent=1) + "\n")
    with written_whole(out / f"{name}.png") as partial:
        _plot(report, rows, partial)
    return out / f"{name}.json", out / f"{name}.png"


def _plot(report: dict[str, Any], rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    title = f"{report['device']}: {report['genes']} genes, features on the host, random weights and features"
    figure.suptitle(("Dry run, no GPU. " if report["dry_run"] else "") + title)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys((row.variant, row.precision) for row in rows if row.attention))
    for axes, attention in zip(panels, ("global", "knn"), strict=True):
        for variant, precision in names:
            points = [
                (row.spots, row.median)
                for row in rows
                if (row.variant, row.precision, row.attention) == (variant, precision, attention)
                and row.features == "host"
                and row.milliseconds
            ]
            if points:
                style = "o-" if precision == "fp32" else "s--"
                color = f"C{[v for v, _ in names].index(variant)}"
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{variant}, {precision}")
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="spots",
            title=attention + (f" {report['neighbors']}" if attention == "knn" else ""),
        )
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("milliseconds a slide")
    figure.savefig(path, format="png", dpi=130)
