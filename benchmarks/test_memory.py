"""How much memory a prediction takes: the peak of a fresh process that does nothing else, its slide in it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stpath_runtime.errors import BackendError
from stpath_runtime.machine import parse_bytes
from stpath_runtime.measures.bench.alone import Task, run_alone
from stpath_runtime.measures.bench.results import Row
from torch_alone import run_torch_alone

K = 32
TORCH = {"global": ("PyTorch eager", "literal formula"), "knn": ("PyTorch eager", "PyTorch Geometric")}


def quick(*values):
    return pytest.param(*values, marks=pytest.mark.quick)


@pytest.mark.parametrize(
    ("attention", "k", "spots"),
    [quick("global", 0, 3_000), ("global", 0, 5_000), ("global", 0, 20_000), ("knn", K, 5_000), ("knn", K, 20_000)],
)
def test_by_spots(report, engine_path, checkpoint, engines, size, pytestconfig, attention, k, spots):
    row = Row("peak memory", attention=attention, neighbors=k, spots=size(spots), genes=50)
    for engine in engines:
        name, precision = engine.backend.name, engine.precision
        found = run_alone(Task(str(engine_path), size(spots), 50, attention, k or None, name, precision=precision))
        seconds = (found.encode + found.decode,)
        report([replace(row, backend=name, precision=precision, seconds=seconds, peak_bytes=found.peak)])
    for variant in () if pytestconfig.getoption("--quick") else TORCH[attention]:
        if variant == "literal formula" and spots > 5_000:  # 6 GB there, and it grows with the square
            continue
        seconds, peak = run_torch_alone(checkpoint, engine_path, variant, size(spots), k)
        report([replace(row, variant=variant, seconds=(seconds,), peak_bytes=peak)])


BUDGETS = [
    quick("global", 0, 3_000, "200M"),
    ("global", 0, 10_000, "200M"),
    ("global", 0, 10_000, "1G"),
    quick("knn", K, 10_000, "200M"),
    ("knn", K, 100_000, "1500M"),
    ("knn", K, 100_000, "3G"),
    ("knn", K, 1_000_000, "14G"),
]


@pytest.mark.parametrize(("attention", "k", "spots", "memory"), BUDGETS)
def test_the_budget_is_kept(report, engine_path, engines, size, attention, k, spots, memory):
    """What a slide takes beyond its features and beyond a process that runs 64 spots is at most `--memory`.

    A backend that says that it needs more, before it begins, keeps to it, too: the row says how much.
    """
    budget, few = parse_bytes(memory), 64
    for engine in engines if spots <= 10_000 else engines[:1]:
        name, precision = engine.backend.name, engine.precision
        task = Task(str(engine_path), few, 50, attention, k or None, name, precision=precision, dtype="float16")
        row = Row("memory budget", backend=name, precision=precision, attention=attention, neighbors=k)
        row = replace(row, spots=size(spots), genes=50, note=f"--memory {memory}")
        base = run_alone(task)
        try:
            found = run_alone(replace(task, spots=size(spots), memory=budget))
        except BackendError as error:
            if "the least that works is" not in str(error):
                raise
            report([replace(row, failed=str(error))])
            continue
        taken = (found.peak - found.features) - (base.peak - base.features)
        note = f"{row.note}: {taken / budget:.0%} of it taken"
        report([replace(row, seconds=(found.encode + found.decode,), peak_bytes=found.peak, note=note)])
        assert taken <= budget, note


def test_a_million_spots(report, engine_path, size):
    """kNN, features in float16 (3.1 GB), `--memory 12G`."""
    spots = size(1_000_000)
    found = run_alone(Task(str(engine_path), spots, 50, "knn", K, dtype="float16", memory=parse_bytes("12G")))
    row = Row("peak memory", backend="onnxruntime", attention="knn", neighbors=K, spots=spots, genes=50)
    report([replace(row, seconds=(found.encode + found.decode,), peak_bytes=found.peak, note="--memory 12G")])
