"""Results as a table on a terminal, and the same as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...progress import report_console
from .results import WIDE, Results, Row, describe

if TYPE_CHECKING:
    from rich.console import Console

TEXTS = 3  # columns of text, before those of numbers


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and their cells, as text; columns that would be empty are left out."""
    against = {row.parity for row in rows if row.parity}
    parity = f"relative L2 to {against.copy().pop()}" if len(against) == 1 else "relative L2"
    names = [
        "what",
        "on",
        "by",
        "seconds",
        "spread",
        "times the base",
        "tiles/s",
        "peak, GB",
        parity,
        "of the roofline",
    ]
    cells = [
        [
            row.what,
            row.setting,
            row.by,
            row.failed or three_digits(row.median),
            "" if row.spread is None else f"{row.spread:.0%}" + (", too wide" if row.too_wide else ""),
            _ratios(row),
            f"{row.tiles / row.median:.3g}" if row.tiles and row.median else "",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
            ""
            if row.relative_l2 is None
            else f"{row.relative_l2:.1e}".replace("0.0e+00", "0") + (f" to {row.parity}" * (len(against) > 1)),
            "" if row.roofline is None else f"{row.roofline:.0%}" if row.roofline <= 1 else "peak too low",
        ]
        for row in rows
    ]
    for row, line in zip(rows, cells, strict=True):
        line[0] += f" ({row.note})" if row.note else ""
    kept = [i for i in range(len(names)) if any(line[i] for line in cells)]
    return [names[i] for i in kept], [[line[i] for i in kept] for line in cells]


def print_table(results: Results, console: Console | None = None) -> None:
    """Print the table, the machine above and how to read it below."""
    from rich import box
    from rich.table import Table

    console = console or report_console()
    table = Table(title=results.title, box=box.SIMPLE_HEAD)
    names, cells = columns(results.rows)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < TEXTS else "right")
    for i, line in enumerate(cells):
        last = i + 1 == len(cells) or line[:2] != cells[i + 1][:2]
        table.add_row(*(cell.replace("[", r"\[") for cell in line), end_section=last)
    console.print(describe(results), soft_wrap=True)
    console.print(table)
    for note in notes(results):
        console.print(note, soft_wrap=True)


def markdown(results: Results) -> str:
    """The same as Markdown."""
    names, cells = columns(results.rows)
    lines = [f"**{results.title}.** {describe(results)}", ""]
    lines += ["| " + " | ".join(names) + " |", "| " + " | ".join("---" for _ in names) + " |"]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in cells]
    return "\n".join([*lines, "", *(f"{note}  " for note in notes(results))]) + "\n"


def notes(results: Results) -> list[str]:
    """How to read the table, as far as it has such columns."""
    rows = results.rows
    found = ["Seconds: median of the rounds, which ran in turn (A B A B). Spread: (most - least) / median."]
    if any(row.ratios for row in rows):
        found.append(
            "Times the base: seconds over those of the base in the same round: median (least to most). The base is the "
            "first of the rows that ran in turn."
        )
    if any(row.peak_bytes is not None for row in rows):
        found.append("Peak: memory of a fresh process that does nothing else, the slide's features in it.")
    if results.peaks and any(row.limit is not None for row in rows):
        gflops, gbytes, by = (results.peaks.get(name) for name in ("gflops", "gbytes", "by"))
        found.append(f"Roofline, float32: {gflops:.0f} GFLOP/s and {gbytes:.1f} GB/s here, measured by {by}.")
    if beyond := sum((row.roofline or 0) > 1 for row in rows):
        found.append(
            f"Peak too low, in {beyond} of {len(rows)} rows: they were faster than the products it was measured by, "
            "as where something else ran beside those; measure again."
        )
    if wide := sum(row.too_wide for row in rows):
        found.append(
            f"Spread too wide, above {WIDE:.0%}, in {wide} of {len(rows)} rows: something else ran; measure them again."
        )
    return found


def three_digits(seconds: float | None) -> str:
    """Seconds to three digits, without an exponent."""
    if seconds is None:
        return ""
    return np.format_float_positional(seconds, 3, unique=False, fractional=False, trim="-")


def _ratios(row: Row) -> str:
    if not row.ratios:
        return ""
    middle, least, most = (f(row.ratios) for f in (statistics.median, min, max))
    return f"{three_digits(middle)} ({three_digits(least)} to {three_digits(most)})"
