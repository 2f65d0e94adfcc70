"""Training of STFlow: it learns, goes on, is exported and evaluated, and never sees a test slide."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.sparse import csr_matrix

from helpers import an_adata, made_up_vocabulary
from stpath_export.exporter import export_engine
from stpath_runtime import Engine, InputError
from stpath_runtime.cli.app import main
from stpath_train.config import differences, read_config
from stpath_train.flow_training import FlowMatching, FlowWindows
from stpath_train.store import Record, Store, Task
from stpath_train.training import train

CONFIG = """
data: {{store: {store}, validation: [S3], workers: 0, {data}}}
model: {model}
optimizer: {{learning_rate: 3e-3}}
run: {{out: {out}, accelerator: cpu, {run}}}
"""
SMALL = "{kind: stflow, d_model: 16, d_edge: 8, n_layers: 2, n_heads: 2, neighbors: 4}"
GENES = ["GENE5", "GENE2", "GENE9"]
SLIDES_AND_GENES = "slides: [S0, S1, S3], genes: [GENE5, GENE2, GENE9]"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Five slides on which the expression of a gene follows from the features."""
    store = Store.create(tmp_path_factory.mktemp("flow") / "store", made_up_vocabulary(40))
    for i in range(5):
        adata = an_adata(store.vocabulary, 60, genes=38, seed=i)
        rng = np.random.default_rng(i)
        adata.obsm["features"] = rng.standard_normal((60, 6)).astype(np.float32)
        counts = adata.X.toarray()
        counts[:, :12] = np.rint(np.expm1(np.abs(adata.obsm["features"][:, :1]) * 2))
        adata.X = csr_matrix(counts)
        store.add(Record(f"S{i}", "Breast", "Visium", patient=f"p{i}"), adata)
    store.add_task(
        "bench", Task(GENES, [{"train": ["S0", "S1", "S3"], "test": ["S2"]}, {"train": ["S3"], "test": ["S4"]}])
    )
    return store


@pytest.fixture
def configured(store, tmp_path):
    def make(out="run", model=SMALL, data=SLIDES_AND_GENES, run="epochs: 2"):
        path = tmp_path / f"{out}.yaml"
        path.write_text(CONFIG.format(store=store.path, out=tmp_path / out, model=model, data=data, run=run))
        return path

    return make


def test_a_run_learns_and_is_exported_with_its_own_config_and_genes(configured, store, tmp_path):
    model = train(read_config(configured(run="epochs: 40")))
    history = pd.read_csv(model.parent / "history.csv")
    assert history["validation_loss"].iloc[-5:].mean() < 0.8 * history["validation_loss"].iloc[:2].mean()
    best = history["validation_loss"].idxmin()
    (kept,) = (model.parent / "checkpoints").glob("best-*.ckpt")
    assert kept.name == f"best-epoch={best}.ckpt"  # what is saved is of this epoch
    state = torch.load(kept, weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[f"model.{key}"]) for key, value in load_file(model).items())

    folder = model.parent
    export_engine(model, tmp_path / "engine", folder / "genes.json", config=folder / "config.json")
    engine = Engine.load(tmp_path / "engine")
    assert engine.vocabulary.names(engine.vocabulary.all_tokens()) == GENES
    assert engine.predict(store.as_slide(store.read("S2"), "S2")).shape == (60, 3)

    words = ["evaluate", "expression", "--engine", tmp_path / "engine", "--data", store.path, "--benchmark", "bench"]
    words += ["--fold", 0, "--samples", 3, "--out", tmp_path / "scores"]
    assert main(list(map(str, words))) == 0
    report = json.loads((tmp_path / "scores" / "results.json").read_text())
    assert report["slides"] == ["S2"]
    assert (report["model"]["model"], report["model"]["samples"]) == ("stflow", 3)
    assert report["pictures"] == ["pearson.png", "calibration.png"]
    rows = pd.read_csv(tmp_path / "scores" / "results.csv")
    parts = rows[rows["protocol"] == "calibration"]
    assert parts["pairs"].sum() == 60 * 3
    assert parts["spread"].is_monotonic_increasing


def test_two_epochs_and_two_more_equal_four(configured, tmp_path):
    train(read_config(configured()))
    gone_on = load_file(train(read_config(configured(run="epochs: 4"))))
    at_once = load_file(train(read_config(configured("whole", run="epochs: 4"))))
    assert all(torch.equal(gone_on[key], value) for key, value in at_once.items())


def test_a_window_is_on_the_way_from_a_start_to_the_expression(store):
    from stpath_runtime.manifest import FlowConfig

    model = FlowConfig(n_genes=3, d_model=8, d_edge=8, n_layers=1, n_heads=2, n_features=6, start="zero", neighbors=4)
    windows = FlowWindows(store, ["S0", "S1"], 1, model, GENES, [0, 0])
    sizes = set()
    for draw in range(30):
        window = windows[draw]
        assert torch.allclose(window.state, window.time * window.expression)
        assert window.neighbors.max() < len(window.features)
        sizes.add(len(window.features))
        again = windows[draw]
        assert all(torch.equal(a, b) for a, b in zip(window, again, strict=True))
    assert min(sizes) < 15
    assert max(sizes) > 45
    adata = store.read("S0")
    whole = np.log1p(adata.to_df()[store.vocabulary.gene_ids(store.vocabulary.tokens(GENES))].to_numpy())
    shown = windows[0].expression.numpy()
    assert {tuple(row) for row in shown.round(4)} <= {tuple(row) for row in whole.round(4).astype(np.float32)}


def test_the_loss_is_the_mean_square_over_the_spots_of_all_windows(store):
    from stpath_runtime.manifest import FlowConfig
    from stpath_train.config import FlowOptimizer
    from stpath_train.stflow import seeded_flow

    config = FlowConfig(n_genes=3, d_model=8, d_edge=8, n_layers=1, n_heads=2, n_features=6, neighbors=4)
    module = FlowMatching(seeded_flow(config, 0), FlowOptimizer())
    windows = FlowWindows(store, ["S0", "S1"], 1, config, GENES, [0, 0])
    batch = [windows[0], windows[1]]
    losses = [module.loss([window])[0].item() for window in batch]
    sizes = [len(window.features) for window in batch]
    assert module.loss(batch)[0].item() == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)


def test_the_model_is_named_in_one_word_with_the_published_sizes(configured):
    config = read_config(configured(model="stflow"))
    assert (config.model.d_model, config.model.n_layers, config.model.neighbors, config.model.dropout) == (
        128,
        4,
        8,
        0.2,
    )
    assert (config.optimizer.clip, config.optimizer.warmup_steps) == (1.0, 0)
    assert differences(config, read_config(configured("other", model=SMALL)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"data": "genes: [GENE5], benchmark: bench"}, "give genes, or a benchmark"),
        ({"data": "slides: [S0, S3]"}, "give genes, or a benchmark"),
        ({"data": "benchmark: bench, fold: 7"}, "data.fold: 7, but bench has 2"),
        ({"data": "slides: [S0, S1], genes: [GENE5]"}, "data.validation: 'S3' is not among"),
        ({"data": "benchmark: bench, fold: 1"}, "no slide is left to train on"),
        ({"data": "slides: [S0, S3], genes: [GENE55]"}, "GENE55"),
        ({"data": "slides: [S0, S3], genes: [GENE5, GENE5]"}, "named more than once"),
        ({"model": "{kind: stflow, d_model: 20, n_heads: 4}"}, "does not divide"),
        ({"model": "{kind: stflow, d_modell: 20}"}, "no such field.*d_model"),
        ({"model": "{kind: stflow, steps: 1}"}, "model.steps"),
    ],
)
def test_faults_are_named_and_leave_nothing(how, said, configured, tmp_path):
    with pytest.raises(InputError, match=said), pytest.warns() if "more than once" in said else _nothing():
        train(read_config(configured(**how)))
    assert not (tmp_path / "run").exists()


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_a_run_by_a_benchmarks_fold_sees_its_training_slides_alone(configured, tmp_path):
    train(read_config(configured(data="benchmark: bench, fold: 0", run="epochs: 1")))
    assert json.loads((tmp_path / "run" / "store.json").read_text())["slides"] == ["S0", "S1", "S3"]
    assert json.loads((tmp_path / "run" / "genes.json").read_text())["genes"] == GENES
