"""Files: written whole or not at all, removed, checked to be writable, hashed."""

from __future__ import annotations

import ctypes
import hashlib
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
LONGEST_NAME = 150  # bytes of the name that a partial one begins with: a name has at most 255
WEEK = 7 * 24 * 3600  # seconds
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux, renameat2(2)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`, which takes the place of `path` when the block ends well.

    The block makes a file or a folder under that name. It is on the disk before it is renamed: whatever happens, there
    is the earlier result or the new one, whole. If the block fails, what it wrote is deleted.

    Raises
    ------
    InputError
        If it cannot be written. Errors of other files, which the block reads, are raised as they are.
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
        # HDF5 puts the system's words in the middle of its own.
        inner = re.search(r"error message = '([^']+)'", str(error))
        why = inner[1] if inner else error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({why}); free some space or choose another place") from error
    finally:
        remove(partial)


def sweep(folder: Path) -> None:
    """Delete what processes that are no more left half-written in a folder.

    What a living process writes stays, and so does what another machine wrote within a week. An earlier result that was
    moved away for a new one goes back where the new one never came.
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
    if host is None:  # of a version before this one, which named no host
        return True
    if host != _host():
        return time.time() - path.lstat().st_mtime > WEEK
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    return False


def partial_name(name: str, kind: str = "partial") -> str:
    """What a file is called while it is written: its name, and whose it is by host, process and a random part."""
    short = name.encode(errors="surrogateescape")[:LONGEST_NAME].decode(errors="ignore")
    return f".{short}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}"


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:32] or "_"


def _put_in_place(new: Path, path: Path) -> None:
    """Rename a file or folder to where another may be; of two folders, both at once."""
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
    """Whether the system has exchanged two names, in one step; not every file system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the file system of a folder with all that is in it, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        if not path.is_dir():
            os.fsync(handle)
        elif ctypes.CDLL(None, use_errno=True).syncfs(handle) != 0:  # one wait, and not one for each of many files
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    finally:
        os.close(handle)


def _names_to_disk(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems of networks keep no order of names
            os.fsync(handle)
    finally:
        os.close(handle)


def _is_of(error: OSError, folder: Path) -> bool:
    """Whether an error is one of writing in a folder: most libraries say of no file that it is not another one."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    within = folder.absolute()
    return not named or any(within in (name.absolute(), *name.absolute().parents) for name in named)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file, itself and not a link to it, a second name (a hard link), or copy it where that cannot be."""
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
