"""Two results, row by row: what became slower, or takes more memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import OptionError, warn
from ...progress import report_console
from .results import Results, Row
from .tables import three_digits


@dataclass(frozen=True)
class Pair:
    """One row of both results."""

    old: Row
    new: Row

    @property
    def seconds(self) -> float | None:
        """How many times as long the new one takes, by the medians."""
        if self.old.median is None or self.new.median is None:
            return None
        return self.new.median / self.old.median

    @property
    def memory(self) -> float | None:
        """How many times as much memory the new one takes."""
        if not self.old.peak_bytes or not self.new.peak_bytes:
            return None
        return self.new.peak_bytes / self.old.peak_bytes

    def regressions(self, ratio: float) -> list[str]:
        """What is worse: beyond the ratio and, for seconds, beyond the spread (all rounds slower than all before)."""
        found = []
        if self.new.failed and not self.old.failed:
            found.append(f"fails: {self.new.failed}")
        if self.seconds is not None and self.seconds > ratio and min(self.new.seconds) > max(self.old.seconds):
            found.append(f"{self.seconds:.2f} times as slow")
        if self.memory is not None and self.memory > ratio:
            found.append(f"{self.memory:.2f} times as much memory")
        return found


def pairs(old: Results, new: Results) -> list[Pair]:
    """The rows that both results have, in the order of the new ones.

    Warns of rows of the old results that the new ones lack.

    Raises
    ------
    OptionError
        If there are none.
    """
    before = {row.identity: row for row in old.rows}
    found = [Pair(before.pop(row.identity), row) for row in new.rows if row.identity in before]
    if not found:
        raise OptionError("the results have no row in common; measure the same spots, genes, attention and backends")
    if before:
        first = next(iter(before.values()))
        name = ", ".join(part for part in (first.what, first.setting, first.by) if part)
        _warn(f"{len(before)} rows of the old results are not in the new ones, the first: {name}")
    return found


def warn_of_differences(old: Results, new: Results) -> None:
    """Warn where the numbers may differ for another reason than the code: machine, libraries, engine."""
    for what, before, after in (
        ("machine", old.machine, new.machine),
        ("versions", old.versions, new.versions),
        ("hashes", old.hashes, new.hashes),
    ):
        if different := _differences(before, after):
            _warn(f"the two results are of different {what}: {different}")


def print_pairs(found: list[Pair], ratio: float) -> int:
    """Print both medians of each pair and their ratio, regressions marked; returns how many rows are regressions."""
    from rich import box
    from rich.table import Table

    console = report_console()
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("what", "on", "by"):
        table.add_column(name)
    for name in ("old, s", "new, s", "times", "memory, times", "relative L2, old", "new", ""):
        table.add_column(name, justify="right")
    count = 0
    for pair in found:
        regressions = pair.regressions(ratio)
        count += bool(regressions)
        mark = f"[red]regression: {'; '.join(regressions)}[/]" if regressions else _doubt(pair, ratio)
        table.add_row(
            *(text.replace("[", r"\[") for text in (pair.new.what, pair.new.setting, pair.new.by)),
            three_digits(pair.old.median),
            three_digits(pair.new.median),
            "" if pair.seconds is None else f"{pair.seconds:.2f}",
            "" if pair.memory is None else f"{pair.memory:.2f}",
            *(
                "" if row.relative_l2 is None else f"{row.relative_l2:.1e}".replace("0.0e+00", "0")
                for row in (pair.old, pair.new)
            ),
            mark,
        )
    console.print(table)
    return count


def _doubt(pair: Pair, ratio: float) -> str:
    """What is no regression, but no proof of none."""
    if pair.old.too_wide or pair.new.too_wide:
        return "spread too wide"
    return "within the spread" if pair.seconds is not None and pair.seconds > ratio else ""


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return "; ".join(f"{name} {before.get(name, 'none')} then, {after.get(name, 'none')} now" for name in names)


def _warn(text: str) -> None:
    warn(text)
