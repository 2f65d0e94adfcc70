"""Progress on a terminal, or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OnTile = Callable[[int, int], None]  # done, and to do in all


def report_console() -> Any:
    """A console of rich for tables: as wide as the terminal, or 200 columns in a pipe or file."""
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 200, highlight=False)


@contextmanager
def progress_bar(name: str) -> Iterator[OnTile | None]:
    """A progress bar on a terminal; None, and no output, in a pipe."""
    with terminal_bars() as bars:
        if bars is None:
            yield None
            return
        task = bars.add_task(name, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def terminal_bars() -> Iterator[Any]:
    """Progress bars of rich on a terminal; None in a pipe."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield bars
