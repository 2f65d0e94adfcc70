"""A prediction as an AnnData in zarr whose X is computed as it is read: nothing of it lies on a disk.

Source of the layout: https://anndata.readthedocs.io/en/stable/fileformat-prose.html; of the store:
https://zarr.readthedocs.io/en/stable/user-guide/storage.html#developing-custom-stores.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ..engine import Engine
from ..results.output import ARRAY
from .shown import Shown, open_shown

if TYPE_CHECKING:
    from anndata import AnnData

SPOTS, GENES = 65_536, 8  # of a chunk of X: 2 MiB, and a gene of a slide is few of them
METADATA = ".zmetadata"


class PredictionStore(Store):
    """A prediction as a read-only zarr store, format 2: an AnnData whose X holds every gene that can be shown.

    Everything but X is written once, into memory. A chunk of X is computed when it is asked for.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True
    supports_consolidated_metadata = True

    def __init__(self, shown: Shown) -> None:
        super().__init__(read_only=True)
        self.shown = shown
        self.files = _files(shown)
        self.chunks = [-(-len(shown) // SPOTS), -(-len(shown.genes) // GENES)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PredictionStore) and other.shown is self.shown

    __hash__ = None  # type: ignore[assignment]

    def __dask_tokenize__(self) -> tuple[str, int]:
        """What tells it from others, for dask."""
        return str(self), id(self.shown)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled, at once: dask tries, and would copy all embeddings before it failed."""
        raise TypeError(f"{self} is open in this process alone; call open_lazy in each that reads it")

    def __str__(self) -> str:
        return f"prediction://{self.shown.path}"

    def __repr__(self) -> str:
        return f"PredictionStore({str(self.shown.path)!r})"

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """What a key holds, or None."""
        from zarr.core.buffer import default_buffer_prototype

        if not self._is_open:
            await self._open()
        content = await asyncio.to_thread(self.content, key)
        if content is None:
            return None
        return (prototype or default_buffer_prototype()).buffer.from_bytes(_part(content, byte_range))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """What keys hold, in parts."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Whether a key holds anything."""
        return key in self.files or self._chunk(key) is not None

    def content(self, key: str) -> bytes | None:
        """What a key holds, or None; a chunk of X is computed."""
        if key in self.files:
            return self.files[key]
        chunk = self._chunk(key)
        if chunk is None:
            return None
        self.shown.require_unchanged()
        rows = slice(chunk[0] * SPOTS, min((chunk[0] + 1) * SPOTS, len(self.shown)))
        genes = slice(chunk[1] * GENES, min((chunk[1] + 1) * GENES, len(self.shown.genes)))
        whole = np.zeros((SPOTS, GENES), "<f4")  # a chunk at an edge is as large as the others
        whole[: rows.stop - rows.start, : genes.stop - genes.start] = self.shown.expression.expression(rows, genes)
        return whole.tobytes()

    def size(self, key: str) -> int | None:
        """Bytes that a key holds, without computing them; None where there is nothing."""
        if key in self.files:
            return len(self.files[key])
        return SPOTS * GENES * 4 if self._chunk(key) is not None else None

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in self.files:
            yield key
        for i in range(self.chunks[0]):
            for j in range(self.chunks[1]):
                yield f"X/{i}.{j}"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """The keys that begin with a prefix."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names of what is in a group or array."""
        start = f"{prefix.rstrip('/')}/" if prefix.strip("/") else ""
        seen = set()
        async for key in self.list_prefix(start):
            name = key[len(start) :].partition("/")[0]
            if name not in seen:
                seen.add(name)
                yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse."""
        self._check_writable()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Refuse."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refuse."""
        self._check_writable()

    async def set_partial_values(self, key_start_values: Iterable[tuple[str, int, bytes]]) -> None:
        """Refuse."""
        self._check_writable()

    def _chunk(self, key: str) -> tuple[int, int] | None:
        """Which chunk of X a key names."""
        array, _, place = key.rpartition("/")
        numbers = place.split(".")
        if array != "X" or len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers):
            return None
        chunk = int(numbers[0]), int(numbers[1])
        written_so = place == f"{chunk[0]}.{chunk[1]}"  # not 01.2
        return chunk if written_so and chunk[0] < self.chunks[0] and chunk[1] < self.chunks[1] else None


def open_lazy(prediction: str | Path, engine: Engine | None = None) -> AnnData:
    """A prediction as an AnnData of all genes, whose X is computed where it is read.

    Parameters
    ----------
    prediction
        What `stpath predict --embeddings` wrote, h5ad, zarr or SpatialData.
    engine
        What predicted it; None: the genes that the file holds.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction, or another engine predicted it.

    Examples
    --------
    >>> adata = open_lazy(embedded_path, engine)
    >>> adata.shape == (adata.n_obs, len(engine.vocabulary))
    True
    >>> values = adata[:, "GENE1"].X.compute()  # [N, 1]
    """
    from anndata.experimental import read_lazy

    kept = ExitStack()  # the file stays open for as long as the AnnData is in use
    store = PredictionStore(kept.enter_context(open_shown(Path(prediction), engine)))
    store.kept = kept  # type: ignore[attr-defined]
    return read_lazy(store)


def _files(shown: Shown) -> dict[str, bytes]:
    """Every file of the store but the chunks of X."""
    import anndata.io
    import pandas as pd
    import zarr
    from anndata import AnnData
    from zarr.storage import MemoryStore

    obs = pd.DataFrame(index=pd.Index(list(shown.spot_names), dtype=object))
    if shown.context is not None:
        obs["context"] = shown.context
    ids = list(shown.genes.vocabulary.ensembl_ids)
    var = pd.DataFrame({"gene_ids": ids}, index=pd.Index(list(shown.genes.names), dtype=object))
    frame = AnnData(obs=obs, var=var, obsm={"spatial": shown.coords}, uns={"stpath": dict(shown.facts)})
    memory = MemoryStore()
    group = zarr.open_group(memory, mode="w", zarr_format=2)
    anndata.io.write_elem(group, "/", frame)
    shape = (len(shown), len(shown.genes))
    x = group.create_array("X", shape=shape, chunks=(SPOTS, GENES), dtype="<f4", compressors=None, overwrite=True)
    x.attrs.update(ARRAY)
    zarr.consolidate_metadata(memory, zarr_format=2)
    return {key: value.to_bytes() for key, value in memory._store_dict.items()}


def _part(content: bytes, byte_range: ByteRequest | None) -> bytes:
    if isinstance(byte_range, RangeByteRequest):
        return content[byte_range.start : byte_range.end]
    if isinstance(byte_range, OffsetByteRequest):
        return content[byte_range.offset :]
    if isinstance(byte_range, SuffixByteRequest):
        return content[-byte_range.suffix :]
    if byte_range is not None:
        raise TypeError(f"Unexpected byte_range, got {byte_range!r}")  # what zarr's own stores raise
    return content
