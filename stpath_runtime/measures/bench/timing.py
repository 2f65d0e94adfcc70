"""How things are timed: in turn, A B A B, so that what slows the machine for a while slows all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from time import perf_counter

from .results import Row

Call = Callable[[], object]


def seconds_of(call: Call) -> float:
    """Seconds of one call."""
    start = perf_counter()
    call()
    return perf_counter() - start


def in_turn(calls: Mapping[Row, Call], rounds: int, on_call: Callable[[Row], None] | None = None) -> list[Row]:
    """Time calls in turn; the caller has warmed them. The first is the base of the ratios.

    Parameters
    ----------
    on_call
        Called with the row after each call.

    Returns
    -------
    The rows with the seconds of each round and, but for the base, their ratios to it, pair by pair.
    """
    seconds: dict[Row, list[float]] = {row: [] for row in calls}
    for _ in range(rounds):
        for row, call in calls.items():
            seconds[row].append(seconds_of(call))
            if on_call is not None:
                on_call(row)
    return with_ratios(seconds)


def with_ratios(seconds: Mapping[Row, list[float]]) -> list[Row]:
    """The rows with their seconds and, but for the first, with their ratios to it in the same round."""
    base = next(iter(seconds.values()), [])
    return [
        replace(
            row,
            seconds=tuple(found),
            ratios=() if found is base else tuple(a / b for a, b in zip(found, base, strict=True)),
        )
        for row, found in seconds.items()
    ]
