"""How long until the first result: imports, a cold load, first and warm calls, apart; and what is installed."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, distribution

import pytest
from packaging.requirements import Requirement

from stpath_runtime.measures.bench.alone import Task, run_alone
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import seconds_of
from stpath_runtime.slides.slide import random_slide
from variants import Case, by_engines

pytestmark = pytest.mark.quick
SPOTS = 500
STARTS = {
    "import stpath_runtime": ["-c", "import stpath_runtime"],
    "stpath --help": ["-m", "stpath_runtime", "--help"],
}


def test_installed(report):
    """What `pip install 'stpath-engine[cpu]'` puts on the disk, by the files that pip noted; the largest are named."""
    sizes = {each.name: size_of(each) for each in installed_with("stpath-engine", "cpu")}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:4]
    named = ", ".join(f"{name} {sizes[name] / 1e6:.0f}" for name in largest)
    note = f"{sum(sizes.values()) / 1e6:.0f} MB in {len(sizes)} packages: {named}"
    report([Row("installed, stpath-engine[cpu]", "pip", precision="", note=note)])


def installed_with(package: str, extra: str) -> list[Distribution]:
    """A package that is installed here with an extra, and all that it needs."""
    found, waiting = {}, [(package, extra)]
    for name, asked in waiting:  # which grows on the way
        here = distribution(name)
        found[here.name] = here
        for needed in map(Requirement, here.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": asked}):
                waiting += [pair for each in ("", *needed.extras) if (pair := (needed.name, each)) not in waiting]
    return list(found.values())


def size_of(package: Distribution) -> int:
    """Bytes of its files."""
    files = (each.locate() for each in package.files or ())
    return sum(path.stat().st_size for path in files if path.is_file())


@pytest.mark.parametrize("what", STARTS)
def test_import(report, rounds, what):
    """A process from its start to its end."""

    def start():
        subprocess.run([sys.executable, *STARTS[what]], capture_output=True, check=True)

    start()  # what is compiled to bytecode is there
    report([Row(what, "process", precision="", seconds=tuple(seconds_of(start) for _ in range(rounds)))])


def test_load_and_first_call(report, rounds, engine_path, engines, size):
    """Fresh processes, those of each backend in turn; the files are in the page cache, OpenVINO's graphs in its own."""
    loads, calls = ({engine: [] for engine in engines} for _ in range(2))
    for _ in range(rounds):
        for engine in engines:
            name, precision = engine.backend.name, engine.precision
            found = run_alone(Task(str(engine_path), size(SPOTS), 50, "global", None, name, precision=precision))
            loads[engine].append(found.load)
            calls[engine].append(found.encode + found.decode)
    for what, seconds in {"load": loads, "first call": calls}.items():
        for engine, found in seconds.items():
            sizes = {"attention": "global", "spots": size(SPOTS), "genes": 50} if what == "first call" else {}
            by = {"backend": engine.backend.name, "precision": engine.precision}
            report([Row(what, **by, **sizes, seconds=tuple(found))])


def test_warm_call(compare, engines, panel, size):
    case = Case(random_slide(size(SPOTS), engines[0].manifest.model.n_features, 0), "global", 0, panel)
    compare(by_engines("warm call", engines, case), case)
