"""Kills a cohort run at random moments, and looks at what it leaves: MANIFEST ENGINE OUT ROUNDS.

The runs are forks of this process, which has imported everything and started no thread: a run takes a fraction of a
second, of which a kill may hit any moment.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import anndata
import h5py
import onnxruntime  # noqa: F401
import pandas as pd  # noqa: F401
from filelock import FileLock  # noqa: F401

from stpath_runtime.cli.app import main
from stpath_runtime.cohort import pipeline  # noqa: F401


def start(words: list[str]) -> int:
    """Run the command in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os._exit(main(words))
    return child


def look(out: Path, expected: int) -> dict[str, int]:
    """Results that are there, each whole, and when they were written."""
    found = {path.name: path.stat().st_mtime_ns for path in out.glob("*.h5ad")}
    for name in found:
        adata = anndata.read_h5ad(out / name)
        assert adata.X.shape == (adata.n_obs, 2), name
        assert (adata.X != 0).all(), name
        with h5py.File(out / name) as file:
            assert file["X"].chunks is not None
    assert len(found) <= expected
    return found


def kill_rounds(manifest: Path, engine_folder: Path, out: Path, rounds: int) -> None:
    """Run and kill, again and again; a folder that is full is emptied."""
    words = ["run", str(manifest), "--engine", str(engine_folder), "--out", str(out), "--genes", "GENE1,GENE7"]
    slides = len(manifest.read_text().splitlines()) - 1
    begin = time.perf_counter()
    assert os.waitstatus_to_exitcode(os.waitpid(start(words), 0)[1]) == 0
    whole_run = time.perf_counter() - begin
    assert len(look(out, slides)) == slides
    shutil.rmtree(out)
    rng, before, kills, seen = random.Random(0), {}, 0, set()
    while kills < rounds:
        child = start(words)
        time.sleep(rng.uniform(0.2, 1.0) * whole_run)
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        found = look(out, slides) if out.exists() else {}
        assert {name: found.get(name) for name in before} == before, "a whole result was lost or written twice"
        before = found
        seen.add(len(found))
        if len(found) == slides:
            shutil.rmtree(out)
            before = {}
    assert os.waitstatus_to_exitcode(os.waitpid(start(words), 0)[1]) == 0
    found = look(out, slides)
    assert len(found) == slides
    assert {name: found[name] for name in before} == before
    assert not list(out.glob(".*.partial"))
    print(f"{kills} kills, after which {sorted(seen)} of {slides} results were whole")  # noqa: T201


if __name__ == "__main__":
    kill_rounds(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
