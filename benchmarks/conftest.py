"""What the benchmarks share: a model and engines of the published sizes, timing in turn, and one table at the end.

    pytest benchmarks                                                   all
    pytest benchmarks --quick                                           the key rows, in 7 minutes on 2 cores
    pytest benchmarks --tiny --engine ENGINE --checkpoint CHECKPOINT    that they work, of a small model; no figures

Results go to .benchmarks/: latest.json, which `stpath bench compare` reads, and latest.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import published
import variants
from stpath_runtime import Engine
from stpath_runtime.files import sha256
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.measures.bench.measure import ways_here
from stpath_runtime.measures.bench.results import Results, Row
from stpath_runtime.measures.bench.roofline import Peaks, measure_peaks
from stpath_runtime.measures.bench.tables import markdown, print_table
from stpath_runtime.measures.bench.timing import Call, seconds_of, with_ratios
from stpath_train.checkpoint import load_checkpoint
from stpath_train.model import STPath

ROWS = pytest.StashKey[list[Row]]()
FACTS = pytest.StashKey[dict]()
TINY = 100  # times fewer spots


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the key rows alone")
    parser.addoption("--tiny", action="store_true", help="a hundredth of the spots, one round: no figures")
    parser.addoption("--engine", type=Path, help="of a checkpoint; left out: published sizes, weights from a seed")
    parser.addoption("--checkpoint", type=Path, help="what the engine was exported from")
    parser.addoption("--results", type=Path, default=published.KEPT, help="folder of the results")


def pytest_configure(config):
    config.addinivalue_line("markers", "quick: a key row, measured by --quick too")
    config.stash[ROWS], config.stash[FACTS] = [], {}


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("quick")])
        items[:] = [item for item in items if item.get_closest_marker("quick")]


@pytest.fixture(autouse=True)
def _no_notes_on_approximation():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def rounds(pytestconfig) -> int:
    return 1 if pytestconfig.getoption("--tiny") else 3 if pytestconfig.getoption("--quick") else 5


@pytest.fixture(scope="session")
def size(pytestconfig) -> Callable[[int], int]:
    """A number of spots, as it is or tiny."""
    tiny = pytestconfig.getoption("--tiny")
    return lambda spots: spots // TINY + 40 if tiny else spots


@pytest.fixture(scope="session")
def checkpoint(pytestconfig) -> Path:
    path = pytestconfig.getoption("--checkpoint") or published.checkpoint()
    pytestconfig.stash[FACTS]["checkpoint"] = sha256(path)
    return path


@pytest.fixture(scope="session")
def engine_path(pytestconfig) -> Path:
    path = pytestconfig.getoption("--engine") or published.engine()
    pytestconfig.stash[FACTS]["engine"] = sha256(path / "engine.json")
    return path


@pytest.fixture(scope="session")
def model(checkpoint) -> STPath:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="session")
def engines(engine_path) -> list[Engine]:
    """The engine by each backend and precision that runs it on this CPU; the first is that of the proof."""
    ways = [way for way in ways_here(engine_path) if way.device == "cpu"]
    return [Engine.load(engine_path, backend=way.backend, precision=way.precision) for way in ways]


@pytest.fixture(scope="session")
def panel(engines) -> list[str]:
    """50 genes."""
    return list(engines[0].vocabulary.ensembl_ids[:50])


@pytest.fixture(scope="session")
def peaks(pytestconfig) -> Peaks:
    found = measure_peaks()
    pytestconfig.stash[FACTS]["peaks"] = found.facts()
    return found


@pytest.fixture
def report(request) -> Callable[[list[Row]], None]:
    """Add rows to the results."""
    return request.config.stash[ROWS].extend


@pytest.fixture
def in_turn(benchmark, rounds) -> Callable[[Mapping[Row, Call]], list[Row]]:
    """Time warm calls in turn, A B A B; the first is the base of the ratios, and what pytest-benchmark shows."""

    def run(calls):
        (base, call), *others = calls.items()
        seconds = {row: [] for row in calls}

        def the_others():
            for row, other in others:
                seconds[row].append(seconds_of(other))

        benchmark.pedantic(call, setup=the_others, rounds=rounds)
        seconds[base] = list(benchmark.stats.stats.data)
        rows = with_ratios(seconds)
        benchmark.extra_info["rows"] = [asdict(row) for row in rows]
        return rows

    return run


@pytest.fixture
def compare(in_turn, report, model, engines) -> Callable:
    """Warm calls of a case, hold them to the reference, time them in turn, and report the rows.

    A call that fails, such as for want of memory or a compiler, or is wrong, is a row too, and says why.
    """

    def run(calls: Mapping[Row, Call], case: variants.Case, limit: float | None = None) -> list[Row]:
        exact, name = variants.reference(model, engines[0].vocabulary, case)
        working, failed, errors = {}, [], {}
        for row, call in calls.items():
            try:
                if row.variant == "PyTorch compiled":
                    variants.require_compiler()
                errors[row] = relative_l2(call(), exact)
                variants.require_right(row, errors[row], name)
                working[row] = call
            except Exception as error:
                failed.append(replace(row, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"))
        rows = [
            replace(
                row,
                relative_l2=errors[before],
                parity=name,
                limit=limit if row.backend and row.precision == "fp32" else None,
            )
            for row, before in zip(in_turn(working), working, strict=True)
        ]
        report([*rows, *failed])
        return rows

    return run


def pytest_terminal_summary(config):
    rows, facts = config.stash[ROWS], config.stash[FACTS]
    if not rows:
        return
    how = next((word for word in ("tiny", "quick") if config.getoption(f"--{word}")), "all")
    title = f"benchmarks, {how}: random slides, {torch.get_num_threads()} threads"
    title += " (tiny sizes of a small model: no figures)" if how == "tiny" else ""
    hashes = {name: facts[name] for name in ("engine", "checkpoint") if name in facts}
    results = Results(title, tuple(rows), hashes, facts.get("peaks", {}))
    folder = config.getoption("--results")
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder / "latest.json")
    (folder / "latest.md").write_text(markdown(results), encoding="utf-8")
    console = Console(width=180, highlight=False)
    print_table(results, console)
    console.print(markdown(results), soft_wrap=True, markup=False)
    console.print(f"{folder}/latest.json, latest.md", soft_wrap=True)
