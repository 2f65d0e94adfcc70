"""What the machine has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stpath_runtime.machine import cores


@pytest.mark.parametrize(
    ("siblings", "count"),
    [
        (["0,2", "1,3", "0,2", "1,3"], 2),  # two threads a core
        (["0", "1", "2", "3"], 4),
        ([None, None, None, None], 4),  # no word of it, as in some containers
    ],
)
def test_threads_of_one_core_count_once(monkeypatch, siblings, count):
    told = {
        f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": text for cpu, text in enumerate(siblings)
    }
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(siblings))))
    monkeypatch.setattr(Path, "exists", lambda path: told[str(path)] is not None)
    monkeypatch.setattr(Path, "read_text", lambda path: told[str(path)])
    assert cores() == count
