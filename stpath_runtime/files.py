"""Files: written atomically, removed, checked to be writable, hashed."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

PARTIAL = re.compile(
    r"\.(?P<name>.+)\.(?:(?P<host>\w+)-)?(?P<process>\d+)(?:-[0-9a-f]{8})?\.(?P<kind>partial|earlier)", re.DOTALL
)
LONGEST_NAME = 150  # bytes of the final name that a partial name starts with; file systems allow 255 in all
WORTH_KEEPING = 1 << 20  # bytes of a file, from which its hash is kept: less is hashed in a millisecond
SETTLED = 2_000_000_000  # nanoseconds since the last change of a file, from which its hash is kept
WEEK = 7 * 24 * 3600  # seconds
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write `path` atomically: the block writes to the temporary name that it is given, which is then renamed.

    The block makes a file or a folder under that name. It is synced to disk before it is renamed: whatever happens,
    either the earlier result or the new one is there, whole. If the block fails, what it wrote is deleted.

    Raises
    ------
    InputError
        If `path` cannot be written. Errors about other files, which the block reads, are raised unchanged.
    """
    partial = path.with_name(partial_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _to_disk(partial)
        _put_in_place(partial, path)
        _names_to_disk(path.parent)
    except OSError as error:
        if not _is_of(error, path.parent):
            raise
        # HDF5 quotes the system's message in the middle of its own.
        inner = re.search(r"error message = '([^']+)'", str(error))
        why = inner[1] if inner else error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({why}); free some space or choose another place") from error
    finally:
        remove(partial)


def sweep(folder: Path) -> None:
    """Delete the half-written files that dead processes left in a folder.

    Files of a running process stay, and so do those of another machine for a week. An earlier result that was moved
    aside for a new one is put back if the new one never arrived.
    """
    for path in [*folder.glob(".*.partial"), *folder.glob(".*.earlier")]:
        match = PARTIAL.fullmatch(path.name)
        if match is None or not _is_left_over(path, match["host"], match["process"]):
            continue
        target = path.with_name(match["name"])
        if match["kind"] == "earlier" and not target.exists():
            path.rename(target)
        else:
            remove(path)


def _is_left_over(path: Path, host: str | None, process: str) -> bool:
    if host is None:  # an earlier version wrote it, without a host
        return True
    if host != _host():
        return time.time() - path.lstat().st_mtime > WEEK
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # the process is another user's
        return False
    return False


def partial_name(name: str, kind: str = "partial") -> str:
    """The name of a file while it is being written: the final name, the host, the process and a random part."""
    short = name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
    return f".{short}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:32] or "_"


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a file or folder to a name that may be taken; two folders are exchanged in one step."""
    if not path.is_dir() or path.is_symlink():
        new.replace(path)
    elif not _exchanged(new, path):
        earlier = path.with_name(partial_name(path.name, "earlier"))
        path.rename(earlier)
        try:
            new.replace(path)
        except BaseException:
            earlier.rename(path)
            raise
        remove(earlier)


def _exchanged(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False if the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def _to_disk(path: Path) -> None:
    """Sync a file to disk, or a folder and everything in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if not path.is_dir():
            os.fsync(handle)
        elif (
            ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0
        ):  # one call instead of an fsync for each of many files
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(handle)


def _names_to_disk(folder: Path) -> None:
    """Sync the names in a folder to disk, if the file system supports it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems do not support it
            os.fsync(handle)
    finally:
        os.close(handle)


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether an error is about a file in this folder. Most libraries name no file: then it is assumed to be."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    within = folder.absolute()
    return not named or any(within in (name.absolute(), *name.absolute().parents) for name in named)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file (the file itself, not a symbolic link to it), or copy it where that is impossible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def require_writable(path: Path) -> None:
    """Check, before the work, that a file or folder can be made at `path`.

    Raises
    ------
    InputError
        If it cannot.
    """
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({folder}: {error.strerror}); choose another place") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """SHA-256 of a file; of a large one from the user's cache, if since then its size, inode and times are the same.

    The time of its inode's change (ctime) is among them, which no program sets: `touch` and `cp -p` do not hide what
    they did. What a disk loses by itself goes unseen; `stpath doctor` and `stpath verify` read it.
    """
    before, cache = _state(path), user_cache()
    if before[0] < WORTH_KEEPING or cache is None:
        return sha256(path)
    noted = cache / "sha256" / hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    with suppress(OSError, ValueError, TypeError):
        state, digest = json.loads(noted.read_text())
        if state == before and isinstance(digest, str):
            return digest
    digest = sha256(path)
    # A write in the tick of the clock in which it was read would leave the same times.
    if _state(path) == before and time.time_ns() - max(before[2:4]) > SETTLED:
        with suppress(OSError, OutputError), written_whole(noted) as partial:
            partial.write_text(json.dumps([before, digest]))
    return digest


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_dev]


def user_cache() -> Path | None:
    """The user's folder for what can be made again, by the XDG specification; None for a user without a home."""
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stpath"
    return None
