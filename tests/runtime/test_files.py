"""Files are there whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import without_coverage
from stpath_runtime import files
from stpath_runtime.errors import OutputError
from stpath_runtime.files import PARTIAL, known_sha256, link_or_copy, sha256, sweep, written_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from stpath_runtime.files import written_whole
with written_whole(Path(sys.argv[1])) as partial:
    if sys.argv[2] == "folder":
        partial.mkdir()
        partial = partial / "inside"
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(path: Path, content: str, folder: bool) -> None:
    with written_whole(path) as partial:
        if folder:
            partial.mkdir()
            (partial / "inside").write_text(content)
        else:
            partial.write_text(content)


def read(path: Path) -> str:
    return (path / "inside" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("exchanged", [True, False], ids=["at once", "by two renames"])
def test_a_new_result_takes_the_place_of_an_earlier_one(folder, exchanged, tmp_path, monkeypatch):
    if not exchanged:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    write(tmp_path / "r", "old", folder)
    write(tmp_path / "r", "new", folder)
    assert read(tmp_path / "r") == "new"
    assert list(tmp_path.iterdir()) == [tmp_path / "r"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_fails_leaves_the_earlier_result(folder, tmp_path, monkeypatch):
    write(tmp_path / "r", "old", folder)
    monkeypatch.setattr(files, "_put_in_place", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OutputError, match=r"r: cannot be written \(No space left\)"):
        write(tmp_path / "r", "new", folder)
    assert read(tmp_path / "r") == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "r"]


def test_a_swap_that_fails_half_way_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "r", "old", True)
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "r", "new", True)
    monkeypatch.setattr(Path, "replace", replace)
    assert read(tmp_path / "r") == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_is_swept(kind, tmp_path):
    path = tmp_path / "r.zarr"
    write(path, "old", kind == "folder")
    command = [sys.executable, "-c", KILLED, path, kind]
    assert subprocess.run(command, check=False, env=without_coverage()).returncode < 0
    (left,) = set(tmp_path.iterdir()) - {path}
    assert PARTIAL.fullmatch(left.name)["name"] == "r.zarr"
    sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert read(path) == "old"


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_others_are_writing_is_not_swept(tmp_path):
    host = files._host()
    old = time.time() - 2 * files.WEEK
    kept = [f".a.{host}-{os.getpid()}-01234567.partial", ".a.another-1-01234567.partial", ".mine.partial", "a.partial"]
    swept = [f".a.{host}-{dead_process()}-01234567.partial", ".a.another-2-01234567.partial", ".a.77.partial"]
    for name in kept + swept:
        (tmp_path / name).touch()
    os.utime(tmp_path / swept[1], (old, old))
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_the_only_copy_of_an_earlier_result_goes_back(tmp_path):
    """As after a crash between the two renames of a folder."""
    name = f"{files._host()}-{dead_process()}-01234567.earlier"
    for result in ("lost", "replaced"):
        (tmp_path / f".{result}.{name}").write_text("earlier")
    (tmp_path / "replaced").write_text("new")
    sweep(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"lost": "earlier", "replaced": "new"}


def test_an_error_of_another_file_is_not_one_of_writing(tmp_path):
    with pytest.raises(FileNotFoundError, match="input"), written_whole(tmp_path / "out" / "r") as partial:
        partial.write_text((tmp_path / "input").read_text())
    assert not list((tmp_path / "out").iterdir())


def test_names_tell_whose_they_are_and_fit(tmp_path):
    name = "é" * 120 + ".h5ad"
    with written_whole(tmp_path / name) as first, written_whole(tmp_path / name) as second:
        assert first != second
        assert re.search(rf"-{os.getpid()}-[0-9a-f]{{8}}\.partial$", first.name)
        first.touch()
        second.touch()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_name_is_of_the_file_and_not_of_a_link_to_it(tmp_path):
    (tmp_path / "real").write_text("x")
    (tmp_path / "link").symlink_to("real")
    link_or_copy(tmp_path / "link", tmp_path / "sub" / "second")
    assert not (tmp_path / "sub" / "second").is_symlink()
    assert (tmp_path / "sub" / "second").read_text() == "x"


@pytest.fixture
def hashed(tmp_path, monkeypatch):
    """A file whose hash is in the cache, and how often files were read to hash them."""
    path, read = tmp_path / "weights.bin", []
    path.write_bytes(b"weights")
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "WORTH_KEEPING", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "sha256", lambda path: read.append(path) or sha256(path))
    time.sleep(0.01)
    assert known_sha256(path) == sha256(path)
    read.clear()
    return path, read


def test_a_file_is_hashed_once(hashed):
    path, read = hashed
    assert known_sha256(path) == sha256(path)
    assert not read


def rewritten(path):
    path.write_bytes(b"Weights")


def rewritten_as_old_as_before(path):
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(b"Weights")
    os.utime(path, ns=times)


def replaced(path):
    other = path.with_name("other")
    other.write_bytes(b"Weights")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize("change", [rewritten, rewritten_as_old_as_before, replaced])
def test_a_file_that_changed_is_hashed_again(hashed, change):
    path, read = hashed
    change(path)
    assert known_sha256(path) == sha256(path)
    assert read == [path]


def test_the_hash_of_a_file_that_was_just_written_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "WORTH_KEEPING", 1)
    (tmp_path / "a").write_bytes(b"a")
    known_sha256(tmp_path / "a")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]", "[[1], 2]", "[]", "null"])
def test_what_is_no_hash_in_the_cache_is_not_taken_for_one(hashed, content):
    path, read = hashed
    (noted,) = (path.parent / "cache").rglob("sha256/*")
    noted.write_text(content)
    assert known_sha256(path) == sha256(path)
    assert read == [path]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "WORTH_KEEPING", 1)
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a").write_bytes(b"a")
    time.sleep(0.01)
    assert known_sha256(tmp_path / "a") == sha256(tmp_path / "a")


def test_a_user_without_a_home_has_no_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WORTH_KEEPING", 1)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    (tmp_path / "a").write_bytes(b"a")
    assert known_sha256(tmp_path / "a") == sha256(tmp_path / "a")
