"""What every reader checks: a library's error becomes one line, and nothing is allocated that a file does not hold."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import FileError, InputError, InputWarning, MemoryLimitError

SMALL = 64 * 2**20  # bytes that are allocated whatever a file holds
BOMB = 1000  # bytes declared for one stored: deflate's limit is about this, and no measured data comes near it
MANY_CHUNKS = 10_000


@contextmanager
def reading(path: Path, what: str = "the file") -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into one line. Only for calls of those libraries.

    Raises
    ------
    InputError
        If anything is raised in the block.
    """
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise MemoryLimitError(f"{path}: {what} does not fit in memory") from error
    except Exception as error:  # h5py, zarr, anndata, pandas and pyarrow raise errors of any kind
        raise FileError(
            f"{path}: {what} cannot be read; it is truncated or damaged ({brief(error)}); "
            "copy it again, or make it anew"
        ) from error


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
    if declared > max(SMALL, BOMB * stored) or chunks > max(MANY_CHUNKS, stored):
        raise FileError(
            f"{path}: {what} declares {declared:,} bytes in {chunks:,} chunks but stores {stored:,}; "
            "it is damaged or made to fill the memory: make it anew"
        )


def chunk_count(shape: Sequence[int], chunk: Sequence[int]) -> int:
    """How many chunks make an array."""
    return math.prod(-(-n // max(size, 1)) for n, size in zip(shape, chunk, strict=True))


def warn_ignored(path: Path, what: str) -> None:
    """Warn that something odd in a file is ignored."""
    warnings.warn(f"{path}: {what}; it is ignored", InputWarning, stacklevel=2)


def brief(error: Exception) -> str:
    """Return the first line of an error, short."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 120 else line[:120] + "…"
