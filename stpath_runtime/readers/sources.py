"""An open file of named elements, HDF5 or zarr: every element is checked before it is read.

This limits what a file can make us do: no pickle, nothing outside the file, no more memory than the file fills.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import FileError
from ..slides.slide import Patch
from .checks import reading

KINDS = "biufSUT"  # booleans, numbers and text of fixed or variable length: what numpy calls them
DEEPEST, MOST = 32, 2_000  # of elements within one: a file whose links form a circle has no end


class Parts(NamedTuple):
    """The parts of a slide in a file."""

    coords: npt.NDArray[Any]  # [N, 2]
    features: npt.NDArray[Any]  # [N, F]
    barcodes: npt.NDArray[Any] | None  # [N] or [N, 1]
    patch: Patch | None = None


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
