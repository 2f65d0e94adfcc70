"""Threads: how many the CPU is good for, and work spread over them (NumPy, SciPy and ONNX Runtime let others run)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """CPU cores that this process may use; two threads of one core count once, as they share what multiplies."""
    allowed = sorted(os.sched_getaffinity(0))
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    if not all(path.exists() for path in siblings):
        return len(allowed)
    return len({path.read_text() for path in siblings})


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
