"""Slides and results by URL, on fsspec's memory and local file systems."""

from __future__ import annotations

import csv
import io

import anndata
import fsspec
import numpy as np
import pytest

from helpers import write_context, write_slide
from stpath_runtime import Context, Engine, InputError
from stpath_runtime.cli.app import main
from stpath_runtime.cohort.remote import fetched, join, sent, version


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    """A URL of an empty folder, and its file system."""
    files = fsspec.filesystem(request.param)
    if request.param == "memory":
        files.store.clear()
        files.pseudo_dirs[:] = [""]
        return "memory://bucket", files
    return f"file://{tmp_path}/bucket", files


@pytest.mark.parametrize("form", ["h5ad", "zarr", "spatialdata"])
def test_a_cohort_by_url(form, place, tiny, tiny_engine, tmp_path, capsys):
    url, files = place
    _, slide, context = tiny.slides()[0]
    files.makedirs(f"{url}/in")
    files.put_file(str(write_slide(slide, tmp_path / "s.h5")), f"{url}/in/s.h5")
    files.put_file(str(write_context(context, tmp_path / "c.h5ad")), f"{url}/in/c.h5ad")
    files.pipe_file(f"{url}/in/manifest.csv", b"slide,organ,context\ns.h5,Brain,c.h5ad\nnone.h5,,\n")
    words = ["run", f"{url}/in/manifest.csv", "--engine", tiny_engine, "--out", f"{url}/out", "--genes", "GENE1,GENE2"]
    words += ["--format", form]
    assert main([*map(str, words)]) == 1
    _, err = capsys.readouterr()
    assert f"{url}/in/none.h5: cannot be found" in err
    suffix = "h5ad" if form == "h5ad" else "zarr"
    expected = Engine.load(tiny_engine).predict(slide, genes=["GENE1", "GENE2"], context=context)
    with fetched(f"{url}/out/s.{suffix}") as path:
        found = {"h5ad": anndata.read_h5ad, "zarr": anndata.read_zarr}.get(
            form, lambda path: anndata.read_zarr(path / "tables" / "stpath")
        )(path)
    np.testing.assert_allclose(found.X, expected.X, rtol=1e-5, atol=1e-5)

    def statuses() -> list[str]:
        return [row["status"] for row in csv.DictReader(io.StringIO(files.cat(f"{url}/out/summary.csv").decode()))]

    assert statuses() == ["done", "failed"]
    assert main([*map(str, words)]) == 1
    assert statuses() == ["skipped", "failed"]
    fewer = write_context(Context(context.ids[:3], context.counts[:3], context.genes), tmp_path / "fewer.h5ad")
    files.put_file(str(fewer), f"{url}/in/c.h5ad")
    assert main([*map(str, words)]) == 1
    assert statuses() == ["done", "failed"]
    files.put_file(str(tmp_path / "s.h5"), f"{url}/in/none.h5")
    assert files.exists(f"{url}/out/failures.csv")
    assert main([*map(str, words)]) == 0
    assert not files.exists(f"{url}/out/failures.csv")


def test_messages_name_the_url_and_not_the_copy(place, tiny, tiny_engine, tmp_path, capsys):
    url, files = place
    _, slide, _ = tiny.slides()[0]
    files.makedirs(f"{url}/in")
    files.put_file(str(write_slide(slide, tmp_path / "s.h5")), f"{url}/in/s.h5")
    counts = Context(slide.obs_names[:1], [[0.5]], ["GENE1"])
    files.put_file(str(write_context(counts, tmp_path / "c.h5ad")), f"{url}/in/c.h5ad")
    files.pipe_file(f"{url}/in/bad.h5", b"no slide")
    (tmp_path / "m.csv").write_text(f"slide,context\n{url}/in/s.h5,{url}/in/c.h5ad\n{url}/in/bad.h5,\n")
    words = ["run", tmp_path / "m.csv", "--engine", tiny_engine, "--out", tmp_path / "out", "--genes", "GENE1"]
    assert main([*map(str, words)]) == 1
    err = capsys.readouterr().err
    assert f"warning: {url}/in/s.h5: context of {url}/in/s.h5: 100% of the counts" in err
    assert f"failed[file]: {url}/in/bad.h5: not an HDF5 file" in err
    assert "stpath-" not in err


def test_a_place_that_is_not_writable_is_found_before_the_work(place, tiny, tiny_engine, tmp_path, monkeypatch, capsys):
    def put_file(*_: object, **__: object) -> None:
        raise PermissionError("access denied")

    url, files = place
    monkeypatch.setattr(type(files), "put_file", put_file)
    monkeypatch.setattr(Engine, "predict_many", lambda *_, **__: pytest.fail("the work was done"))
    (tmp_path / "in").mkdir()
    write_slide(tiny.slides()[0][1], tmp_path / "in" / "s.h5")
    words = ["run", tmp_path / "in", "--engine", tiny_engine, "--out", f"{url}/out", "--genes", "GENE1"]
    assert main([*map(str, words)]) == 2
    message = f"error[remote]: {url}/out/summary.csv: cannot be written (PermissionError: access denied)\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("folder", [False, True])
def test_the_earlier_result_stays_until_the_new_one_is_whole(folder, place, monkeypatch):
    url, files = place

    def send(content: str) -> None:
        with sent(f"{url}/r.zarr") as path:
            if folder:
                path.mkdir()
                (path / "a").write_text("first")
            (path / "z" if folder else path).write_text(content)

    def kept() -> str:
        return files.cat(f"{url}/r.zarr/z" if folder else f"{url}/r.zarr").decode()

    send("old")
    put, count = type(files).put_file, []

    def fail(self, local, *rest, **options):
        count.append(local)
        if len(count) == 1 + folder:
            raise OSError("the connection is gone")
        return put(self, local, *rest, **options)

    monkeypatch.setattr(type(files), "put_file", fail)
    with pytest.raises(InputError, match="the connection is gone"):
        send("new")
    assert kept() == "old"
    monkeypatch.setattr(type(files), "put_file", put)
    send("new")
    assert kept() == "new"
    assert len(files.ls(url)) == 1  # nothing is left beside it


@pytest.mark.parametrize("form", ["h5ad", "zarr", "spatialdata"])
def test_what_others_put_at_a_url_is_never_removed(form, place, tiny, tiny_engine, tmp_path, capsys):
    url, files = place
    suffix = "h5ad" if form == "h5ad" else "zarr"
    theirs = f"{url}/out/s.{suffix}" if form == "h5ad" else f"{url}/out/s.{suffix}/notes.txt"
    files.makedirs(theirs.rpartition("/")[0], exist_ok=True)
    files.pipe_file(theirs, b"theirs")
    (tmp_path / "in").mkdir()
    write_slide(tiny.slides()[0][1], tmp_path / "in" / "s.h5")
    words = ["run", tmp_path / "in", "--engine", tiny_engine, "--out", f"{url}/out", "--genes", "GENE1"]
    assert main([*map(str, [*words, "--format", form])]) == 1
    assert "exists and is not a prediction by stpath; move it away" in capsys.readouterr().err
    assert files.cat(theirs) == b"theirs"


def test_what_fails_before_the_end_is_not_sent(place):
    url, files = place

    def fail() -> None:
        with sent(f"{url}/x/p.h5ad") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not files.exists(f"{url}/x/p.h5ad")


def test_a_version_changes_with_the_file(place, tmp_path):
    url, files = place
    files.makedirs(url)
    for target in (f"{url}/a", str(tmp_path / "a")):
        write = (lambda data, to=target: files.pipe_file(to, data)) if "://" in target else (tmp_path / "a").write_bytes
        write(b"one")
        first = version(target)
        assert version(target) == first
        write(b"more")
        assert version(target) != first


def test_faults(tmp_path):
    for url in ("nowhere://x/s.h5", "memory://missing/s.h5"):
        with pytest.raises(InputError, match=rf"{url}: cannot be fetched"), fetched(url):
            pass
    with pytest.raises(InputError, match="no such file"):
        version(str(tmp_path / "missing"))
    assert join("s3://a/b/", "c") == "s3://a/b/c"
    assert join("a/b", "c") == "a/b/c"
