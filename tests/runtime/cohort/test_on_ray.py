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

from helpers import write_context, write_slide
from stpath_runtime import Context, Engine, InputError, Slide, read_slide
from stpath_runtime.cli.app import main
from stpath_runtime.cohort import on_ray as distributed
from stpath_runtime.cohort.on_ray import run_on_ray
from stpath_runtime.cohort.pipeline import Job, Settings

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


def ray_jobs(folder: Path, out: Path) -> list[Job]:
    return [Job(f"{folder}/S{i}.h5", f"{out}/S{i}.h5ad") for i in range(10)]


ROOM = {"address": "local", "workers": 2, "cpus": 0.5, "gpus": 0}


def test_a_slide_that_kills_every_worker_fails_alone(cohort, tiny_engine, tmp_path, monkeypatch):
    class Dying(distributed.Worker):
        def __call__(self, batch):
            if any("S3.h5" in job for job in batch["job"]):
                os._exit(1)
            return super().__call__(batch)

    monkeypatch.setattr(distributed, "Worker", Dying)
    found = list(run_on_ray(ray_jobs(cohort, tmp_path), Settings(str(tiny_engine), genes=["GENE1"]), **ROOM))
    assert sorted(Path(outcome.slide).stem for outcome in found) == sorted(f"S{i}" for i in range(10))
    (failed,) = (outcome for outcome in found if outcome.status != "done")
    assert (Path(failed.slide).stem, failed.status) == ("S3", "failed")
    assert "every worker that was given it died" in failed.reason


def test_a_worker_that_cannot_start_is_one_line(cohort, tiny_engine, tmp_path, monkeypatch, capfd):
    class Faulty(distributed.Worker):
        def __init__(self, settings):
            raise InputError(f"{settings['engine']}: not an engine")

    monkeypatch.setattr(distributed, "Worker", Faulty)
    words = ["run", cohort, "--engine", tiny_engine, "--out", tmp_path / "out", "--genes", "GENE1", "--ray", "local"]
    assert main([*map(str, words)]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1, err
    assert "--ray local: no worker could be started (stpath_runtime.errors.InputError: " in err
    assert f"{tiny_engine}: not an engine)" in err


def test_workers_are_given_paths_that_hold_in_any_folder(cohort, tiny_engine, tmp_path, monkeypatch):
    class Elsewhere(distributed.Worker):
        def __init__(self, settings):
            os.chdir("/")
            super().__init__(settings)

    monkeypatch.setattr(distributed, "Worker", Elsewhere)
    monkeypatch.chdir(cohort)
    (cohort / "spots.txt").write_text("0\n1\n")
    write_context(Context(["0", "1"], [[3], [4]], ["GENE7"]), cohort / "counts.h5ad")
    out = os.path.relpath(tmp_path / "out", cohort)
    settings = Settings(os.path.relpath(tiny_engine, cohort), genes=["GENE1"], context_spots="spots.txt")
    (found,) = run_on_ray([Job("S0.h5", f"{out}/S0.h5ad", context="counts.h5ad")], settings, **ROOM)
    assert (found.status, found.slide, found.output) == ("done", "S0.h5", f"{out}/S0.h5ad"), found.reason
    assert anndata.read_h5ad(tmp_path / "out" / "S0.h5ad").obs["context"].sum() == 2


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
