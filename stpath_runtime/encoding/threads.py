"""Work spread over threads, which NumPy, SciPy and ONNX Runtime let run side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(work: Callable[[Item], Result], items: Iterable[Item], at_once: int) -> Iterator[Result]:
    """What `work` gives for each item, in their order; up to `at_once` run at once, each on a thread of its own.

    Examples
    --------
    >>> list(each(abs, [-1, 2, -3], at_once=2))
    [1, 2, 3]
    """
    if at_once == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(work, items)  # after an error none begins that has not
