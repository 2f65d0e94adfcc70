"""Progress on a terminal, in a notebook, or in a log."""

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
def tile_bars(slides: int) -> Iterator[Callable[[Any, int, int], None] | None]:
    """Bars of the tiles of a slide and, of several, of all slides, with tiles a second; None in a pipe.

    What it gives is called with a job, which has a source, and the number of its tiles done, and in all.
    """
    with terminal_bars("tiles") as bars:
        if bars is None:
            yield None
            return
        tasks: dict[Any, Any] = {}
        whole = bars.add_task(f"{slides} slides", total=None) if slides > 1 else None
        seen: dict[Any, tuple[int, int]] = {}

        def tell(job: Any, done: int, total: int) -> None:
            if job not in tasks:
                tasks[job] = bars.add_task(job.source.name, total=total)
            bars.update(tasks[job], completed=done, total=total)
            seen[job] = (done, total)
            if whole is not None:
                # Slides that are not opened yet are taken to have as many tiles as the others on average.
                known = sum(total for _, total in seen.values())
                bars.update(whole, completed=sum(done for done, _ in seen.values()), total=known * slides / len(seen))

        yield tell


@contextmanager
def terminal_bars(unit: str = "") -> Iterator[Any]:
    """Bars of rich on a terminal, or as a notebook's widget, with a speed where a unit is given; None in a pipe."""
    from importlib.util import find_spec

    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        """Steps a second."""

        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.1f} {unit}/s")

    console = Console(stderr=True)
    if not console.is_terminal and not (console.is_jupyter and find_spec("ipywidgets")):
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        *([Speed()] if unit else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield bars
