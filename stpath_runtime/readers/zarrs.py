"""Zarr stores, format 2 and 3: a folder or a .zarr.zip, checked as a whole before anything in it is opened."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ..errors import FileError, warn
from .sources import KINDS, Source, check_size, chunk_count, reading

ROOTS = ("zarr.json", ".zgroup")  # format 3 and 2
METADATA = (*ROOTS, ".zarray")
LARGEST_METADATA = 64 * 2**20
# What anndata, spatialdata and OME-Zarr writers use. Left out: whatever makes objects (pickle, json2, msgpack2).
_COMPRESSORS = ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")
_FILTERS = ("shuffle", "delta", "crc32", "crc32c", "adler32", "fletcher32")
CODECS = {
    *(*_COMPRESSORS, *_FILTERS, "vlen-utf8", "vlen-bytes"),
    *("bytes", "transpose", "sharding_indexed"),
    *(f"numcodecs.{name}" for name in (*_COMPRESSORS, *_FILTERS)),
}


@dataclass(frozen=True)
class Files:
    """The files of a store."""

    sizes: Mapping[str, int]  # name, with / between its parts -> bytes
    open: Callable[[str], IO[bytes]]


@contextmanager
def open_zarr(path: Path) -> Iterator[ZarrSource]:
    """Open a zarr store that holds nothing that must not be read.

    Raises
    ------
    InputError
        If it is damaged; names a codec that is not in `CODECS` or stores objects, anywhere; has links or names that
        leave it; or is an archive that declares absurdly more than it stores.
    """
    import zarr
    from zarr.storage import LocalStore, ZipStore

    if path.is_dir():
        files = _folder_files(path)
        _check_metadata(files, path)
        with reading(path):
            root = zarr.open_group(LocalStore(path, read_only=True), mode="r", use_consolidated=False)
        yield ZarrSource(path, root, files)
        return
    with reading(path):
        archive = zipfile.ZipFile(path)
    with archive:
        files = _archive_files(archive, path)
        _check_metadata(files, path)
        with reading(path):
            store = ZipStore(path, mode="r", read_only=True)
            root = zarr.open_group(store, mode="r", use_consolidated=False)
        try:
            yield ZarrSource(path, root, files)
        finally:
            store.close()


class ZarrSource(Source):
    """An open zarr store."""

    def __init__(self, path: Path, root: Any, files: Files) -> None:
        super().__init__(path, root)
        self.files = files
        # By group. zarr would open all children to list them, and leave tracebacks behind where one is damaged.
        self.children = defaultdict[str, set[str]](set)
        for name in files.sizes:
            group, _, child = name.rpartition("/")[0].rpartition("/")
            if child and _last(name) in METADATA:
                self.children[group].add(child)

    def _node(self, key: str) -> Any:
        return self.root.get(key) if key else self.root

    def _children(self, key: str) -> set[str]:
        return self.children.get(key, set())

    def _is_array(self, node: Any) -> bool:
        import zarr

        return isinstance(node, zarr.Array)

    def _pieces(self, node: Any) -> tuple[int, int]:
        stored, whole = len(self._chunk_files(node)), chunk_count(node.shape, node.shards or node.chunks)
        if stored or node.shape[:1] == (1,):  # a slide of one spot at the origin is all zeros
            # zarr does not write chunks of zeros, but missing chunks may also mean an interrupted copy.
            if 0 < stored < whole:
                warn(f"{self.path}: {node.path!r} stores {stored:,} of its {whole:,} chunks; the others are zeros")
            return 1, 1
        return 0, whole

    def _chunk_files(self, node: Any) -> dict[str, int]:
        """Sizes of the files that hold the data of an array."""
        inside = f"{node.path}/"
        files = {name: size for name, size in self.files.sizes.items() if name.startswith(inside)}
        return {name: size for name, size in files.items() if _last(name) not in (*METADATA, ".zattrs")}

    def _check_array(self, node: Any, what: str) -> None:
        # Objects are text: the metadata of the whole store was checked for the codec vlen-utf8.
        if node.dtype.kind not in f"{KINDS}O":
            raise FileError(f"{self.path}: {what} is of type {node.dtype}; expected numbers or text")
        pieces = [node.chunks, node.shards or node.chunks]
        chunks = max(chunk_count(node.shape, piece) for piece in pieces)
        largest = max(math.prod(sizes) for sizes in (node.shape, *pieces))
        check_size(self.path, what, largest * node.dtype.itemsize, chunks, sum(self._chunk_files(node).values()))


def _folder_files(path: Path) -> Files:
    """The files of a folder, none of which is a link out of it or anything but a file."""
    inside, sizes, folders = path.resolve(), {}, [""]
    with reading(path):
        while folders:
            folder = folders.pop()
            for entry in os.scandir(path / folder):
                name = folder + entry.name
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(inside):
                    raise FileError(f"{entry.path}: a link out of the zarr folder; copy the data into it")
                if entry.is_file():
                    sizes[name] = entry.stat().st_size
                elif not entry.is_dir():
                    raise FileError(f"{entry.path}: neither a file nor a folder; a zarr folder holds nothing else")
                elif not entry.is_symlink():
                    folders.append(f"{name}/")
    return Files(sizes, lambda name: (path / name).open("rb"))


def _archive_files(archive: zipfile.ZipFile, path: Path) -> Files:
    """The files of an archive, whose names stay in it and which do not unpack to absurdly more than it is long."""
    with reading(path):  # zipfile fails at an entry without a name
        sizes = {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    for name in sizes:
        if name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise FileError(f"{path}: the archive has an entry {name!r}, a name that leaves it; make it again")
    check_size(path, "the archive", sum(sizes.values()), 1, path.stat().st_size)
    return Files(sizes, archive.open)


def _check_metadata(files: Files, path: Path) -> None:
    """Refuse codecs and types that make objects, anywhere in a store."""
    for name, size in files.sizes.items():
        if _last(name) not in (".zarray", ".zmetadata", "zarr.json"):
            continue
        if size > LARGEST_METADATA:
            raise FileError(f"{path}: the metadata {name!r} is {size:,} bytes long; it is damaged: make it again")
        with reading(path, repr(name)), files.open(name) as file:
            found = json.load(file)
            if not isinstance(found, dict):
                raise ValueError("no JSON object")
            consolidated = found if name.endswith(".zmetadata") else found.get("consolidated_metadata") or {}
            nodes = consolidated.get("metadata") or {}
            nodes = [node for key, node in nodes.items() if not key.endswith((".zattrs", ".zgroup"))]
            for node in [found, *nodes]:
                _check_node(node, f"{path}: {name!r}")


def _check_node(node: Mapping[str, Any], where: str) -> None:
    """Check the metadata of one array (or group, which has none of these)."""
    given = [*(node.get("filters") or []), *(node.get("codecs") or []), node.get("compressor")]
    codecs = _codec_names([codec for codec in given if codec is not None])
    if refused := [name for name in codecs if name not in CODECS]:
        raise FileError(
            f"{where} names the codec {refused[0]!r}, which is not read (it may run code); write it again with "
            "blosc or zstd"
        )
    kind = node.get("dtype", "")
    if not isinstance(kind, str) or ("O" in kind and "vlen-utf8" not in codecs):
        raise FileError(f"{where} stores objects of type {kind!r}, which are not read; write numbers or text")


def _codec_names(codecs: list[Any]) -> list[str]:
    """Names of codecs and of those within them (shards have some)."""
    names = []
    for codec in codecs:
        if isinstance(codec, str):
            names.append(codec)
            continue
        names += [str(codec[key]) for key in ("id", "name") if key in codec] or ["None"]  # format 2 and 3
        inner = codec.get("configuration") or {}
        names += _codec_names([*(inner.get("codecs") or []), *(inner.get("index_codecs") or [])])
    return names


def _last(name: str) -> str:
    return name.rpartition("/")[2]
