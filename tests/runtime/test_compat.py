"""Published scripts with one import changed."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from helpers import made_up_vocabulary, relative_l2, write_symbol_table
from stpath_runtime import Engine, InputError
from stpath_runtime.compat import STPathInference
from stpath_runtime.errors import InputWarning
from stpath_runtime.files import sha256


@pytest.fixture(scope="module")
def agent(tiny_engine, tiny_genes):
    return STPathInference(gene_voc_path=str(tiny_genes), model_weight_path=str(tiny_engine), device="cpu")


def test_inference_gives_the_published_outputs(agent, tiny):
    a = tiny.arrays
    adata = agent.inference(
        coords=a["coords"],
        img_features=tiny.features,
        context_ids=a["context_ids"],
        context_gene_exps=a["context_counts"],
        context_gene_names=tiny.vocabulary.names(a["context_gene_ids"]),
        organ_type="Brain",
        tech_type=None,
        save_gene_names=tiny.genes,
    )
    assert relative_l2(adata.X, tiny.prediction) <= 1e-5
    assert list(adata.var_names) == tiny.genes
    np.testing.assert_allclose(adata.obsm["coordinates"], a["normalized_coords"], atol=1e-5)


def test_a_checkpoint_is_exported_once_beside_itself(one_layer_checkpoint, tiny, tiny_genes, tmp_path, monkeypatch):
    checkpoint = shutil.copy(one_layer_checkpoint, tmp_path / "stfm.pth")
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)  # an export takes twice as long with it
    first = STPathInference(str(tiny_genes), str(checkpoint), "cpu")
    (engine,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert engine.name.startswith("stfm.pth.engine-")
    assert first.engine.manifest.checkpoint["sha256"] == sha256(checkpoint)
    monkeypatch.setattr("subprocess.run", lambda *a, **k: pytest.fail("exported again"))
    again = STPathInference(tiny_genes, checkpoint, "cpu")
    given = tiny.arrays["coords"], tiny.features
    np.testing.assert_array_equal(first.inference(*given).X, again.inference(*given).X)


def test_an_engine_is_used_as_it_is(tiny_engine, tiny_genes, tiny, tmp_path):
    agent = STPathInference(None, tiny_engine, "cpu")
    adata = agent.inference(tiny.arrays["coords"], tiny.features)
    assert list(adata.var_names) == list(tiny.vocabulary.ensembl_ids)
    other = write_symbol_table(made_up_vocabulary(100), tmp_path / "other.json")
    with pytest.raises(InputError, match="other genes than those of the engine"):
        STPathInference(other, tiny_engine, "cpu")
    STPathInference(tiny_genes, tiny_engine, "cpu")


def test_the_published_default_device_runs_with_a_warning(tiny_engine, tiny_genes):
    with pytest.warns(InputWarning, match="runs on the CPU"):
        agent = STPathInference(tiny_genes, tiny_engine)
    assert agent.engine.backend.device == "cpu"
    with pytest.raises(InputError, match="cuda:0"):
        STPathInference(tiny_genes, tiny_engine, device="cuda:0")


def test_ovary_is_others_as_published(agent, tiny):
    a = tiny.arrays
    published = agent.inference(a["coords"], tiny.features, organ_type="Ovary").X
    others = agent.inference(a["coords"], tiny.features, organ_type=None).X
    ovary = agent.inference(a["coords"], tiny.features, organ_type="ovary").X
    np.testing.assert_array_equal(published, others)
    assert not np.array_equal(ovary, others)


def test_faults(agent, tiny, tiny_genes, tmp_path):
    coords, features = tiny.arrays["coords"], tiny.features
    with pytest.raises(InputError, match="all three"):
        agent.inference(coords, features, context_gene_exps=np.ones((1, 1)))
    with pytest.raises(InputError, match="unknown gene"):
        agent.inference(coords, features, save_gene_names=["FOO"])
    with pytest.raises(InputError, match="no such file"):
        STPathInference(tiny_genes, tmp_path / "missing.pth", "cpu")
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"weights")
    with pytest.raises(InputError, match="the export failed.*broken.pth"):
        STPathInference(tiny_genes, broken, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pth"]


def test_the_agent_is_an_engine(agent):
    assert isinstance(agent.engine, Engine)
