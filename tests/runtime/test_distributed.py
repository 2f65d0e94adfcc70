"""Cohorts on Ray: the same results, and workers that die."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest

from helpers import write_slide
from stpath_runtime import Engine, Slide, read_slide
from stpath_runtime.cli import main

SLIDES = 24


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for i in range(SLIDES):
        spots = 200 + 10 * i
        slide = Slide(rng.integers(0, 9000, (spots, 2)), rng.standard_normal((spots, 96), np.float32))
        write_slide(slide, folder / f"S{i}.h5")
    (folder / "bad.h5").write_text("no slide")
    return folder


def ray_workers() -> list[int]:
    """Process ids of Ray's workers that hold an engine."""
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in found.splitlines() if "ray::MapWorker" in line]


def test_every_slide_is_there_though_a_worker_is_killed(cohort, tiny_engine, tmp_path):
    out = tmp_path / "out"
    words = ["run", cohort, "--engine", tiny_engine, "--out", out, "--genes", "GENE1,GENE2", "--ray", "local"]
    words += ["--workers", 2, "--cpus", 0.5]
    started = subprocess.Popen(
        [sys.executable, "-m", "stpath_runtime", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    killed: list[int] = []
    until = time.monotonic() + 120
    while not killed and started.poll() is None and time.monotonic() < until:
        if len(list(out.glob("*.h5ad"))) >= 2 and (workers := ray_workers()):
            os.kill(workers[0], signal.SIGKILL)
            killed = workers[:1]
        time.sleep(0.01)
    printed, err = started.communicate(timeout=200)
    assert killed, err
    assert started.returncode == 1, err
    assert "1 failed" in printed, printed
    with (out / "summary.csv").open(newline="") as file:
        rows = {Path(row["slide"]).stem: row for row in csv.DictReader(file)}
    assert len(rows) == SLIDES + 1
    assert {name for name, row in rows.items() if row["status"] == "failed"} == {"bad"}
    engine = Engine.load(tiny_engine)
    for i in (0, 11, SLIDES - 1):
        expected = engine.predict(read_slide(cohort / f"S{i}.h5"), genes=["GENE1", "GENE2"])
        np.testing.assert_allclose(anndata.read_h5ad(out / f"S{i}.h5ad").X, expected.X, rtol=1e-4, atol=1e-5)
    assert len(list(out.glob("*.h5ad"))) == SLIDES
    assert not list(out.glob(".*.partial"))


def test_faulty_calls(cohort, tiny_engine, tmp_path, capsys):
    words = ["run", cohort, "--engine", tiny_engine, "--out", tmp_path / "out", "--genes", "GENE1"]
    for more, message in (
        (["--ray", "local", "--workers", 99], "99 engines of 1 CPUs need 99"),
        (["--ray", "local", "--gpus", 1], "1 engines of 1 GPUs need 1, the cluster has 0"),
        (["--ray", "127.0.0.1:1"], "--ray 127.0.0.1:1: no cluster there"),
    ):
        assert main([*map(str, [*words, *more])]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert message in err
    assert not list((tmp_path / "out").glob("*.h5ad"))
