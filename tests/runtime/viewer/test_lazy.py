"""The prediction as an AnnData in zarr that is computed as it is read: zarr's own tests of a store, and its readers."""

from __future__ import annotations

import pickle

import anndata as ad
import numpy as np
import pytest
import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.buffer.cpu import Buffer as HostBuffer
from zarr.testing.store import StoreTests

from stpath_runtime import InputError
from stpath_runtime.viewer import lazy
from stpath_runtime.viewer.lazy import PredictionStore, open_lazy

WRITES = ("set", "set_many", "set_not_open", "delete", "delete_dir", "delete_nonexistent_key_does_not_raise", "clear")
WRITES += ("set_if_not_exists", "read_only_store_raises", "with_read_only_store")


class Filled(PredictionStore):
    """One that holds what zarr's tests put there, and no chunk of X."""

    def __init__(self, shown, read_only=True):
        super().__init__(shown)
        self.files, self.chunks = {}, [0, 0]
        assert read_only

    async def set(self, key, value):
        self.files[key] = value.to_bytes()


class TestStore(StoreTests[Filled, HostBuffer]):
    """Those of zarr's tests that a store which is only read can pass; they fill it beside its methods."""

    store_cls = Filled
    buffer_cls = HostBuffer

    async def set(self, store: Filled, key: str, value: Buffer) -> None:
        store.files[key] = value.to_bytes()

    async def get(self, store: Filled, key: str) -> Buffer:
        return self.buffer_cls.from_bytes(store.files[key])

    @pytest.fixture
    def store_kwargs(self, shown):
        return {"shown": shown}

    def test_store_repr(self, store):
        assert repr(store).startswith("PredictionStore('")

    def test_store_supports_writes(self, store):
        assert not store.supports_writes

    def test_store_supports_listing(self, store):
        assert store.supports_listing

    def test_store_read_only(self, store):
        assert store.read_only
        with pytest.raises(AttributeError):
            store.read_only = False

    @pytest.mark.parametrize("read_only", [True])
    async def test_store_open_read_only(self, open_kwargs, read_only):
        await super().test_store_open_read_only(open_kwargs, read_only)

    @pytest.mark.skip(reason="its file is open in this process alone")
    async def test_serializable_store(self, store): ...


for name in WRITES:
    setattr(TestStore, f"test_{name}", pytest.mark.skip(reason="it writes")(lambda self: None))


async def test_nothing_is_written(shown):
    store = PredictionStore(shown)
    one = HostBuffer.from_bytes(b"1")
    for writing in (store.set("X/0.0", one), store.set_if_not_exists("a", one), store.delete("X/0.0")):
        with pytest.raises(ValueError, match="read-only"):
            await writing


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(lazy, "SPOTS", 128)
    monkeypatch.setattr(lazy, "GENES", 7)


async def test_every_chunk_is_what_the_engine_decodes(small_chunks, shown, every_gene):
    group = zarr.open_group(PredictionStore(shown), mode="r")
    np.testing.assert_allclose(group["X"][:], every_gene, atol=1e-5)
    assert group["X"].chunks == (128, 7)


async def test_a_chunk_is_computed_when_it_is_asked_for_alone(small_chunks, shown, monkeypatch):
    store, asked = PredictionStore(shown), []
    real = shown.expression.expression
    monkeypatch.setattr(shown.expression, "expression", lambda *part: asked.append(part) or real(*part))
    assert await store.exists("X/2.1")
    assert store.size("X/2.1") == 128 * 7 * 4
    assert asked == []
    found = await store.get("X/2.1", default_buffer_prototype())
    assert len(found) == 128 * 7 * 4
    assert asked == [(slice(256, 300), slice(7, 14))]


@pytest.mark.parametrize(
    "key", ["X/3.0", "X/0.99", "X/00.1", "X/0.1.2", "X/-1.0", "X/0", "X/a.b", "X/².0", "Y/0.0", "", "X"]
)
async def test_what_is_not_there_is_not_there(small_chunks, shown, key):
    store = PredictionStore(shown)
    assert await store.get(key, default_buffer_prototype()) is None
    assert not await store.exists(key)
    assert store.size(key) is None


def test_anndata_reads_it_lazily(prediction, loaded, predicted, every_gene):
    adata = open_lazy(prediction, loaded)
    assert adata.shape == (len(predicted), len(loaded.vocabulary))
    assert list(adata.obs_names) == list(predicted.obs_names)
    genes = ["GENE3", "GENE1"]
    columns = [loaded.vocabulary.find(name) - 2 for name in genes]
    np.testing.assert_allclose(adata[:, genes].X.compute(), every_gene[:, columns], atol=1e-5)
    np.testing.assert_array_equal(adata.obsm["spatial"][:], predicted.obsm["spatial"])
    assert adata.obs["context"].to_numpy().sum() == 5
    assert str(adata.uns["stpath"]["organ"]) == "Kidney"


def test_anndata_reads_it_over_the_network(client, predicted, every_gene):
    aiohttp = pytest.importorskip("aiohttp")
    assert aiohttp
    store = zarr.storage.FsspecStore.from_url(
        f"{client.base}/zarr", storage_options={"headers": {"Authorization": f"Bearer {client.token}"}}, read_only=True
    )
    adata = ad.experimental.read_lazy(zarr.open_group(store, mode="r", use_consolidated=True))
    np.testing.assert_allclose(adata.X.compute(), every_gene, atol=1e-5)
    assert list(adata.obs_names) == list(predicted.obs_names)


def test_it_is_not_pickled(shown):
    with pytest.raises(TypeError, match="open in this process alone; call open_lazy"):
        pickle.dumps(zarr.open_array(PredictionStore(shown), path="X", mode="r"))


def test_without_an_engine_the_genes_of_the_file_are_there(prediction, predicted):
    adata = open_lazy(prediction)
    assert list(adata.var_names) == list(predicted.var_names)
    np.testing.assert_array_equal(adata.X.compute(), predicted.X)


def test_another_engine_is_refused_by_both_names(prediction, tiny_fp16_engine):
    from stpath_runtime import Engine

    other = Engine.load(tiny_fp16_engine)
    with pytest.raises(InputError, match=rf"predicted by another engine \(.*not {tiny_fp16_engine}"):
        open_lazy(prediction, other)
