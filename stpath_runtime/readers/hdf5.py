"""HDF5 files: AnnData's h5ad, and files of features by HEST, STPath, TRIDENT or CLAM."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import FileError, SlideError
from ..slides.slide import Patch
from ..slides.vocabulary import nearest_names
from .sources import (
    KINDS,
    PIXELS,
    PLUGINS,
    SCALES,
    Parts,
    Source,
    check_size,
    chunk_count,
    patch_sizes,
    reading,
    warn_of_resize,
)

FEATURES = ("embeddings", "features")  # STPath and HEST; TRIDENT and CLAM
BARCODES = ("barcodes", "barcode")
SECTION = "section"
ENCODER_INPUT = "patch_encoder_img_size"  # as TRIDENT calls what its encoder takes
OURS = "preprocessing"  # an attribute of files that `stpath features` writes, which resizes nothing
MOST_LINKS = 100_000
HEAP = b"GCOL\x01\0\0\0"  # how a global heap begins, in which HDF5 keeps texts
HEAP_OBJECT = struct.Struct("<H6xQ")  # its index and length
LARGEST_SEARCHED = 2**30  # bytes
TRIDENT = {
    "patch_size": PIXELS,
    "target_magnification": SCALES,
    "patch_size_level0": PIXELS,
    "level0_magnification": SCALES,
}


@contextmanager
def open_hdf5(path: Path) -> Iterator[Source]:
    """Open an HDF5 file without links to other files.

    Raises
    ------
    InputError
        If it is damaged, or a link leads to another file.
    """
    import h5py

    with reading(path):
        _check_heaps(path)
        file = h5py.File(path, "r")
    with file:
        _check_links(file, path)
        yield Hdf5Source(path, file)


def _check_heaps(path: Path) -> None:
    """Refuse a text heap with an object of a wrong size: HDF5 would loop in it forever.

    Format: HDF5 file format specification, III.E, global heap. Files above LARGEST_SEARCHED are not searched: of those
    little is read, and to read all of them would take longer than the rest.
    """
    size = path.stat().st_size
    if not 0 < size <= LARGEST_SEARCHED:
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        heap = data.find(HEAP)
        while heap >= 0:
            at, end = heap + 16, min(heap + int.from_bytes(data[heap + 8 : heap + 16], "little"), size)
            while at + 16 <= end:
                index, length = HEAP_OBJECT.unpack_from(data, at)
                step = 16 + -(-length // 8) * 8 if index else length  # object 0 is what is free, its header included
                if not 16 <= step <= end - at:
                    raise FileError(f"{path}: damaged (an object of {length:,} bytes in a heap of text); copy it again")
                at += step
            heap = data.find(HEAP, heap + 8)


class Hdf5Source(Source):
    """An open HDF5 file."""

    def _node(self, key: str) -> Any:
        if not key:
            return self.root
        return self.root[key] if self.root.get(key, getlink=True) is not None else None

    def _children(self, key: str) -> list[str]:
        return list(self._node(key))

    def _is_array(self, node: Any) -> bool:
        import h5py

        return isinstance(node, h5py.Dataset)

    def _pieces(self, node: Any) -> tuple[int, int]:
        if node.chunks is None:
            return int(node.id.get_storage_size() > 0), int(bool(node.size))
        return node.id.get_num_chunks(), chunk_count(node.shape, node.chunks)

    def _check_array(self, node: Any, what: str) -> None:
        import h5py

        if node.external or node.is_virtual:
            raise FileError(f"{self.path}: {what} keeps its data in another file; copy the data into this one")
        if node.dtype.kind not in KINDS and h5py.check_string_dtype(node.dtype) is None:
            raise FileError(f"{self.path}: {what} is of type {node.dtype}; expected numbers or text")
        if missing := _missing_filter(node):
            raise FileError(f"{self.path}: {what} is compressed by {missing}, which is not here; {PLUGINS}")
        if node.shape:
            pieces = node.chunks or node.shape
            chunks = chunk_count(node.shape, pieces)
            declared = max(math.prod(node.shape), math.prod(pieces)) * node.dtype.itemsize
            # A file may declare that it stores more than its length.
            stored = min(node.id.get_storage_size(), self.path.stat().st_size)
            check_size(self.path, what, declared, chunks, stored)


def _missing_filter(node: Any) -> str | None:
    """The name of a filter that an array is compressed by and this HDF5 lacks."""
    import h5py

    made = node.id.get_create_plist()
    for i in range(made.get_nfilters()):
        code, _, _, name = made.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            return f"the filter {name.decode(errors='replace').strip() or 'without a name'} ({code})"
    return None


def _check_links(file: Any, path: Path) -> None:
    """Refuse links out of the file, anywhere in it: a soft link may lead through one."""
    import h5py

    count = 0

    def leaves(name: bytes, link: Any) -> bytes | None:
        nonlocal count
        count += 1
        inside = link.type in (h5py.h5l.TYPE_HARD, h5py.h5l.TYPE_SOFT) and count <= MOST_LINKS
        return None if inside else name

    with reading(path):
        found = file.id.links.visit(leaves, info=True)
    if count > MOST_LINKS:
        raise FileError(f"{path}: holds more than {MOST_LINKS:,} datasets; give the features of one slide")
    if found is not None:
        name = found.decode(errors="replace")
        raise FileError(f"{path}: {name!r} is a link to another file; copy the data into this one")


def read_features(source: Source, features_key: str | None) -> Parts:
    """Read a file of features.

    Raises
    ------
    InputError
        If it has no features or coordinates, several features, or image patches instead.
    """
    path, found = source.path, source.names()
    name = _features_name(source, features_key)
    if "coords" not in found:
        raise SlideError(f"{path}: no coordinates; expected a dataset 'coords' [N, 2], found: {source.listed('')}")
    features, coords = source.array(name), source.array("coords")
    for key in (name, "coords"):
        source.require_whole(key)
    if features.ndim == 3 and features.shape[0] == 1:  # (1, N, F), as TRIDENT writes some
        features = features[0]
    barcodes = next((source.array(key) for key in BARCODES if key in found), None)
    if barcodes is not None and barcodes.dtype.kind not in "SOUiu":
        raise SlideError(f"{path}: the barcodes are of type {barcodes.dtype}; expected text")
    sections = None
    if (
        SECTION in found
        and source.shape(SECTION) == [len(coords)]
        and (names := source.array(SECTION)).dtype.kind in "SO"
    ):
        sections = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    patch = _patch(source.attributes("coords"), path)
    if OURS not in source.attributes():
        said = {**source.attributes(), **source.attributes(name), **source.attributes("coords")}
        warn_of_resize(path, "TRIDENT", patch, features, _encoder(said, path), said.get(ENCODER_INPUT))
    return Parts(coords, features, barcodes, patch, sections)


def _features_name(source: Source, features_key: str | None) -> str:
    """The dataset with the features."""
    path, found = source.path, source.names()
    if features_key is not None:
        if features_key not in found:
            near = nearest_names(features_key, found)
            raise SlideError(f"{path}: no dataset {features_key!r}{near}; it holds: {source.listed('')}")
        return features_key
    names = [name for name in FEATURES if name in found]
    if len(names) > 1:
        raise SlideError(f"{path}: holds {source.listed('')}; say which are the features (features_key)")
    if not names and "img" in found:
        raise SlideError(
            f"{path}: holds image patches ('img' {source.shape('img')}) and no features; compute them first: "
            f"stpath features {path} --out FEATURES.h5"
        )
    if not names:
        raise SlideError(
            f"{path}: no features; expected a dataset {' or '.join(map(repr, FEATURES))}, found: {source.listed('')}"
        )
    return names[0]


def _encoder(said: Mapping[str, Any], path: Path) -> str | None:
    """What a TRIDENT file's features are by: it keeps them in a folder features_ENCODER, which it names, too."""
    if isinstance(said.get("encoder"), str):
        return str(said["encoder"])
    found = re.search(r"features_([\w.-]+)", f"{said.get('savetodir')} {path.absolute().parent}")
    return found[1] if found is not None else None


def _patch(attributes: Mapping[str, Any], path: Path) -> Patch | None:
    """The patch that the attributes of `coords` tell of, or None; those that cannot be are ignored with a warning."""
    found = patch_sizes(attributes, TRIDENT, "the attribute {} of 'coords'", path)
    if "patch_size" not in found or "target_magnification" not in found:
        return None
    level0_pixels = int(found["patch_size_level0"]) if "patch_size_level0" in found else None
    pixels, magnification = int(found["patch_size"]), found["target_magnification"]
    return Patch(pixels, magnification, level0_pixels, found.get("level0_magnification"))
