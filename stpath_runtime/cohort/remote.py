"""Files by URL (s3://, gs://, ...), through fsspec: fetched before they are read, sent when they are whole."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FileError, InstallError, RemoteError

ROOTS = (".zgroup", ".zattrs", ".zmetadata", "zarr.json")  # without them a folder is no zarr store


def is_url(path: str) -> bool:
    """Whether a path names another file system."""
    return "://" in path


def join(folder: str, name: str) -> str:
    """A name in a folder, or in a URL."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


@contextmanager
def fetched(path: str) -> Iterator[Path]:
    """A file or folder on this machine: itself, or a copy of what is at a URL for the time of the block.

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
        with _transfer(path, "fetched") as (files, place):
            files.get(place, str(copy), recursive=files.isdir(place))
        yield copy


@contextmanager
def sent(path: str) -> Iterator[Path]:
    """Where to write on this machine; what the block writes there is sent to a URL when the block ends well.

    The files that make a folder a zarr store go last: one that was sent in part does not look whole.

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
        with _transfer(path, "written") as (files, place):
            if files.isdir(place):
                files.rm(place, recursive=True)
            files.makedirs(place.rstrip("/").rsplit("/", 1)[0], exist_ok=True)
            names = [entry for entry in sorted(written.rglob("*")) if entry.is_file()] if written.is_dir() else []
            names.sort(key=lambda entry: entry.parent == written and entry.name in ROOTS)
            if not names:
                files.put_file(str(written), place)
            for entry in names:
                target = f"{place}/{entry.relative_to(written).as_posix()}"
                files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                files.put_file(str(entry), target)


def discard(path: str) -> None:
    """Delete a file at a URL, if it is there.

    Raises
    ------
    InputError
        If it cannot be deleted.
    """
    with _transfer(path, "deleted") as (files, place):
        if files.exists(place):
            files.rm(place)


def version(path: str) -> list[str]:
    """What changes when a file or folder does: sizes and times of its files, or the marks that its place keeps.

    Raises
    ------
    InputError
        If it is not there.
    """
    if is_url(path):
        with _transfer(path, "found") as (files, place):
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
def _transfer(path: str, what: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the place in it."""
    try:
        import fsspec
    except ImportError as error:
        raise InstallError(f"{path}: URLs need fsspec; run: pip install 'stpath-engine[remote]'") from error
    try:
        yield fsspec.core.url_to_fs(path)
    except Exception as error:  # file systems raise errors of their own libraries
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RemoteError(f"{path}: cannot be {what} ({type(error).__name__}: {line})") from error
