"""Features of patches: those of timm on the centre crop, and runs that were stopped go on."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stpath_runtime.cli.app import main
from stpath_runtime.errors import InputError, InputWarning
from stpath_runtime.images.features import FeaturesJob, extract_one, find_targets
from stpath_runtime.images.sources import check_patches
from stpath_runtime.readers import read_slide
from stpath_train.features import ENCODERS, IMAGENET, load_encoder

MODEL = "test_resnet"  # of timm, 0.4 M parameters; mean and std are 0.5


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Weights of the model, its classifier among them, as timm's are."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    model = timm.create_model(MODEL, pretrained=False, zero_init_last=False)
    for name, buffer in model.named_buffers():  # batch normalisation that does something
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def encoder(weights):
    return load_encoder(MODEL, weights)


def extract(patches, out, encoder, batch_size=64, on_batch=None):
    return extract_one(FeaturesJob(patches, out), encoder, batch_size, on_batch).total


def write_patches(path: Path, n: int = 7, height: int = 224, width: int = 224, seed: int = 0) -> Path:
    """Patches as HEST-1k has them."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        images = rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)
        file.create_dataset("img", data=images, chunks=(1, height, width, 3), maxshape=(None, height, width, 3))
        file["coords"] = rng.integers(0, 20_000, (n, 2))
        file["barcode"] = np.array([[f"AAAC{i}-1".encode()] for i in range(n)])
    return path


def by_timm(weights: Path, images: np.ndarray) -> np.ndarray:
    """What timm's model gives for the centre of each patch."""
    model = timm.create_model(MODEL, pretrained=False, num_classes=0).eval()
    state = safetensors.torch.load_file(weights)
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    top, left = (round((size - 224) / 2) for size in images.shape[1:3])
    centre = images[:, top : top + 224, left : left + 224].astype(np.float32) / 255
    with torch.inference_mode():
        return model(torch.from_numpy((centre - 0.5) / 0.5).permute(0, 3, 1, 2)).numpy()


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.integers(224, 260), st.integers(224, 260), st.integers(1, 6))
@example(3, 241, 256, 2)
def test_features_are_those_of_timm_on_the_centre(tmp_path_factory, weights, encoder, n, height, width, batch_size):
    folder = tmp_path_factory.mktemp("features")
    patches = write_patches(folder / "a.h5", n, height, width)
    assert extract(patches, folder / "out.h5", encoder, batch_size) == n
    slide = read_slide(folder / "out.h5")
    with h5py.File(patches) as file:
        np.testing.assert_allclose(slide.features, by_timm(weights, file["img"][()]), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(slide.coords, file["coords"][()])
        assert slide.obs_names == [barcode.decode() for barcode in file["barcode"][:, 0]]
    assert slide.features.dtype == np.float32


def test_the_file_says_how_it_was_computed(tmp_path, weights, encoder):
    extract(write_patches(tmp_path / "a.h5"), tmp_path / "out.h5", encoder)
    with h5py.File(tmp_path / "out.h5") as file:
        said = dict(file.attrs)
        assert set(file) == {"embeddings", "coords", "barcodes"}
    assert (said["encoder"], said["dtype"], said["timm"]) == (MODEL, "float32", timm.__version__)
    assert re.fullmatch("sha256 [0-9a-f]{64}", said["weights"])
    assert said["preprocessing"] == (
        "centre crop 224, no resizing, /255, normalised by mean and std (mean 0.5 0.5 0.5, std 0.5 0.5 0.5)"
    )
    assert not list(tmp_path.glob(".*"))


class Stopped(Exception):
    pass


def stop_at(rows: int):
    def on_batch(done: int, total: int) -> None:
        if done >= rows:
            raise Stopped

    return on_batch


def test_a_run_that_was_stopped_goes_on(tmp_path, encoder):
    patches, out = write_patches(tmp_path / "a.h5"), tmp_path / "out.h5"
    whole = tmp_path / "whole.h5"
    extract(patches, whole, encoder, 2)
    with pytest.raises(Stopped):
        extract(patches, out, encoder, 2, stop_at(4))
    assert not out.exists()
    batches = []
    assert extract(patches, out, encoder, 2, lambda *counts: batches.append(counts)) == 7
    assert batches == [(6, 7), (7, 7)]  # the first four rows are not computed again
    np.testing.assert_array_equal(read_slide(out).features, read_slide(whole).features)
    batches.clear()
    extract(patches, out, encoder, 2, lambda *counts: batches.append(counts))
    assert batches == []  # nor is a whole file


def test_a_run_that_was_killed_goes_on(tmp_path, weights, encoder):
    patches, out = write_patches(tmp_path / "a.h5"), tmp_path / "out.h5"
    killed = f"""
import os, signal, sys
sys.path[:0] = {[str(Path(__file__).parents[1]), *sys.path]!r}
import conftest  # declares what torchvision lacks
from stpath_runtime.images.features import FeaturesJob, extract_one
from stpath_train.features import load_encoder
from pathlib import Path
def on_batch(done, total):
    if done >= 4:
        os.kill(os.getpid(), signal.SIGKILL)
job = FeaturesJob(Path({str(patches)!r}), Path({str(out)!r}))
extract_one(job, load_encoder({MODEL!r}, {str(weights)!r}), 2, on_batch)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    batches = []
    extract(patches, out, encoder, 2, lambda *counts: batches.append(counts))
    assert batches == [(6, 7), (7, 7)]
    with h5py.File(patches) as file:
        np.testing.assert_allclose(read_slide(out).features, by_timm(weights, file["img"][()]), rtol=1e-4, atol=1e-5)


def test_a_file_begun_with_other_settings_or_damaged_starts_over(tmp_path, weights, encoder):
    patches, out = write_patches(tmp_path / "a.h5"), tmp_path / "out.h5"
    with pytest.raises(Stopped):
        extract(patches, out, encoder, 2, stop_at(4))
    write_patches(patches, seed=1)
    batches = []
    with pytest.warns(InputWarning, match="begun with other tiles; it starts over"):
        extract(patches, out, encoder, 2, lambda *counts: batches.append(counts))
    assert batches[0] == (2, 7)
    with h5py.File(patches) as file:
        np.testing.assert_allclose(read_slide(out).features, by_timm(weights, file["img"][()]), rtol=1e-4, atol=1e-5)
    out.unlink()
    (tmp_path / ".out.h5.partial").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    extract(patches, out, encoder)
    assert len(read_slide(out)) == 7


def test_another_file_is_not_overwritten(tmp_path, encoder):
    patches, out = write_patches(tmp_path / "a.h5"), tmp_path / "out.h5"
    extract(patches, out, encoder)
    write_patches(patches, seed=1)
    with pytest.raises(InputError, match="exists, and is of other tiles"):
        extract(patches, out, encoder)
    out.write_text("something else")
    with pytest.raises(InputError, match="exists, and is of other encoder, weights, preprocessing, dtype, timm, tiles"):
        extract(patches, out, encoder)


def test_weights_of_pytorch_are_read_too(tmp_path, weights, encoder):
    torch.save({"state_dict": safetensors.torch.load_file(weights)}, tmp_path / "model.pth")
    images = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_encoder(MODEL, tmp_path / "model.pth")(images), encoder(images))


@pytest.mark.parametrize("name", ENCODERS)
def test_published_encoders_are_built_as_published(name):
    """Their numbers of parameters are those that others report: 1,134,953,984 and 303,350,784."""
    published = ENCODERS[name]
    with torch.device("meta"):
        model = timm.create_model(published.architecture, pretrained=False, num_classes=0, **published.arguments)
        width = model(torch.zeros(1, 3, 224, 224)).shape[1]
    counted = (width, sum(parameter.numel() for parameter in model.parameters()))
    assert counted == {"gigapath": (1536, 1_134_953_984), "uni": (1024, 303_350_784)}[name]


def test_a_published_encoder_comes_from_the_hub_as_its_authors_say(monkeypatch):
    asked = {}

    def create_model(name, **arguments):
        asked.update(arguments, name=name)
        return timm.models.create_model(MODEL, num_classes=0)

    monkeypatch.setattr(timm, "create_model", create_model)
    encoder = load_encoder("uni")
    arguments = {"pretrained": True, "num_classes": 0, "init_values": 1e-5, "dynamic_img_size": True}
    assert asked == arguments | {"name": "hf-hub:MahmoodLab/uni"}
    assert encoder.about["weights"] == "hf-hub:MahmoodLab/uni"
    assert (encoder.mean, encoder.std) == IMAGENET


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((MODEL + "t",), "unknown encoder 'test_resnett' .did you mean test_resnet"),
        ((MODEL, "nowhere.pth"), "--weights nowhere.pth: no such file"),
        (("test_vit2", "weights"), "not weights of test_vit2 .lacks 'reg_token'; 210 in all"),
        ((MODEL, "text"), "not weights of test_resnet"),
        ((MODEL, "weights", "gpu"), "unknown device 'gpu'; give cpu or cuda:N"),
        ((MODEL, "weights", "cuda:99"), "cuda:99: "),
        (("vit_tiny_patch16_384", "of_vit"), "does not run on patches of 224 x 224 pixels"),
        (("test_vit3",), "test_vit3.*: the Hub cannot be reached"),
    ],
)
def test_faults_of_the_encoder_are_named(tmp_path, weights, monkeypatch, arguments, message):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "text.pth").write_text("no weights")
    torch.save(timm.create_model("vit_tiny_patch16_384", pretrained=False).state_dict(), tmp_path / "vit.pth")
    files = {"weights": weights, "text": tmp_path / "text.pth", "of_vit": tmp_path / "vit.pth"}
    with pytest.raises(InputError, match=message):
        load_encoder(*(files.get(argument, argument) for argument in arguments))


def damaged(path: Path) -> Path:
    path.write_bytes(write_patches(path).read_bytes()[:3000])
    return path


def without(path: Path, name: str, instead=None) -> Path:
    with h5py.File(write_patches(path), "r+") as file:
        del file[name]
        if instead is not None:
            file[name] = instead
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "no such patches file"),
        (lambda path: path.mkdir() or path, "a folder, not a patches file"),
        (lambda path: path.write_text("# Slides") and path, "neither a slide image by its name .* nor a patches file"),
        (damaged, "cannot be read as HDF5"),
        (lambda path: without(path, "img"), "expected datasets 'img' and 'coords', found: barcode, coords"),
        (lambda path: without(path, "coords", np.zeros((6, 2))), "7 images but 6 rows of 'coords'"),
        (lambda path: without(path, "img", np.zeros((7, 224, 224, 3))), "img is float64"),
        (lambda path: write_patches(path, width=223), r"\[7, 224, 223, 3\]; expected uint8 \[N, H, W, 3\]"),
        (lambda path: write_patches(path, n=0), r"img is uint8 \[0, 224"),
    ],
)
def test_faults_of_a_patches_file_are_named(tmp_path, make, message):
    with pytest.raises(InputError, match=message):
        check_patches(make(tmp_path / "a.h5"), 224)


def test_targets(tmp_path):
    a, b, c = (write_patches(tmp_path / name, 1) for name in ("one/a.h5", "one/b.h5", "two/a.h5"))
    assert find_targets([a], tmp_path / "x.h5") == [tmp_path / "x.h5"]
    assert find_targets([a, b], tmp_path / "out") == [tmp_path / "out" / "a.h5", tmp_path / "out" / "b.h5"]
    for patches, out, message in [
        ([a, b], tmp_path / "x.h5", "one file for 2 slides"),
        ([a, c], tmp_path / "out", "would both be written to"),
        ([a, b], tmp_path / "one", "would overwrite the patches"),
        ([a], a, "would overwrite the patches"),
    ]:
        with pytest.raises(InputError, match=message):
            find_targets(patches, out)


def test_the_command(tmp_path, weights, capsys):
    patches = [str(write_patches(tmp_path / f"{name}.h5", 3)) for name in "ab"]
    arguments = ["--encoder", MODEL, "--weights", str(weights), "--out", str(tmp_path / "out"), "--batch-size", "2"]
    assert main(["features", *patches, *arguments]) == 0
    assert capsys.readouterr().out == "".join(f"{tmp_path / 'out' / name}.h5: 3 spots, 96 features\n" for name in "ab")
    assert len(read_slide(tmp_path / "out" / "b.h5")) == 3
    assert main(["features", *patches, *arguments, "--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith("error[device]: unknown device 'cuda'")
