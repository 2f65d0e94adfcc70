"""Checks of every reader: a library's error becomes one line, and no more is allocated than a file holds."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileError, InputError, MemoryLimitError, first_line, warn

ALWAYS_ALLOCATED = 64 * 2**20  # bytes that any file may declare
MOST_TIMES = 1000  # bytes declared for one stored: deflate's limit is about this, and no measured data comes near it
MANY_CHUNKS = 10_000
LONGEST_REASON = 1_000  # of what a library says
BROKEN_DISK = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO}
PLUGINS = (
    "write it again with gzip, or install hdf5plugin and set HDF5_PLUGIN_PATH to its folder of plugins "
    "(python -c 'import hdf5plugin; print(hdf5plugin.PLUGIN_PATH)')"
)


@contextmanager
def reading(path: Path, what: str = "the file") -> Iterator[None]:
    """Turn whatever a library raises about a file into one line. Only for calls of those libraries.

    Raises
    ------
    InputError
        If anything is raised in the block.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py, zarr, anndata, pandas and pyarrow raise errors of any kind
        raise explained(path, what, error) from error


def explained(path: Path, what: str, error: Exception) -> InputError:
    """The error for a failed read, by its cause, each with its own fix: most such files are not damaged."""
    chain = _chain(error)
    numbers = {cause.errno for cause in chain if isinstance(cause, OSError)}
    said = " ".join(str(cause) for cause in chain)
    newer = next((cause for cause in chain if type(cause).__name__ == "IORegistryError"), None)
    if errno.ENOMEM in numbers or any(isinstance(cause, MemoryError) for cause in chain):
        return MemoryLimitError(f"{path}: {what} does not fit in memory")
    causes = [
        (
            "unable to lock file" in said or numbers & {errno.EAGAIN, errno.EDEADLK},
            "another process has the file open to write it, as a tool that still makes it; wait until it has ended, or "
            "close the file there",
        ),
        (
            numbers & {errno.EACCES, errno.EPERM} or "Permission denied" in said,
            f"{what} may not be read (permission denied); ask for the right to read it",
        ),
        (
            errno.ENOENT in numbers,
            f"{what} is not there any more; look whether another process moves or removes it",
        ),
        (
            numbers & {errno.EMFILE, errno.ENFILE},
            f"too many files are open ({brief(error)}); raise the limit: ulimit -n 4096",
        ),
        (
            numbers & BROKEN_DISK or any(isinstance(cause, TimeoutError | ConnectionError) for cause in chain),
            f"the disk or network that {what} is on fails ({brief(error)}); try again, or copy it to this machine",
        ),
        (
            newer,
            f"{what} is written in a way that the anndata here does not know ({_registered(newer or error)}); update "
            "anndata, or write the file with an older one",
        ),
        (
            ("filter" in said and "not registered" in said) or "can't open directory" in said,
            f"{what} is compressed by a filter that is not here ({brief(error)}); {PLUGINS}",
        ),
    ]
    damaged = f"{what} cannot be read; it is truncated or damaged ({brief(error)}); copy it again, or make it again"
    return FileError(f"{path}: {next((text for applies, text in causes if applies), damaged)}")


def _chain(error: BaseException) -> list[BaseException]:
    """An error and its causes."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain and len(chain) < 20:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return chain


def _registered(error: BaseException) -> str:
    """What anndata has no method for: "array 0.3.0"."""
    match = re.search(r"encoding_type='([^']*)', encoding_version='([^']*)'", str(error))
    return f"{match[1]} {match[2]}" if match else brief(error)


def check_size(path: Path, what: str, declared: int, chunks: int, stored: int) -> None:
    """Refuse an array that declares absurdly more than it stores, before it is allocated.

    Parameters
    ----------
    declared, stored
        Bytes in memory and in the file.
    chunks
        The pieces that it is stored in, each of which costs time.

    Raises
    ------
    InputError
        If over 64 MiB are declared, and 1,000 times what is stored; or over 10,000 chunks, with less than a byte each.
    """
    if declared > max(ALWAYS_ALLOCATED, MOST_TIMES * stored) or chunks > max(MANY_CHUNKS, stored):
        raise FileError(
            f"{path}: {what} declares {declared:,} bytes in {chunks:,} chunks but stores {stored:,}; "
            "it is damaged or made to fill the memory: make it again"
        )


def chunk_count(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """How many chunks make an array."""
    return math.prod(-(-n // max(size, 1)) for n, size in zip(shape, chunk, strict=True))


def warn_ignored(path: Path, what: str) -> None:
    """Warn that something odd in a file is ignored."""
    warn(f"{path}: {what}; it is ignored")


def brief(error: BaseException) -> str:
    """The first line of an error, shortened if it is very long."""
    line = first_line(error)
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + "…"
