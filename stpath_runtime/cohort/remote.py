"""Files by URL (s3://, gs://, ...), through fsspec: fetched before they are read, sent when they are whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FileError, InputError, InstallError, RemoteError, first_line
from ..files import partial_name
from ..machine import network_setting_at_fault


def is_url(path: str) -> bool:
    """Whether a path names another file system."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """A name in a folder, or in a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


@contextmanager
def fetched(path: str) -> Iterator[Path]:
    """A local file or folder: the path itself, or a copy of a URL for the duration of the block.

    Raises
    ------
    InputError
        If it cannot be fetched.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="stpath-") as folder:
        copy = Path(folder) / path.rstrip("/").rsplit("/", 1)[-1]
        with transfer(path, "fetched") as (files, place):
            files.get(place, str(copy), recursive=files.isdir(place))
        yield copy


@contextmanager
def sent(path: str) -> Iterator[Path]:
    """A local path to write to; for a URL, the result is uploaded when the block ends well.

    It is uploaded beside an earlier result, which stays until the new one is whole.

    Raises
    ------
    InputError
        If it cannot be sent.
    """
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="stpath-") as folder:
        written = Path(folder) / path.rstrip("/").rsplit("/", 1)[-1]
        yield written
        with transfer(path, "written") as (files, place):
            parent, _, name = place.rstrip("/").rpartition("/")
            beside = f"{parent}/{partial_name(name)}"
            files.makedirs(parent, exist_ok=True)
            try:
                if written.is_dir():
                    _send_folder(files, written, beside)
                else:
                    files.put_file(str(written), beside)
                if files.exists(place):  # the new one is there, whole
                    files.rm(place, recursive=True)
                files.mv(beside, place, recursive=written.is_dir())
            finally:
                if files.exists(beside):
                    files.rm(beside, recursive=True)


def _send_folder(files: Any, folder: Path, place: str) -> None:
    for entry in sorted(path for path in folder.rglob("*") if path.is_file()):
        target = f"{place}/{entry.relative_to(folder).as_posix()}"
        files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
        files.put_file(str(entry), target)


def discard(path: str) -> None:
    """Delete a file at a URL, if it is there.

    Raises
    ------
    InputError
        If it cannot be deleted.
    """
    with transfer(path, "deleted") as (files, place):
        if files.exists(place):
            files.rm(place)


def version(path: str) -> list[str]:
    """A text that changes when a file or folder does: sizes and times of its files, or the marks of its storage.

    Raises
    ------
    InputError
        If it is not there.
    """
    if is_url(path):
        with transfer(path, "found") as (files, place):
            found = files.find(place, detail=True) if files.isdir(place) else {place: files.info(place)}
        marks = ("size", "ETag", "etag", "mtime", "LastModified", "created")
        return [f"{name} {[str(info[mark]) for mark in marks if mark in info]}" for name, info in sorted(found.items())]
    start = Path(path)
    if not start.exists():
        raise FileError(f"{path}: no such file")
    entries = sorted(start.rglob("*")) if start.is_dir() else [start]
    stats = [(entry, entry.stat()) for entry in entries if entry.is_file()]
    return [f"{entry.relative_to(start)} {found.st_size} {found.st_mtime_ns}" for entry, found in stats]


@contextmanager
def transfer(path: str, what: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path in it; whatever it raises becomes one line."""
    try:
        import fsspec
    except ImportError as error:
        raise InstallError(f"{path}: URLs need fsspec; run: pip install 'stpath-engine[remote]'") from error
    try:
        yield fsspec.core.url_to_fs(path)
    except InputError:
        raise
    except Exception as error:  # file systems raise errors of their own libraries
        if (setting := network_setting_at_fault(error)) is not None:
            raise RemoteError(f"{path}: cannot be {what}; {setting}") from error
        raise RemoteError(f"{path}: cannot be {what} ({type(error).__name__}: {first_line(error)})") from error
