"""Engine directories: what they hold, and that nothing unproven is published."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

from helpers import a_store, relative_l2
from stpath_export import exporter, proof
from stpath_export.exporter import export_engine
from stpath_export.stages import graphs
from stpath_runtime import Engine, InputError, ParityError
from stpath_runtime.cli.app import main
from stpath_runtime.manifest import Manifest
from stpath_train.inputs import slide_inputs


def test_stages_compose_to_the_reference(tiny):
    _, slide, context = tiny.slides()[0]
    model = tiny.model
    stage = {graph.name: graph.module for graph in graphs(model)}
    given = slide_inputs(slide, tiny.vocabulary, context)
    coords, tokens = given["coords"], given["context"]

    mask = stage["tokens"](torch.ones(1, 1), torch.tensor([1]))
    rows = torch.cat([mask, stage["tokens"](tokens.log_counts, tokens.token_ids)])
    row = torch.zeros(len(slide), dtype=torch.int64)
    row[tokens.spots] = torch.arange(1, len(rows))
    x, k, v = stage["embed"](given["features"], given["organ"], given["technology"], rows, row)
    for layer in (1, 2):
        x, k, v = stage[f"block_{layer}"](x, coords, k, v, coords)
    (x,) = stage["block_3"](x, coords, k, v, coords)

    exact = model.embed(**given)
    assert relative_l2(x, exact) <= 1e-6
    genes = torch.tensor([5, 2, 77])
    assert relative_l2(stage["head"](x, genes), model.decode(exact, genes)) <= 1e-6


def test_engine_directory(tiny_engine, tiny):
    names = sorted(path.name for path in tiny_engine.iterdir())
    graph_names = ["embed", "fused", "fused_knn", "head", "tokens"]
    graph_names += [f"{kind}_{layer}" for kind in ("block", "knn_block") for layer in (1, 2, 3)]
    assert names == sorted([f"{name}.onnx" for name in graph_names] + ["engine.json", "genes.tsv.gz", "weights.bin"])
    manifest = json.loads((tiny_engine / "engine.json").read_text())
    assert set(manifest["files"]) == set(names) - {"engine.json"}
    assert manifest["parity"]["passed"]
    assert manifest["versions"]["torch"].startswith("2.")
    # Every weight once, though the fused graph has them all again.
    parameters = sum(p.numel() for p in tiny.model.parameters())
    assert (tiny_engine / "weights.bin").stat().st_size <= 4 * parameters + 64 * len(tiny.model.state_dict())


@pytest.mark.parametrize("name", ["tokens", "embed", "block_1", "knn_block_3", "head", "fused", "fused_knn"])
def test_graphs_are_clean(tiny_engine, name):
    model = onnx.load(tiny_engine / f"{name}.onnx", load_external_data=False)
    assert model.opset_import[0].version == 23
    operators = [node.op_type for node in model.graph.node]
    for operator in ("Shape", "Loop", "Scan", "If", "GatherND"):  # other runtimes reject these, or lose speed on them
        assert operator not in operators
    assert operators.count("Attention") == {"block_1": 1, "knn_block_3": 1, "fused": 3, "fused_knn": 3}.get(name, 0)
    assert (tiny_engine / f"{name}.onnx").stat().st_size < 100_000
    text = str(model)
    for trace in ("stack_trace", "/stages.py", "metadata_props"):
        assert trace not in text
    for end in (*model.graph.input, *model.graph.output):
        sizes = [dim.dim_param for dim in end.type.tensor_type.shape.dim if dim.dim_param]
        assert set(sizes) <= {"spots", "keys", "genes", "rows", "blocks", "64*blocks", "8*key_groups"}
        assert sizes


def test_half_precision_engine(tiny, tiny_fp16_engine):
    engine = Engine.load(tiny_fp16_engine)
    assert engine.manifest.parity["passed"]
    _, slide, context = tiny.slides()[0]
    adata = engine.predict(slide, genes=tiny.genes, context=context)
    assert adata.X.dtype == np.float32
    assert adata.uns["stpath"]["precision"] == "fp16"
    assert 1e-5 < relative_l2(adata.X, tiny.prediction) < 5e-3
    float32 = sum(p.numel() for p in tiny.model.parameters()) * 4
    assert (tiny_fp16_engine / "weights.bin").stat().st_size < 0.6 * float32


def test_a_trained_model_goes_straight_into_an_engine_that_attends_as_it_was_trained(tmp_path):
    from stpath_train.config import TrainConfig
    from stpath_train.evaluation.predictor import open_predictor
    from stpath_train.training import train

    store = a_store(tmp_path / "store")
    config = {
        "data": {"store": store.path, "spots": (16, 64), "workers": 0},
        "model": {"d_model": 16, "n_heads": 2, "n_layers": 1, "d_mlp": 32, "attention": "knn", "neighbors": 8},
        "run": {"out": tmp_path / "run", "epochs": 1, "accelerator": "cpu"},
    }
    trained = train(TrainConfig.model_validate(config))
    assert export_engine(trained, tmp_path / "engine", store.path / "genes.tsv.gz")["passed"]
    slide, genes = store.as_slide(store.read("S0"), "S0"), ["GENE1", "GENE5"]
    found, expected = (
        predictor.decode(predictor.embed(slide), genes)
        for predictor, _ in (open_predictor(tmp_path / "engine", None, store), open_predictor(None, trained, store))
    )
    assert relative_l2(found, expected) < 1e-5
    assert Manifest.read(tmp_path / "engine").model.neighbors == 8


def test_an_engine_below_the_bar_is_not_published(tiny_engine, tiny_checkpoint, tiny_genes, tmp_path, monkeypatch):
    def slightly_wrong(model, vocabulary, directory, precision, checkpoint, on_step=None):
        shutil.copytree(tiny_engine, directory, dirs_exist_ok=True)
        model.model.blks[1].mlp.fc2.weight.data *= 1.001  # the reference is no longer what was exported
        return Manifest.read(directory)

    monkeypatch.setattr(exporter, "write_engine", slightly_wrong)
    with pytest.raises(ParityError, match=r"58 of 58 comparisons miss the bar.*relative L2"):
        export_engine(tiny_checkpoint, tmp_path / "e", tiny_genes)
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_nothing(tiny_checkpoint, tiny_genes, tmp_path, monkeypatch):
    def crash(model, vocabulary, directory, **_):
        vocabulary.write(directory / "genes.tsv.gz")
        raise ZeroDivisionError

    monkeypatch.setattr(exporter, "write_engine", crash)
    with pytest.raises(ZeroDivisionError):
        export_engine(tiny_checkpoint, tmp_path / "e", tiny_genes)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tiny_checkpoint, tiny_genes, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_engine(tiny_checkpoint, tmp_path, tiny_genes)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_grid_covers_what_it_should(tiny):
    cases = proof.grid(tiny.model, tiny.vocabulary)
    assert {len(case.slide) for case in cases} == {1, 2, 37, 500}
    for spots in (1, 2, 37, 500):
        seen = {(c.context is not None, c.genes is None) for c in cases if len(c.slide) == spots}
        assert len(seen) == 4
    assert len({case.slide.organ for case in cases}) >= 10
    assert len({case.slide.technology for case in cases}) == 5


def test_bfloat16_is_not_proven_on_a_cpu(tiny_checkpoint, tmp_path, capsys):
    assert main(["export", str(tiny_checkpoint), "--out", str(tmp_path / "engine"), "--precision", "bf16"]) == 2
    assert "precision bf16: the proof of such an engine runs on a GPU; give --device cuda:0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
