"""Cohorts: what a run takes, writes, skips and survives."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import anndata
import numpy as np
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from helpers import without_coverage, write_context, write_slide
from stpath_runtime import Context, Engine, InputError, Slide
from stpath_runtime.cli.app import main
from stpath_runtime.cohort import pipeline
from stpath_runtime.cohort.pipeline import Settings, run_jobs
from stpath_runtime.cohort.progress import CohortProgress
from stpath_runtime.cohort.run import LOCK, read_cohort, run_cohort
from stpath_runtime.errors import InputWarning
from stpath_runtime.results.output import Format
from stpath_runtime.results.targets import slide_name

SIZES = (61, 300, 1500, 1, 90)


@pytest.fixture(scope="module")
def engine(tiny_engine) -> Engine:
    return Engine.load(tiny_engine)


def a_slide(spots: int, seed: int) -> Slide:
    rng = np.random.default_rng(seed)
    barcodes = [f"spot{i}" for i in range(spots)]
    return Slide(rng.integers(0, 9000, (spots, 2)), rng.standard_normal((spots, 96), np.float32), barcodes)


@pytest.fixture
def cohort(tmp_path) -> Path:
    """A folder of slides S0, S1, ... and a manifest of them."""
    folder = tmp_path / "cohort"
    folder.mkdir()
    lines = ["slide,organ,technology,context"]
    for i, spots in enumerate(SIZES):
        write_slide(a_slide(spots, i), folder / f"S{i}.h5")
        lines.append(f"S{i}.h5,{'Brain' if i % 2 else ''},visium,{'counts.h5ad' if i == 1 else ''}")
    write_context(Context(["spot5", "spot6"], [[3], [4]], ["GENE7"]), folder / "counts.h5ad")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def run(cohort, tiny_engine, tmp_path, capsys):
    """Run the cohort: exit code, standard output, standard error."""

    def call(*more: object, source: object = cohort / "manifest.csv") -> tuple[int, str, str]:
        words = ["run", source, "--engine", tiny_engine, "--out", tmp_path / "out", "--genes", "GENE1,GENE7", *more]
        code = main([str(word) for word in words])
        return (code, *capsys.readouterr())

    return call


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_slide_gets_what_predict_gives(run, engine, tmp_path):
    code, out, err = run()
    assert code == 0, err
    assert f"{len(SIZES)} done ({sum(SIZES):,} spots" in out
    assert err.count("\n") == len(SIZES)
    for i, spots in enumerate(SIZES):
        found = anndata.read_h5ad(tmp_path / "out" / f"S{i}.h5ad")
        slide = dataclasses.replace(a_slide(spots, i), organ="Brain" if i % 2 else None, technology="Visium")
        context = Context(["spot5", "spot6"], [[3], [4]], ["GENE7"]) if i == 1 else None
        expected = engine.predict(slide, genes=["GENE1", "GENE7"], context=context)
        np.testing.assert_allclose(found.X, expected.X, rtol=1e-4, atol=1e-5)
        assert list(found.obs_names) == slide.barcodes
        assert {**found.uns["stpath"], "run": ""} == {**expected.uns["stpath"], "run": ""}
    summary = rows(tmp_path / "out" / "summary.csv")
    assert [row["status"] for row in summary] == ["done"] * len(SIZES)
    assert [int(row["spots"]) for row in summary] == list(SIZES)
    assert not (tmp_path / "out" / "failures.csv").exists()


def test_small_slides_run_in_one_call(run, monkeypatch):
    calls = []
    predict = Engine.predict_many
    monkeypatch.setattr(
        Engine,
        "predict_many",
        lambda self, slides, *a, **k: calls.append(len(slides)) or predict(self, slides, *a, **k),
    )
    assert run()[0] == 0
    assert calls == [2, 1, 2]  # 61 + 300, 1500, 1 + 90


def test_what_is_whole_and_of_the_same_settings_is_skipped(run, cohort, tmp_path):
    def ran(*more: object) -> list[str]:
        code, _, err = run(*more)
        assert code == 0, err
        return [Path(row["slide"]).stem for row in rows(tmp_path / "out" / "summary.csv") if row["status"] == "done"]

    everything = [f"S{i}" for i in range(len(SIZES))]
    assert ran() == everything
    assert ran() == []
    assert ran("--memory", "300M") == []  # changes no result
    assert ran("--no-resume") == everything
    assert ran("--fill-context") == everything
    assert ran("--fill-context") == []
    assert ran() == everything
    write_slide(a_slide(99, 7), cohort / "S3.h5")
    assert ran() == ["S3"]
    write_context(Context(["spot5"], [[9]], ["GENE7"]), cohort / "counts.h5ad")
    assert ran() == ["S1"]
    (tmp_path / "out" / "S4.h5ad").unlink()
    assert ran() == ["S4"]
    whole = (tmp_path / "out" / "S0.h5ad").read_bytes()
    (tmp_path / "out" / "S0.h5ad").write_bytes(whole[: len(whole) // 2])
    code, _, err = run()  # what stpath cannot tell to be its own is not overwritten
    assert code == 1
    assert "S0.h5ad exists and is not a prediction by stpath" in err


def test_a_long_list_of_context_spots_and_what_a_file_of_them_says_counts(run, cohort, tmp_path):
    write_context(Context([f"spot{i}" for i in range(300)], np.ones((300, 1)), ["GENE7"]), cohort / "counts.h5ad")
    assert run("--context-spots", ",".join(f"spot{i}" for i in range(100)))[0] == 0
    assert anndata.read_h5ad(tmp_path / "out" / "S1.h5ad").obs["context"].sum() == 100
    (tmp_path / "spots.txt").write_text("spot1\nspot2\n")
    assert run("--context-spots", tmp_path / "spots.txt")[0] == 0
    (tmp_path / "spots.txt").write_text("spot1\n")
    assert run("--context-spots", tmp_path / "spots.txt")[0] == 0
    assert anndata.read_h5ad(tmp_path / "out" / "S1.h5ad").obs["context"].sum() == 1


def test_the_summary_keeps_what_it_said_of_slides_that_are_skipped(run, cohort, tiny_engine, tmp_path, monkeypatch):
    summary = tmp_path / "out" / "summary.csv"
    write_context(Context(["spot5", "spot6"], [[3.5], [4]], ["GENE7"]), cohort / "counts.h5ad")
    assert run()[0] == 0
    before = rows(summary)
    assert run()[0] == 0
    assert rows(summary) == [{**row, "status": "skipped"} for row in before]
    assert "not whole numbers" in rows(summary)[1]["warnings"]
    # A run that is stopped says nothing new of the slides that it did not come to.
    jobs = read_cohort(str(cohort / "manifest.csv"), str(tmp_path / "out"), Format.H5AD)
    monkeypatch.setattr(CohortProgress, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_cohort(jobs, str(tmp_path / "out"), Settings(str(tiny_engine), genes=["GENE1"]))
    assert [row["spots"] for row in rows(summary)] == [row["spots"] for row in before]
    assert [row["status"] for row in rows(summary)] == ["done", *["skipped"] * (len(SIZES) - 1)]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_failing_slide_stops_no_other(run, cohort, tmp_path):
    (cohort / "S0.h5").write_text("no slide")
    write_slide(Slide([[0, 0]], [[1.0, 2.0]]), cohort / "S3.h5")
    features = a_slide(90, 4).features.copy()
    features[17] = 3e38
    write_slide(dataclasses.replace(a_slide(90, 4), features=features), cohort / "S4.h5")
    (cohort / "manifest.csv").open("a").write("missing.h5,,,\n../cohort/S5.h5,,,missing.h5ad\n")
    write_slide(a_slide(5, 9), cohort / "S5.h5")
    code, out, _ = run()
    assert code == 1
    assert "2 done" in out
    assert "5 failed" in out
    table = rows(tmp_path / "out" / "failures.csv")
    codes = {"S0.h5": "file", "S3.h5": "features", "S4.h5": "slide", "missing.h5": "file", "S5.h5": "file"}
    assert {Path(row["slide"]).name: row["code"] for row in table} == codes
    failures = {Path(row["slide"]).name: row["reason"] for row in table}
    assert "not an HDF5 file" in failures["S0.h5"]
    assert "2 wide" in failures["S3.h5"]
    assert "gives NaN or infinity at" in failures["S4.h5"]
    assert "S4.h5" in failures["S4.h5"]  # found among the slides that ran with it
    assert "no such file" in failures["missing.h5"]
    assert "missing.h5ad" in failures["S5.h5"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.h5ad")) == ["S1.h5ad", "S2.h5ad"]
    assert run("--no-resume")[0] == 1  # and once more


def test_an_unforeseen_fault_fails_one_slide(run, tmp_path, monkeypatch):
    read = pipeline.read_slide
    monkeypatch.setattr(pipeline, "read_slide", lambda path, **k: 1 / 0 if path.name == "S2.h5" else read(path, **k))
    assert run()[0] == 1
    (failure,) = rows(tmp_path / "out" / "failures.csv")
    assert (failure["code"], failure["reason"]) == ("fault", "ZeroDivisionError: division by zero")


def test_warnings_are_told_of_the_slide_that_they_are_of(run, cohort, tmp_path):
    write_context(Context(["spot5", "spot6"], [[3.5], [4]], ["GENE7"]), cohort / "counts.h5ad")
    code, _, err = run("--attention", "knn", "--neighbors", "6")
    assert code == 0
    told = {Path(row["slide"]).stem: row["warnings"] for row in rows(tmp_path / "out" / "summary.csv")}
    assert "not whole numbers" in told.pop("S1")
    assert set(told.values()) == {""}
    assert err.count("is an approximation") == 1


@pytest.mark.parametrize("form", [Format.ZARR, Format.SPATIALDATA])
def test_other_formats(form, run, tmp_path):
    assert run("--format", form.value, "--dtype", "float16", "--embeddings")[0] == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*.zarr"))
    assert names == [f"S{i}.zarr" for i in range(len(SIZES))]
    code, out, _ = run("--format", form.value, "--dtype", "float16", "--embeddings")
    assert (code, f"{len(SIZES)} skipped" in out) == (0, True)


def test_a_folder_with_defaults(run, cohort, tmp_path):
    (cohort / "counts.h5ad").rename(cohort / ".hidden.h5ad")
    code, _, err = run("--organ", "Kidney", source=cohort)
    assert code == 0, err
    assert anndata.read_h5ad(tmp_path / "out" / "S0.h5ad").uns["stpath"]["organ"] == "Kidney"


def test_a_second_run_in_the_folder_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / LOCK):
        code, _, err = run()
    assert code == 2
    assert err == f"error[output]: --out {tmp_path}/out: another run is at work in this folder; wait for it to end\n"
    assert run()[0] == 0


def test_what_a_killed_run_left_is_removed(run, tmp_path):
    (tmp_path / "out" / ".S0.zarr.77.partial").mkdir(parents=True)
    (tmp_path / "out" / ".S1.h5ad.77.partial").write_text("half")
    assert run()[0] == 0
    assert not list((tmp_path / "out").glob(".*.partial"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line names the columns"),
        ("path\nS0.h5\n", "first line names the columns"),
        ("slide,slide\nS0.h5,S1.h5\n", "each once"),
        ("slide\n", "no slides"),
        ("slide,organ\nS0.h5\n", "line 2 has not as many fields"),
        ("slide\nS0.h5,S1.h5\n", "line 2 has not as many fields"),
        ("slide,organ\n,Brain\n", "line 2 names no slide"),
        ("slide\n..\n", "line 2 names no slide"),
        ("slide\n\n\nS0.h5\n/\n", "line 5 names no slide"),
        ("slide,organ\nS0.h5,Brian\n", "unknown organ 'Brian' .did you mean Brain"),
        ("slide,technology\nS0.h5,Visum\n", "unknown technology 'Visum'"),
        ("slide\nS0.h5\nother/S0.h5\n", "S0.h5 and .*other/S0.h5 would both be"),
        ('slide\n"S0.h5\n', "not a CSV file"),
        ("slide,\nS0.h5,Brain\n", "line 2 has a field in a column without a name"),
    ],
)
def test_manifests_that_are_none(text, message, cohort, tmp_path):
    (cohort / "manifest.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_cohort(str(cohort / "manifest.csv"), str(tmp_path / "out"), Format.H5AD)


def test_names_that_are_no_text(run, cohort, tmp_path):
    """Latin-1 names of files, in folders and manifests: run, told, resumed and drawn."""
    odd = os.fsdecode(b"caf\xe9")
    folder = tmp_path / os.fsdecode(b"d\xe9")
    folder.mkdir()
    shutil.copy(cohort / "S0.h5", folder / f"{odd}.h5")
    (folder / "bad.h5").write_text("no slide")
    for status in ("done", "skipped"):
        code, out, _ = run(source=folder)
        assert code == 1
        assert "1 failed" in out
        raw = (tmp_path / "out" / "summary.csv").read_bytes().decode(errors="surrogateescape")
        (row,) = (line for line in csv.DictReader(raw.splitlines()) if line["status"] != "failed")
        assert (row["slide"], row["status"], row["spots"]) == (f"{folder}/{odd}.h5", status, "61")
        assert os.fsencode(folder) in (tmp_path / "out" / "failures.csv").read_bytes()
    result = tmp_path / "out" / f"{odd}.h5ad"
    assert main(["plot", str(result), "GENE7", "--out", str(tmp_path / f"{odd}.png")]) == 0
    (tmp_path / "m.csv").write_bytes(b"slide\n" + os.fsencode(folder / f"{odd}.h5") + b"\n")
    (job,) = read_cohort(str(tmp_path / "m.csv"), str(tmp_path / "out"), Format.H5AD)
    assert job.slide == f"{folder}/{odd}.h5"
    (tmp_path / "m.csv").write_bytes(b"slide\n\xe9.h5\n")
    with pytest.raises(InputError, match="line 2 is not text in UTF-8 and names no file"):
        read_cohort(str(tmp_path / "m.csv"), str(tmp_path / "out"), Format.H5AD)


def test_nothing_global_is_replaced_while_a_run_waits(cohort, engine, tmp_path):
    jobs = read_cohort(str(cohort / "manifest.csv"), str(tmp_path / "out"), Format.H5AD)
    before = warnings.showwarning, warnings.filters[:]
    running = run_jobs(engine, jobs, Settings(engine="", genes=["GENE1"]))
    next(running)
    assert (warnings.showwarning, warnings.filters[:]) == before
    running.close()


def test_signal_handlers_are_restored(run):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    run("--gens")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("name", ["technology", "tech"])
def test_manifests_as_spreadsheets_save_them(separator, ending, name, cohort, tmp_path):
    lines = [f"\ufeffslide,organ,{name},,", "S0.h5,Brain,Visium,,", ",,,,"]
    path = cohort / f"sheet.{ending}"
    path.write_text("\r\n".join(lines).replace(",", separator))
    (job,) = read_cohort(str(path), str(tmp_path / "out"), Format.H5AD)
    assert (job.slide, job.organ, job.technology) == (str(cohort / "S0.h5"), "Brain", "Visium")


def test_a_spreadsheet_is_no_manifest(cohort, tmp_path):
    (cohort / "slides.xlsx").write_bytes(b"PK")
    with pytest.raises(InputError, match="a spreadsheet; save it as CSV"):
        read_cohort(str(cohort / "slides.xlsx"), str(tmp_path / "out"), Format.H5AD)


def test_features_beside_counts_of_the_same_name(cohort, tmp_path):
    folder = tmp_path / "pair"
    folder.mkdir()
    shutil.copy(cohort / "S0.h5", folder)
    anndata.AnnData(sparse.eye(30, 40, format="csr", dtype="f4"), obsm={"spatial": np.eye(30, 2)}).write_h5ad(
        folder / "S0.h5ad"
    )
    with pytest.raises(InputError, match=r"would both be .*, and \S+S0.h5ad holds no features that can be read"):
        read_cohort(str(folder), str(tmp_path / "out"), Format.H5AD)


def test_columns_that_are_not_read_are_told_of(cohort, tmp_path):
    (cohort / "manifest.csv").write_text("\ufeffslide, organs ,patient\nS0.h5,Brain,p1\n,,\n")
    with pytest.warns(InputWarning) as told:
        (job,) = read_cohort(str(cohort / "manifest.csv"), str(tmp_path / "out"), Format.H5AD)
    assert "'organs' is not read (did you mean organ?)" in str(told[0].message)
    assert "'patient'" in str(told[1].message)
    assert (job.slide, job.organ) == (str(cohort / "S0.h5"), None)


def test_faulty_calls(run, cohort, tmp_path):
    def refused(*more: object, **how: object) -> str:
        code, _, err = run(*more, **how)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    assert "no such manifest" in refused(source=tmp_path / "none.csv")
    assert "no such folder, and no manifest" in refused(source=tmp_path / "none")
    assert "unknown gene" in refused("--genes", "GENEX")
    assert "needs the number of neighbors" in refused("--attention", "knn")
    assert "the folder of the slides, of which results would be slides" in refused("--out", cohort, source=cohort)
    assert "S0.h5: a file, and no manifest" in refused(source=cohort / "S0.h5")
    (cohort / "counts.csv").write_text("slide\ncounts.h5ad\n")
    assert "would overwrite an input" in refused("--out", cohort, source=cohort / "counts.csv")
    (tmp_path / "file").write_text("")
    assert "a file is there" in refused("--out", tmp_path / "file")
    (cohort / "bare.csv").write_text("slide\nS0.h5\n")
    assert "there is no context" in refused("--context-spots", "5%", source=cohort / "bare.csv")
    assert not (tmp_path / "out" / "S0.h5ad").exists()


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1))
def test_outputs_never_leave_their_folder(name):
    found = slide_name(f"folder/{name}.h5")
    assert "/" not in found
    assert Path("out", f"{found}.h5ad").parent == Path("out")


def test_ctrl_c_leaves_a_folder_that_goes_on(cohort, tiny_engine, tmp_path):
    """Stopped when the first result is there, it leaves whole ones, and the next run adds the rest."""
    code = """
import sys, time
from stpath_runtime import pipeline
from stpath_runtime.cli import main
run = pipeline._encode
def slowly(*given):
    run(*given)
    time.sleep(0.3)
pipeline._encode = slowly
sys.exit(main(sys.argv[1:]))
"""
    words = ["run", cohort / "manifest.csv", "--engine", tiny_engine, "--out", tmp_path / "out", "--genes", "GENE1"]
    command = [sys.executable, "-c", code, *map(str, words)]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}
    started = subprocess.Popen(command, **pipes, text=True, env=without_coverage())
    wait_for = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*.h5ad")):
        assert time.monotonic() < wait_for
        assert started.poll() is None, started.stderr.read()
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err.splitlines()[-1] == "error[interrupted]: interrupted; nothing half-written is left"
    assert not list((tmp_path / "out").glob(".*.partial"))
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5ad")}
    assert 0 < len(there) < len(SIZES)
    assert main([*map(str, words)]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.h5ad")}
    assert len(after) == len(SIZES)
    assert {name: after[name] for name in there} == there


def test_slides_that_nobody_waits_for_are_dropped(cohort, engine, tiny_engine, tmp_path):
    jobs = read_cohort(str(cohort / "manifest.csv"), str(tmp_path / "out"), Format.H5AD)
    found = run_jobs(engine, jobs, Settings(str(tiny_engine), genes=["GENE1"]))
    assert next(found).status == "done"
    found.close()
    written = list((tmp_path / "out").iterdir())
    assert len(written) < len(SIZES)
    assert all(anndata.read_h5ad(path).n_vars == 1 for path in written)


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_kill_at_random_moments(cohort, tiny_engine, tmp_path, kills):
    """After each kill every result is whole; a last run adds what is missing, and writes nothing twice."""
    script = Path(__file__).parent / "kill_rounds.py"
    words = [sys.executable, script, cohort / "manifest.csv", tiny_engine, tmp_path / "out", kills]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills" in done.stdout
