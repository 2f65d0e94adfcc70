"""An open file of named elements, HDF5 or zarr, whose errors become one line each.

Every element is checked before it is read. This limits what a file can make us do: no pickle, nothing outside the
file, no more memory than the file fills.
"""

from __future__ import annotations

import errno
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import FileError, InputError, MemoryLimitError, first_line, warn
from ..slides.slide import Patch

KINDS = "biufSUT"  # booleans, numbers and text of fixed or variable length: what numpy calls them
DEEPEST, MOST = 32, 2_000  # of elements within one: a file whose links form a circle has no end
ALWAYS_ALLOCATED = 64 * 2**20  # bytes that any file may declare
MOST_TIMES = 1000  # bytes declared for one stored: deflate's limit is about this, and no measured data comes near it
MANY_CHUNKS = 10_000
LONGEST_REASON = 1_000  # of what a library says
BROKEN_DISK = {errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO, errno.EREMOTEIO}
PLUGINS = (
    "write it again with gzip, or install hdf5plugin and set HDF5_PLUGIN_PATH to its folder of plugins "
    "(python -c 'import hdf5plugin; print(hdf5plugin.PLUGIN_PATH)')"
)
CROPPED, GIGAPATH = 224, 1_536  # pixels that Gigapath takes, and its features
PIXELS, SCALES = (1, 10**6), (0.01, 1000)  # what a side in pixels, and a magnification or microns a pixel, can be


class Parts(NamedTuple):
    """The parts of a slide in a file."""

    coords: npt.NDArray[Any]  # [N, 2]
    features: npt.NDArray[Any]  # [N, F]
    barcodes: npt.NDArray[Any] | None  # [N] or [N, 1]
    patch: Patch | None = None
    sections: list[str] | None = None  # [N]


class Source(ABC):
    """Elements by key, such as "obs/_index"; "" is the whole file.

    Every method raises InputError if the file is damaged, or holds what must not be read.
    """

    def __init__(self, path: Path, root: Any) -> None:
        self.path, self.root = path, root

    def names(self, key: str = "") -> list[str]:
        """Names of the elements in a group; none where there is no group."""
        with reading(self.path, _quoted(key)):
            node = self._node(key)
            return sorted(self._children(key)) if node is not None and not self._is_array(node) else []

    def attributes(self, key: str = "") -> dict[str, Any]:
        """Attributes of an element."""
        with reading(self.path, f"the attributes of {_quoted(key)}"):
            node = self._node(key)
            return {} if node is None else dict(node.attrs)

    def shape(self, key: str) -> list[int] | None:
        """Shape of an array or of a sparse matrix, None for anything else."""
        with reading(self.path, _quoted(key)):
            node = self._node(key)
            shape = node.shape if node is not None and self._is_array(node) else self.attributes(key).get("shape")
            return None if shape is None else [int(n) for n in shape]

    def read(self, key: str) -> Any:
        """Read an element as anndata reads it: an array, a sparse matrix, a table, ... or a whole AnnData."""
        from anndata.io import read_elem

        self._check_all(key)
        with reading(self.path, _quoted(key)):
            return read_elem(self._node(key))

    def array(self, key: str) -> npt.NDArray[Any]:
        """Read an array, whatever wrote it."""
        with reading(self.path, _quoted(key)):
            if not self._is_array(self._node(key)):
                raise FileError(f"{self.path}: {_quoted(key)} is a group; expected a dataset")
        self._check_all(key)
        with reading(self.path, _quoted(key)):
            return np.asarray(self._node(key)[()])

    def lazy(self, key: str) -> Any:
        """An array of the file, checked and not read yet; None where there is none."""
        with reading(self.path, _quoted(key)):
            node = self._node(key)
            if node is None or not self._is_array(node):
                return None
            self._check_array(node, _quoted(key))
            return node

    def require_whole(self, key: str) -> None:
        """Refuse an array of which a piece is missing, as after a copy or a run that was cut off: it reads as zeros."""
        with reading(self.path, _quoted(key)):
            node = self._node(key)
            found, expected = self._pieces(node) if self._is_array(node) else (0, 0)
        if found < expected:
            raise FileError(
                f"{self.path}: {_quoted(key)} lacks {expected - found:,} of its {expected:,} chunks, which would be "
                "read as zeros; copy it again, or make it again"
            )

    def listed(self, key: str) -> str:
        """What a group holds, with shapes, for messages."""
        shapes = {name: self.shape(f"{key}/{name}" if key else name) for name in self.names(key)}
        shown = [f"{' '.join(name.split())} {'' if shape is None else shape}".strip() for name, shape in shapes.items()]
        return ", ".join(shown) or "nothing"

    def _check_all(self, key: str) -> None:
        """Check every array and group that reading an element would touch."""
        found = 0
        waiting = [(key, 0)]
        while waiting:
            at, depth = waiting.pop()
            found += 1
            if depth > DEEPEST or found > MOST:
                raise FileError(
                    f"{self.path}: {_quoted(key)} has more than {MOST:,} elements or {DEEPEST} levels, as if its links "
                    "form a circle; make the file again"
                )
            with reading(self.path, _quoted(at)):
                node = self._node(at)
                if node is None:
                    raise FileError(f"{self.path}: holds no {_quoted(at)}; it is damaged: make it again")
                if self._is_array(node):
                    self._check_array(node, _quoted(at))
                else:
                    _check_sparse(self, at, node.attrs)
                    waiting += [(f"{at}/{name}" if at else name, depth + 1) for name in self._children(at)]

    @abstractmethod
    def _node(self, key: str) -> Any:
        """The array or group of a key, or None."""

    @abstractmethod
    def _children(self, key: str) -> Iterable[str]:
        """Names of the elements in a group."""

    @abstractmethod
    def _is_array(self, node: Any) -> bool: ...

    @abstractmethod
    def _pieces(self, node: Any) -> tuple[int, int]:
        """How many chunks of an array are stored, and how many it has."""

    @abstractmethod
    def _check_array(self, node: Any, what: str) -> None:
        """Raise InputError for what must not be read."""


def width_of(shape: Sequence[int] | None) -> int | None:
    """F of a matrix of the shape [N, F]; None of anything else."""
    return int(shape[1]) if shape is not None and len(shape) == 2 else None


def _check_sparse(source: Source, key: str, attributes: Mapping[str, Any]) -> None:
    """Refuse a sparse matrix that declares other rows than its `indptr` has: scipy makes room for all of them."""
    encoding = attributes.get("encoding-type")
    if encoding not in ("csr_matrix", "csc_matrix"):
        return
    shape, pointers = source.shape(key), source.shape(f"{key}/indptr")
    along = encoding == "csc_matrix"
    if shape is None or len(shape) != 2 or min(shape) < 0 or pointers != [shape[along] + 1]:
        raise FileError(
            f"{source.path}: {_quoted(key)} has the shape {shape} but an indptr of the shape {pointers}; "
            "it is damaged: make it again"
        )


def _quoted(key: str) -> str:
    return repr(key) if key else "the file"


def is_anndata(source: Source) -> bool:
    """Whether a file holds an AnnData (old ones have no encoding attribute)."""
    return str(source.attributes().get("encoding-type")) == "anndata" or {"obs", "var"} <= set(source.names())


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


def patch_sizes(
    attributes: Mapping[str, Any], wanted: Mapping[str, tuple[float, float]], where: str, path: Path
) -> dict[str, float]:
    """The wanted attributes that are there and within their range; a warning for each that is not."""
    found = {}
    for name, (low, high) in wanted.items():
        value = attributes.get(name)
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.item()
        if value is None:
            continue
        number = isinstance(value, int | float | np.floating) and not isinstance(value, bool)
        if number and low <= value <= high and (wanted[name] != PIXELS or value == int(value)):
            found[name] = float(value)
        else:
            warn_ignored(path, f"{where.format(name)} is {shortened(value)}")
    return found


def warn_of_resize(
    path: Path, tool: str, patch: Patch | None, features: npt.NDArray[Any], encoder: str | None, input_pixels: Any
) -> None:
    """Warn where a tool's file betrays that its patches were resized before the encoder saw them.

    TRIDENT and LazySlide resize to 256 pixels and cut out the middle 224 before Gigapath, as its authors do: of a patch
    of 224 pixels it then sees 7/8 of the side. Neither says so, but the size of the patches tells.

    Parameters
    ----------
    features
        [N, F]; of another shape, which is refused where the slide is made, they are not looked at.
    encoder
        What computed them, as the file says; None: it says nothing.
    input_pixels
        What the file says that the encoder took; None: it says nothing.
    """
    if patch is None or features.ndim != 2:
        return
    see = "docs/features.md has the right call"
    if isinstance(input_pixels, int | np.integer) and not isinstance(input_pixels, bool) and input_pixels > 0:
        if input_pixels != patch.pixels:
            warn(
                f"{path}: its patches of {patch.pixels} pixels were resized to {input_pixels} before the encoder, "
                f"which saw {patch.microns / int(input_pixels):.2f} um a pixel; STPath was trained at 0.5: {see}"
            )
        return
    is_gigapath = features.shape[1] == GIGAPATH if encoder is None else "gigapath" in encoder.lower()
    if patch.pixels == CROPPED and is_gigapath:
        warn(
            f"{path}: patches of {CROPPED} pixels by {tool}, which resizes them to 256 and cuts out {CROPPED} before "
            f"Gigapath, unless it is told not to: the encoder saw {patch.microns * CROPPED / 256:.0f} um, not "
            f"{patch.microns:.0f}; {see}"
        )


def shortened(value: object) -> str:
    """A value as messages show it."""
    return " ".join(repr(value).split())[:60]
