"""The export of STFlow, and its proof of parity."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers import FLOW_SIZES, load_flow_golden, relative_l2, write_flow_checkpoint
from stpath_export.exporter import export_engine
from stpath_export.stflow.exporter import write_flow_engine
from stpath_export.stflow.proof import prove
from stpath_runtime import Engine, InputError, Slide
from stpath_runtime.cli.app import main
from stpath_runtime.errors import ParityError
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.stflow import STFlow, seeded_flow

SMALL = replace(FLOW_SIZES, n_genes=7, d_model=16, d_edge=8, n_features=12)


@pytest.mark.parametrize(
    "changed",
    [
        {"activation": "gelu", "n_layers": 1},
        {"activation": "silu", "n_heads": 2, "neighbors": 3},
        {"activation": "relu", "n_layers": 3, "start": "gaussian"},
        {"d_edge": 24, "n_heads": 8, "n_layers": 1, "steps": 2, "start": "zero"},
    ],
)
def test_every_activation_and_size_keeps_parity(changed, tmp_path):
    model = seeded_flow(replace(SMALL, **changed), 3)
    checkpoint, config, genes = write_flow_checkpoint(model, tmp_path)
    report = export_engine(checkpoint, tmp_path / "engine", genes, config=config)
    assert report["passed"]
    assert {row["spots"] for row in report["cases"]} >= {1, 2, 9, 37, 500}
    engine = Engine.load(tmp_path / "engine")
    assert (engine.manifest.model, engine.manifest.family) == (model.config, "stflow")
    assert engine.manifest.encoder == "UNI"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_edges_whose_gates_are_nearly_closed_keep_their_digits(backend, tmp_path):
    torch.manual_seed(5)  # of two of its four inner edges the largest value is 0.007, behind the norm 1
    model = STFlow(replace(SMALL, n_genes=10, n_features=100, n_layers=1)).eval().requires_grad_(False)
    genes = GeneVocabulary.of_names([f"GENE{i}" for i in range(10)], "genes")
    write_flow_engine(model, genes, tmp_path, "fp32", {"name": "model", "sha256": "0" * 64}, "random")
    assert prove(tmp_path, model, backend=backend)["passed"]


def test_half_precision_keeps_to_twice_the_error_of_pytorch(tmp_path):
    golden = load_flow_golden("random_small")
    checkpoint, config, genes = write_flow_checkpoint(golden.model, tmp_path)
    export_engine(checkpoint, tmp_path / "engine", genes, "fp16", config=config)
    given = {"start": golden.arrays["x0"], "neighbor_index": golden.arrays["neighbors"]}
    found = Engine.load(tmp_path / "engine").predict(golden.slide, **given)
    assert 1e-6 < relative_l2(found.X, golden.arrays["output"]) < 5e-3


def test_scores_of_large_numbers_do_not_overflow_in_half_precision(tmp_path):
    model = load_flow_golden("random_small").model
    with torch.no_grad():
        for block in model.blocks:
            block.attn.mlp_attn.fc1.weight *= 30  # what the norm takes is squared: in the tens of thousands, and above
    checkpoint, config, genes = write_flow_checkpoint(model, tmp_path)
    export_engine(checkpoint, tmp_path / "engine", genes, "fp16", config=config)  # proven


def test_edges_of_a_slide_of_many_pixels_do_not_overflow_in_half_precision(tmp_path):
    checkpoint, config, genes = write_flow_checkpoint(load_flow_golden("random_small").model, tmp_path)
    export_engine(checkpoint, tmp_path / "engine", genes, "fp16", config=config)
    rng = np.random.default_rng(0)
    slide = Slide(rng.random((50, 2)) * 100_000, rng.standard_normal((50, 24), np.float32))
    assert np.isfinite(Engine.load(tmp_path / "engine").predict(slide).X).all()


def test_an_engine_that_is_wrong_is_not_published(monkeypatch, tmp_path):
    checkpoint, config, genes = write_flow_checkpoint(seeded_flow(replace(SMALL, n_layers=1), 0), tmp_path)
    real = write_flow_engine

    def wrong(model, *given, **options):
        with torch.no_grad():
            model.blocks[0].mlp.fc2.bias[0] += 0.01
            written = real(model, *given, **options)
            model.blocks[0].mlp.fc2.bias[0] -= 0.01
        return written

    monkeypatch.setattr("stpath_export.stflow.exporter.write_flow_engine", wrong)
    with pytest.raises(ParityError, match="miss the bar"):
        export_engine(checkpoint, tmp_path / "engine", genes, config=config)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_slide_of_the_user_is_compared_too(backend, flow_engine):
    golden = load_flow_golden("random_small")
    report = prove(flow_engine, golden.model.float(), [golden.slide], backend=backend)
    rows = [row for row in report["cases"] if row["case"] == "golden"]
    assert [row["path"] for row in rows] == ["tiles", "small tiles", "one of 3 samples", "edges anew in each step"]
    assert report["passed"]


def test_the_command_line_exports_and_verifies(tmp_path, capsys):
    checkpoint, config, genes = write_flow_checkpoint(seeded_flow(replace(SMALL, n_layers=1), 0), tmp_path)
    words = ["export", checkpoint, "--config", config, "--genes", genes, "--out", tmp_path / "engine"]
    assert main(list(map(str, words))) == 0
    assert "comparisons with float64 passed" in capsys.readouterr().out
    words = ["verify", tmp_path / "engine", "--checkpoint", checkpoint]
    for given in (words, [*words, "--config", config]):  # the engine says what the weights do not
        assert main(list(map(str, given))) == 0
        assert "passed" in capsys.readouterr().out
    write_flow_checkpoint(seeded_flow(replace(SMALL, n_layers=2), 0), tmp_path)
    assert main(list(map(str, words))) == 2
    assert "another model than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (["GENE1"] * 6, "6 genes, but .* has 7"),
        ({"genes": ["A", "B", "C", "D", "E", "F", "A"]}, "'A' appears twice"),
        ({"names": ["A"]}, "no list of genes"),
        ([1, 2, 3, 4, 5, 6, 7], "no list of genes"),
    ],
)
def test_genes_that_are_not_the_models_own_are_refused(content, said, tmp_path):
    checkpoint, config, genes = write_flow_checkpoint(seeded_flow(SMALL, 0), tmp_path)
    genes.write_text(json.dumps(content))
    with pytest.raises(InputError, match=said):
        export_engine(checkpoint, tmp_path / "engine", genes, config=config)
    with pytest.raises(InputError, match="give them with --genes"):
        export_engine(checkpoint, tmp_path / "engine", None, config=config)
    with pytest.raises(InputError, match="give its config.json"):
        export_engine(checkpoint, tmp_path / "engine", genes)


def test_a_config_is_refused_for_the_other_model(tiny_checkpoint, tiny_genes, tmp_path):
    with pytest.raises(InputError, match="of checkpoints of STFlow"):
        export_engine(tiny_checkpoint, tmp_path / "engine", tiny_genes, config=tmp_path / "config.json")


def test_genes_have_the_ids_that_stpath_knows():
    genes = GeneVocabulary.of_names(["EPCAM", "GATA3", "MINE", "TM4SF6", "TSPAN6"], "genes.json")
    assert genes.names(genes.all_tokens()) == ["EPCAM", "GATA3", "MINE", "TM4SF6", "TSPAN6"]
    # Two names of one gene: the second keeps its name as id.
    assert genes.ensembl_ids == ("ENSG00000119888", "ENSG00000107485", "MINE", "ENSG00000000003", "TSPAN6")
