"""Progress of a cohort: a line for each slide that ends, and bars on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..progress import terminal_bars
from .pipeline import Outcome


class CohortProgress:
    """Shows the slides of a cohort as they end: a line each in a pipe, bars on a terminal."""

    def __init__(self, total: int, bars: Any) -> None:
        self.total, self.bars = total, bars
        self.ended = self.spots = 0
        self.start = time.perf_counter()
        self.tasks: dict[str, Any] = {}
        self.overall = bars.add_task(f"{total:,} slides", total=total) if bars is not None else None

    def __call__(self, outcome: Outcome) -> None:
        """Show the outcome of a slide."""
        self.ended += 1
        self.spots += outcome.spots
        said = {
            "done": f"{outcome.spots:,} spot{'' if outcome.spots == 1 else 's'}, {outcome.seconds:.1f} s",
            "skipped": "whole already",
            "failed": f"failed[{outcome.code}]: {outcome.reason}",
        }
        line = f"{self.ended}/{self.total} {outcome.slide}: {said[outcome.status]}"
        for text in (line, *(f"warning: {outcome.slide}: {warning}" for warning in outcome.warnings)):
            self._print(text)
        if self.bars is not None:
            rate = f", {self.spots / self.seconds():,.0f} spots/s" if self.spots else ""
            self.bars.update(self.overall, completed=self.ended, description=f"{self.total:,} slides{rate}")

    def watch(self, what: str, done: int, total: int) -> None:
        """Show the progress of a slide; may be called from any thread."""
        if self.bars is None:
            return
        task = self.tasks.get(what)
        if task is None:
            task = self.tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(task, completed=done, total=total)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(what))

    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def _print(self, line: str) -> None:
        if self.bars is not None:
            self.bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def cohort_progress(total: int) -> Iterator[CohortProgress]:
    """Progress of a cohort of so many slides."""
    with terminal_bars() as bars:
        yield CohortProgress(total, bars)
