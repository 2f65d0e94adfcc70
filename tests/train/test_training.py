"""Training runs: the objective, the loss curve, going on, several processes, and faults."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import a_store, an_adata, made_up_vocabulary, relative_l2, without_coverage
from stpath_runtime.errors import InputError, StoreError
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from stpath_train.config import Data, Masking, Optimizer, TrainConfig
from stpath_train.literal import literal_forward
from stpath_train.store import Record, Store
from stpath_train.training import MaskedGeneModelling, masked_loss, train
from stpath_train.windows import Windows, collate

CONFIG = """
data: {{store: {store}, spots: [16, 64], workers: 0{data}}}
model: {{{model}}}
optimizer: {{warmup_steps: 3, learning_rate: 3e-3}}
run: {{out: {out}, accelerator: cpu{run}}}
"""
THREADS = torch.get_num_threads()
SIZES = "d_model: 16, n_heads: 2, n_layers: 2, d_mlp: 32"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return a_store(tmp_path_factory.mktemp("training") / "store")


@pytest.fixture
def configured(store, tmp_path):
    """A config of a small run, as text in a file and as a TrainConfig."""

    def make(out: str = "run", model: str = SIZES, data: str = "", run: str = "epochs: 2") -> Path:
        parts = {"data": f", {data}" if data else "", "run": f", {run}", "model": model}
        path = tmp_path / f"{out}.yaml"
        path.write_text(CONFIG.format(store=store.path, out=tmp_path / out, **parts))
        return path

    return make


def run(path: Path) -> tuple[pd.DataFrame, dict[str, torch.Tensor]]:
    """Train in this process: the history and the weights.

    On as many threads as a process of its own has: scanpy changes them, and sums in another order are other numbers.
    """
    from stpath_train.config import read_config

    torch.set_num_threads(THREADS)
    model = train(read_config(path))
    return pd.read_csv(model.parent / "history.csv"), load_checkpoint(model).state_dict()


def command(path: Path) -> list[str]:
    return [sys.executable, "-m", "stpath_runtime", "train", str(path)]


def same(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def close(found: dict, expected: dict, tolerance: float) -> None:
    """Equal but for the order of sums. A key's bias moves no softmax: its gradient is rounding, scaled up by Adam."""
    for name, value in expected.items():
        rows = slice(None)
        if name.endswith("layernorm_qkv.1.bias"):
            rows = torch.cat([torch.arange(len(value) // 3), torch.arange(2 * len(value) // 3, len(value))])
        assert relative_l2(found[name][rows], value[rows]) < tolerance, name


def test_loss_and_gradients_equal_those_of_the_literal_formula_with_dense_tokens(store):
    data = Data(store=store.path, spots=(16, 64))
    windows = Windows(store, ["S0", "S1"], data, Masking(), [0, 0])
    batch = collate([windows[0], windows[1]])
    config = TrainConfig.model_validate({"data": {"store": "s"}, "run": {"out": "r", "epochs": 1}})
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 2, "d_mlp": 32, "n_features": 6, "n_tokens": 40}
    from stpath_runtime.manifest import ModelConfig

    model = seeded_checkpoint(ModelConfig(**sizes, n_organs=25, n_technologies=5), 0)
    module = MaskedGeneModelling(model, config.optimizer)
    module.double()
    batch.coords = batch.coords.double()
    batch.known = batch.known._replace(value=batch.known.value.double())
    loss = masked_loss(model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    expression = literal_forward(
        model, batch.features.double(), batch.coords, batch.organ, batch.technology, batch.context(), batch.sizes
    )[1]
    terms = []
    for asked in batch.asked:
        predicted = expression[asked.spots][:, asked.tokens]
        terms.append((predicted - asked.dense()).square().mean())
    literal = torch.stack(terms).mean()
    literal.backward()
    assert loss.item() == pytest.approx(literal.item(), rel=1e-6)  # the loss itself is taken in float32
    for name, p in model.named_parameters():
        assert relative_l2(found[name], p.grad) < 1e-6 or p.grad.abs().max() < 1e-12, name


def test_a_run_learns_and_its_checkpoint_can_be_loaded(configured, tmp_path):
    history, weights = run(configured(run="epochs: 12", data="validation: [S3], windows_per_slide: 4"))
    assert list(history["epoch"]) == list(range(1, 13))
    assert history["loss"].iloc[-3:].mean() < 0.8 * history["loss"].iloc[0]
    assert history["validation_loss"].iloc[-1] < history["validation_loss"].iloc[0]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000
    best = torch.load(next((tmp_path / "run/checkpoints").glob("best-*.ckpt")), weights_only=True)["state_dict"]
    same({f"model.{name}": value for name, value in weights.items()}, best)


KNN, VALIDATED = ", attention: knn, neighbors: 8", "validation: [S3]"
OTHER_PAIRS = [("", VALIDATED, 0), ("", "", 2), (KNN, "", 0), (KNN, VALIDATED, 2)]


@pytest.mark.parametrize(
    ("attention", "data", "workers"),
    [
        *(("", "", 0), ("", VALIDATED, 2), (KNN, VALIDATED, 0), (KNN, "", 2)),  # every pair of choices
        *(pytest.param(*choices, marks=pytest.mark.soak) for choices in OTHER_PAIRS),
    ],
)
def test_two_epochs_and_two_more_equal_four(configured, attention, data, workers):
    def trained(out: str, epochs: int):
        path = configured(out, SIZES + attention, data, run=f"epochs: {epochs}")
        path.write_text(path.read_text().replace("workers: 0", f"workers: {workers}"))
        return run(path)

    straight, (first, _), halves = trained("straight", 4), trained("halves", 2), trained("halves", 4)
    assert list(halves[0]["seconds"][:2]) == list(first["seconds"]), "the first epochs were trained again"
    pd.testing.assert_frame_equal(halves[0].drop(columns="seconds"), straight[0].drop(columns="seconds"))
    same(halves[1], straight[1])


def test_a_run_that_is_done_stays_as_it_is(configured):
    path = configured(run="epochs: 3", data="validation: [S3]")
    before, after = run(path), run(path)
    pd.testing.assert_frame_equal(before[0], after[0])
    same(after[1], before[1])


def test_the_attention_of_the_run_is_that_of_its_checkpoint(configured, tmp_path):
    near, _ = run(configured(model=SIZES + ", attention: knn, neighbors: 8", run="epochs: 1"))
    everywhere, _ = run(configured("global", run="epochs: 1"))
    assert abs(near["loss"][0] - everywhere["loss"][0]) > 1e-4  # same weights and windows, other attention
    config = load_checkpoint(tmp_path / "run" / "model.safetensors").config
    assert (config.attention, config.neighbors) == ("knn", 8)


def test_windows_loaded_by_other_processes_are_the_same(configured):
    alone = run(configured("alone", run="epochs: 2"))
    path = configured("helped", run="epochs: 2")
    path.write_text(path.read_text().replace("workers: 0", "workers: 2"))
    helped = run(path)
    same(helped[1], alone[1])


def test_accumulated_batches_equal_one_of_all(configured):
    data = "slides: [S0, S1, S2, S3]"
    together = run(configured("together", run="epochs: 2, batch: 4", data=data))
    accumulated = run(configured("accumulated", run="epochs: 2, batch: 2, accumulate: 2", data=data))
    close(accumulated[1], together[1], 1e-4)


def test_bf16_stays_near_fp32(configured):
    exact, _ = run(configured("exact", run="epochs: 3"))
    low, _ = run(configured("low", run="epochs: 3, precision: bf16"))
    np.testing.assert_allclose(low["loss"], exact["loss"], rtol=0.02)
    assert not np.array_equal(low["loss"], exact["loss"])


def test_early_stopping_ends_a_run(configured):
    path = configured(run="epochs: 50, early_stopping: 1", data="validation: [S3]")
    path.write_text(path.read_text().replace("learning_rate: 3e-3", "learning_rate: 1.0"))
    assert len(run(path)[0]) < 50


def test_a_run_that_stopped_early_stays_so_until_it_is_given_more_patience(configured):
    def patient(epochs: int) -> int:
        path = configured(run=f"epochs: 50, early_stopping: {epochs}", data="validation: [S3]")
        path.write_text(path.read_text().replace("learning_rate: 3e-3", "learning_rate: 1.0"))
        return len(run(path)[0])

    first = patient(1)
    assert patient(1) == first < 50
    assert patient(3) >= first + 2


def test_a_loss_that_is_no_number_ends_the_run_without_a_checkpoint(configured, tmp_path):
    path = configured(run="epochs: 5", data="slides: [S0, S1]")
    path.write_text(path.read_text().replace("learning_rate: 3e-3", "learning_rate: 1e38, clip: 0"))
    with pytest.raises(InputError, match="the loss is .*; lower optimizer.learning_rate"):
        run(path)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert np.isfinite(pd.read_csv(tmp_path / "run" / "history.csv")["loss"]).all()


def test_tensorboard_is_an_option(configured, tmp_path):
    run(configured(run="epochs: 1, logger: tensorboard"))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))


def test_the_command_prints_and_keeps_every_choice(configured, tmp_path, capsys):
    from stpath_runtime.cli.app import main

    assert main(["train", str(configured(run="epochs: 1"))]) == 0
    printed = capsys.readouterr().out
    assert "technology_dropped: 0.8" in printed
    assert (tmp_path / "run" / "config.yaml").read_text() in printed
    assert main(["train", "--example"]) == 0
    assert "warmup_steps: 100  # steps in which" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert main(["train", "nowhere.yaml"]) == 2


def test_a_fault_of_a_loading_process_is_one_line_and_the_run_goes_on(configured, tmp_path, monkeypatch, capfd):
    from stpath_runtime.cli.app import main
    from stpath_train import windows

    path = configured(run="epochs: 2")
    path.write_text(path.read_text().replace("workers: 0", "workers: 1"))
    read = windows.nearest_spots
    for fault, message in (
        (StoreError("slide S0: damaged"), "error[store]: slide S0: damaged"),
        (None, "error[memory]: a process that loads windows was killed, as where memory is short; run again with"),
    ):

        def fail(*_, fault=fault):
            if fault is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise fault

        monkeypatch.setattr(windows, "nearest_spots", fail)
        assert main(["train", str(path)]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
        assert line.startswith(message)
    monkeypatch.setattr(windows, "nearest_spots", read)
    assert main(["train", str(path)]) == 0
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 2


@pytest.mark.parametrize(
    ("gpus", "how", "message"),
    [
        (0, "accelerator: gpu", "run.accelerator: gpu, but PyTorch finds no GPU; set it to cpu"),
        (2, "accelerator: auto, devices: 3", "run.devices: 3, but PyTorch finds 2 GPUs; set it to 2 or fewer"),
    ],
)
def test_gpus_that_are_not_there_are_named(configured, monkeypatch, gpus, how, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    path = configured(run="epochs: 1")
    path.write_text(path.read_text().replace("accelerator: cpu", how))
    with pytest.raises(InputError, match=message):
        run(path)


def test_memory_that_is_short_is_named(configured, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("stpath_train.training.masked_loss", fail)
    with pytest.raises(InputError, match="the GPU has not enough memory; lower run.batch"):
        run(configured(run="epochs: 1"))


def test_a_store_that_changed_is_not_gone_on_with(tmp_path, configured, store):
    changing = a_store(tmp_path / "changing")
    path = configured(run="epochs: 1")
    path.write_text(path.read_text().replace(str(store.path), str(changing.path)))
    run(path)
    changing.add(Record("new", "Breast", "Visium"), an_adata(changing.vocabulary))
    with pytest.raises(InputError, match="its slides are no longer those that the run in .* began with"):
        run(path)


@pytest.fixture
def of_other_genes(tmp_path):
    """A store of as many genes and features as the others, of which none has the same token."""
    known = made_up_vocabulary(41)
    vocabulary = GeneVocabulary(known.ensembl_ids[1:], known.symbols[1:], known.aliases[1:])
    other = Store.create(tmp_path / "other", vocabulary)
    other.add(Record("S0", "Breast", "Visium"), an_adata(vocabulary))
    return other


def test_a_checkpoint_knows_its_genes(configured, store, of_other_genes, tmp_path):
    from stpath_export.exporter import export_engine
    from stpath_train.evaluation.predictor import open_predictor

    run(configured(run="epochs: 1"))
    trained = tmp_path / "run" / "model.safetensors"
    open_predictor(None, trained, store)
    with pytest.raises(InputError, match="model.safetensors: trained on other genes than those of .*other"):
        open_predictor(None, trained, of_other_genes)
    with pytest.raises(InputError, match="trained on other genes"):
        export_engine(trained, tmp_path / "engine", of_other_genes.path / "genes.tsv.gz")
    path = configured("tuned", f"checkpoint: {trained}")
    path.write_text(path.read_text().replace(str(store.path), str(of_other_genes.path)))
    with pytest.raises(InputError, match="trained on other genes"):
        run(path)


def test_fine_tuning_is_one_line(configured, store, tmp_path):
    first = run(configured("first"))[1]
    tuned = run(configured("tuned", f"checkpoint: {tmp_path}/first/model.safetensors"))[1]
    assert tuned.keys() == first.keys()
    from stpath_train.config import read_config
    from stpath_train.training import _model

    config = read_config(configured("tuned", f"checkpoint: {tmp_path}/first/model.safetensors"))
    same(_model(store, config).state_dict(), first)


def test_two_processes_train_as_one_with_their_windows_together(configured, tmp_path):
    one = run(configured("one", run="epochs: 2, batch: 2"))
    path = configured("two", run="epochs: 2, batch: 1, devices: 2")
    done = subprocess.run(command(path), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    history = pd.read_csv(tmp_path / "two" / "history.csv")
    np.testing.assert_allclose(history["loss"], one[0]["loss"], rtol=1e-5)
    close(load_checkpoint(tmp_path / "two" / "model.safetensors").state_dict(), one[1], 1e-4)


@pytest.fixture(scope="module")
def six_epochs(store, tmp_path_factory):
    """History and weights of a run of six epochs that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    text = CONFIG.format(store=store.path, out=folder / "run", data="", run=", epochs: 6", model=SIZES)
    (folder / "run.yaml").write_text(text)
    return run(folder / "run.yaml")


@pytest.mark.parametrize("moment", ["config.yaml", "checkpoints/last-epoch=0*", "checkpoints/last-epoch=3*"])
def test_a_run_that_is_killed_goes_on_to_the_same_curve(configured, six_epochs, tmp_path, moment):
    path = configured("killed", run="epochs: 6")
    path.write_text(path.read_text().replace("workers: 0", "workers: 1"))
    process = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob(moment)) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it was done before it was killed"
    again = run(path)
    pd.testing.assert_frame_equal(again[0].drop(columns="seconds"), six_epochs[0].drop(columns="seconds"))
    same(again[1], six_epochs[1])


def test_ctrl_c_ends_a_run_that_goes_on_later(configured, tmp_path):
    path = configured(run="epochs: 4000")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command(path), **pipes, text=True, env=without_coverage())
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/last-epoch=1*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert "error[interrupted]: interrupted" in process.communicate(timeout=60)[0]
    assert process.returncode == 130
    done = len(pd.read_csv(tmp_path / "run" / "history.csv"))
    assert len(run(configured(run=f"epochs: {done + 2}"))[0]) == done + 2


def test_a_checkpoint_that_is_half_written_is_passed_over(configured, tmp_path):
    straight = run(configured("straight", run="epochs: 4"))
    run(configured("cut", run="epochs: 3"))
    last = tmp_path / "cut" / "checkpoints" / "last-epoch=2.ckpt"
    last.write_bytes(last.read_bytes()[:-2000])
    (tmp_path / "cut" / ".config.yaml.1.partial").touch()
    left_behind = last.with_name("last-epoch=0.ckpt")  # by a kill: the run does not know of it
    left_behind.touch()
    again = run(configured("cut", run="epochs: 4"))
    assert not left_behind.exists()
    pd.testing.assert_frame_equal(again[0].drop(columns="seconds"), straight[0].drop(columns="seconds"))
    same(again[1], straight[1])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"data": "validation: [S9]"}, "no slide 'S9'; it has 4"),
        ({"data": "slides: [S0], validation: [S1]"}, "'S1' is not among data.slides"),
        ({"data": "slides: [S0], validation: [S0]"}, "no slide is left to train on"),
        ({"model": "checkpoint: nowhere.pth"}, "no such checkpoint"),
        ({"run": "epochs: 2, logger: wandb"}, "wandb is not installed"),
    ],
)
def test_faults_are_named_and_leave_nothing(configured, tmp_path, how, message):
    from stpath_train.config import read_config

    with pytest.raises(InputError, match=message):
        train(read_config(configured(**how)))
    assert not (tmp_path / "run").exists()


def test_another_run_or_another_folder_is_not_touched(configured, tmp_path):
    run(configured(run="epochs: 1"))
    with pytest.raises(InputError, match=r"a run with another config \(run.seed 0, now 1\)"):
        run(configured(run="epochs: 1, seed: 1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(InputError, match="is not a run of stpath"):
        run(configured("mine"))


def test_a_checkpoint_that_does_not_fit_the_store_is_refused(configured, tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"a model of .* those of .* are 6"):
        run(configured(model=f"checkpoint: {tiny_checkpoint}"))
    run(configured("first", run="epochs: 1"))
    with pytest.raises(InputError, match="model.d_model: 32, but .* has 16; leave the sizes out"):
        run(configured("second", f"checkpoint: {tmp_path}/first/model.safetensors, d_model: 32"))


def test_patients_do_not_stand_on_both_sides_and_counts_are_raw(tmp_path):
    from dataclasses import replace

    from helpers import an_adata
    from stpath_train.config import read_config

    store = a_store(tmp_path / "store", slides=2)
    record = store.records["S0"]
    store.add(replace(record, slide="T", counts="log1p", patient="p0"), an_adata(made_up_vocabulary(40)))
    for data, message in (
        ("validation: [T]", "of patient 'p0', who has slides in training too"),
        ("slides: [S1, T]", "log-transformed already; set data.counts to log1p"),
    ):
        path = tmp_path / "c.yaml"
        path.write_text(f"data: {{store: store, {data}}}\nrun: {{out: run, epochs: 1}}\n")
        with pytest.raises(InputError, match=message):
            train(read_config(path))


def test_saved_weights_are_in_the_published_layout(tmp_path, tiny):
    model = MaskedGeneModelling(copy.deepcopy(tiny.model), Optimizer()).model  # which makes it trainable
    save_checkpoint(model, tmp_path / "x.safetensors")
    same(load_checkpoint(tmp_path / "x.safetensors").state_dict(), tiny.model.state_dict())
