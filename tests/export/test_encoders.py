"""Tile encoders: every kind gives timm's numbers, and what is at fault is named before anything is published."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tensorrt_rtx as trt
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLU, SwiGLUPacked
from torch import nn

from helpers import SMALL, by_timm, relative_l2, write_encoder
from stpath_export.encoders import folding, proof
from stpath_export.encoders.exporter import export_encoder
from stpath_export.encoders.proof import proof_tiles, verify
from stpath_runtime.backends.plan_builder import Build
from stpath_runtime.cli.app import main
from stpath_runtime.engine import Engine
from stpath_runtime.errors import InputError, InputWarning, ParityError
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.manifest import EncoderManifest
from stpath_train import encoders
from stpath_train.encoders import find_encoder, read_encoder

PACKED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
KINDS = {  # as they are published, but small: architecture, arguments, what a config cannot say
    "gigapath": ("vit_giant_patch14_dinov2", {"patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334}, {}),
    "uni": ("vit_large_patch16_224", {"patch_size": 16, "init_values": 1e-5, "dynamic_img_size": True}, {}),
    "uni2-h": (
        "vit_giant_patch14_224",
        {
            "patch_size": 14,
            "init_values": 1e-5,
            "mlp_ratio": 5.33334,
            "no_embed_class": True,
            "reg_tokens": 8,
            "dynamic_img_size": True,
        },
        PACKED,
    ),
    "h-optimus": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5, "dynamic_img_size": False}, {}),
    "virchow2": (
        "vit_huge_patch14_224",
        {
            "patch_size": 14,
            "init_values": 1e-5,
            "mlp_ratio": 5.3375,
            "global_pool": "",
            "reg_tokens": 4,
            "dynamic_img_size": True,
        },
        PACKED,
    ),
    "plain SwiGLU": ("vit_small_patch16_224", {}, {"mlp_layer": SwiGLU, "act_layer": nn.SiLU}),
    "mean": ("vit_small_patch16_224", {"global_pool": "avg"}, {}),
    "mean, norm before": ("vit_small_patch16_224", {"global_pool": "avg", "fc_norm": False}, {}),
    "CLIP": ("vit_small_patch16_224", {"pre_norm": True, "qkv_bias": False}, {}),
    "one block": ("vit_small_patch16_224", {"depth": 1}, {}),
    "no positions": ("vit_small_patch16_224", {"pos_embed": "none"}, {}),
    "small tiles": ("vit_small_patch16_224", {"img_size": 32, "patch_size": 8}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_numbers_of_timm(kind, tmp_path):
    architecture, more, layers = KINDS[kind]
    folder = write_encoder(tmp_path / "hub", architecture, more, **layers)
    manifest = export_encoder(str(folder), tmp_path / "encoder")
    tiles = proof_tiles(manifest.size, 5, seed=7)
    exact = by_timm(folder, tiles, **layers)
    if exact.ndim == 3:  # Virchow2: the class token beside the mean of the patches, registers left out
        exact = np.concatenate([exact[:, 0], exact[:, 5:].mean(axis=1)], axis=1)
    with TileEncoder.load(tmp_path / "encoder") as encoder:
        found = encoder(tiles)
    assert found.shape == exact.shape == (5, manifest.width)
    assert relative_l2(found, exact) < 1e-5
    assert manifest.parity["passed"]
    assert [row["part"] for row in manifest.parity["parts"]][-2:] == ["features", "whole graph"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["gigapath", "virchow2", "plain SwiGLU", "uni"])
def test_lower_precisions_err_at_most_twice_what_pytorch_errs(kind, precision, tmp_path):
    architecture, more, layers = KINDS[kind]
    folder = write_encoder(tmp_path / "hub", architecture, more, **layers)
    manifest = export_encoder(str(folder), tmp_path / "encoder", precision)
    rows = manifest.parity["parts"]
    assert all(1e-5 < row["bar_l2"] < 0.1 for row in rows)  # a low precision's, and no excuse
    assert max(row["relative_l2"] / row["bar_l2"] for row in rows) <= 1
    assert ("emulated" in manifest.parity["backend"]) == (precision == "bf16")


def test_the_parts_of_a_model_are_the_model(encoder_folder):
    encoder = read_encoder(encoder_folder)
    tiles = proof_tiles(224, 3)
    x = encoder.normalized(torch.from_numpy(tiles))
    with torch.inference_mode():
        for part in encoder.parts(torch.float64):
            x = part(x)
    np.testing.assert_allclose(x.numpy(), by_timm(encoder_folder, tiles), rtol=0, atol=1e-12)
    assert all(weights.is_meta for weights in encoder.model.parameters())  # nothing stays in memory


def test_the_manifest_says_what_it_is(tiny_encoder):
    manifest = EncoderManifest.read(tiny_encoder)
    manifest.check_files(tiny_encoder)
    assert (manifest.size, manifest.width, manifest.pooling, manifest.licence) == (224, 96, "token", "apache-2.0")
    assert (manifest.wanted.microns, manifest.wanted.microns_a_pixel, manifest.trained) == (112, 0.5, None)
    assert {"torch", "timm", "onnxruntime"} <= set(manifest.versions)
    assert manifest.mean == (0.485, 0.456, 0.406)
    assert "encoder" in str(manifest.files)


@pytest.mark.parametrize("fault", ["scale", "mean", "last block"])
def test_a_wrong_fold_is_found_and_nothing_is_published(fault, encoder_folder, tmp_path, monkeypatch):
    """The proof is no proof if it passes whatever the folding does."""
    if fault == "scale":
        monkeypatch.setattr(folding.Product, "scaled", lambda self, scale: self)
    elif fault == "mean":
        stem = folding.fold_stem
        monkeypatch.setattr(
            "stpath_export.encoders.graph.fold_stem",
            lambda encoder: folding.Stem(**{**vars(stem(encoder)), "whole": (124, 116, 105)}),
        )
    else:
        norm = folding.Product.after_norm
        monkeypatch.setattr(folding.Product, "after_norm", lambda self, n: norm(self, {**n, "bias": 0 * n["bias"]}))
    with pytest.raises(ParityError, match="parts miss the bar, from (tokens|block 1) on"):
        export_encoder(str(encoder_folder), tmp_path / "encoder")
    assert list(tmp_path.iterdir()) == []


def test_what_precision_changes_in_expression_is_told(encoder_folder, tiny_engine, tmp_path):
    engine = Engine.load(tiny_engine)
    change = export_encoder(str(encoder_folder), tmp_path / "e", "bf16", engine).parity["expression"]
    assert 1e-5 < change["relative_l2"] < 0.05
    assert change["engine"] == engine.hash()
    narrow = write_encoder(tmp_path / "narrow", more={"embed_dim": 48, "patch_size": 16, "init_values": 1e-5})
    with pytest.raises(InputError, match=r"gives 48 features, and .* takes 96"):
        export_encoder(str(narrow), tmp_path / "other", "fp32", engine)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_each_precision_builds_with_tensorrt(precision, encoder_folder, tmp_path):
    export_encoder(str(encoder_folder), tmp_path / "e", precision)
    plans = Build.of(tmp_path / "e", "tensorrt_rtx", "cuda:0", "sm_89", 32_768).run()
    assert plans.ranges("encoder") == {"tiles": ((1, 224, 224, 3), (64, 224, 224, 3), (256, 224, 224, 3))}
    assert trt.__version__ in plans.version


def test_verify_proves_again_and_names_another_model(encoder_folder, tiny_encoder, tmp_path, capsys):
    for backend in ("onnxruntime", "openvino"):
        report = verify(tiny_encoder, str(encoder_folder), backend=backend)
        assert report["passed"]
        assert report["backend"] == f"{backend} on cpu"
    assert main(["verify", str(tiny_encoder), "--checkpoint", str(encoder_folder)]) == 0
    assert "passed" in capsys.readouterr().out
    other = write_encoder(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["cls_token"] *= 2
    save_file(state, other / "model.safetensors")
    with pytest.warns(InputWarning, match="is not the file that"):
        assert not verify(tiny_encoder, str(other))["passed"]
    deeper = write_encoder(tmp_path / "deeper", more={"depth": 3, "patch_size": 16, "init_values": 1e-5})
    with pytest.raises(InputError, match="another encoder than"):
        verify(tiny_encoder, str(deeper))


class Harmful:
    def __reduce__(self):
        return (print, ("unpickled",))


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"cls_token": Harmful()}))


def _torch_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"cls_token": Harmful()}, folder / "pytorch_model.bin")


def _reshaped(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(state | {"pos_embed": torch.zeros(1, 50, 96)}, folder / "model.safetensors")


def _without(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    del state["blocks.1.norm1.bias"]
    save_file(state, folder / "model.safetensors")


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights; expected model.safetensors or"),
    "cut": (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), "not weights of an encoder"),
    "a pickle": (_pickle, "more than tensors, which is not unpickled"),
    "a pickle of PyTorch": (_torch_pickle, "more than tensors, which is not unpickled"),
    "another shape": (_reshaped, r"'pos_embed' is \[1, 50, 96\], expected \[1, 197, 96\]"),
    "one missing": (_without, "they lack 'blocks.1.norm1.bias'"),
    "unknown": (lambda f: edit(f, architecture="vit_gigant"), "has no architecture 'vit_gigant'"),
    "no transformer": (lambda f: edit(f, architecture="resnet18", model_args={}), "only plain vision transformers"),
    "norms of q and k": (
        lambda f: edit(f, model_args={**SMALL, "patch_size": 16, "qk_norm": True}),
        "norms within attention or mlp",
    ),
    "arguments": (lambda f: edit(f, model_args={"colour": "red"}), "timm cannot make vit_giant_patch14_dinov2"),
    "mean": (lambda f: edit(f, pretrained_cfg={"mean": [1, 2], "std": [1, 1, 1]}), r"pretrained_cfg.mean is \[1, 2\]"),
    "std": (lambda f: edit(f, pretrained_cfg={"mean": [0, 0, 0], "std": [1, 0, 1]}), "pretrained_cfg.std is"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_folder_are_named(fault, tmp_path, capsys):
    folder = write_encoder(tmp_path / "hub")
    make, message = FAULTS[fault]
    make(folder)
    with pytest.raises(InputError, match=message):
        export_encoder(str(folder), tmp_path / "encoder")
    assert not (tmp_path / "encoder").exists()
    assert "unpickled\n" not in capsys.readouterr().out


@pytest.mark.parametrize("old", [False, True])
def test_weights_of_pytorch_are_read(old, encoder_folder, tmp_path):
    folder = write_encoder(tmp_path / "hub")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    assert export_encoder(str(folder), tmp_path / "e").weights["name"] == "pytorch_model.bin"


def test_known_names_come_from_the_hub(encoder_folder, monkeypatch):
    asked = []

    def snapshot_download(repo, allow_patterns):
        asked.append((repo, "model.safetensors" in allow_patterns))
        return str(encoder_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    encoder = find_encoder("Gigapath")
    assert (encoder.name, encoder.microns_a_pixel) == ("gigapath", 0.5)
    assert find_encoder("hf-hub:paige-ai/Virchow2").pooling == "token and mean"
    assert find_encoder("hf-hub:someone/else").microns_a_pixel is None
    assert asked == [("prov-gigapath/prov-gigapath", True), ("paige-ai/Virchow2", True), ("someone/else", True)]


def test_names_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"no encoder known .did you mean gigapath.*; give gigapath, uni, uni2-h"):
        find_encoder("gigapth")
    with pytest.raises(InputError, match="the Hub cannot be reached"):
        find_encoder("uni2-h")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; give its folder"):
        find_encoder(str(tmp_path / "file"))
    with pytest.raises(InputError, match="exists already"):
        export_encoder("gigapath", tmp_path)


def test_the_proof_takes_one_part_at_a_time(encoder_folder, tmp_path, monkeypatch):
    """Of the reference's weights, in float64, those of one block are in memory, whatever the depth."""
    alive = []
    real = proof._run

    def run(graph, inputs, emulated=False):
        model = next(iter(models), None)
        if model is not None:
            alive.append(sum(not block.norm1.weight.is_meta for block in model.blocks))
        return real(graph, inputs, emulated)

    models = []
    deepcopy = encoders.copy.deepcopy

    def copied(model):
        copy = deepcopy(model)
        models.extend([copy] if hasattr(copy, "blocks") else [])
        return copy

    monkeypatch.setattr(encoders.copy, "deepcopy", copied)
    monkeypatch.setattr(proof, "_run", run)
    export_encoder(str(encoder_folder), tmp_path / "e")
    assert max(alive) == 1


def test_the_command(encoder_folder, tiny_engine, tmp_path, capsys):
    words = ["export-encoder", str(encoder_folder), "--out", str(tmp_path / "e"), "--precision", "fp16"]
    assert main([*words, "--engine", str(tiny_engine)]) == 0
    said = capsys.readouterr().out
    assert "fp16, 96 features of 224 x 224 pixels; 5 parts against float64 passed" in said
    assert "expression by" in said
    assert main(words) == 2
    assert capsys.readouterr().err.startswith("error[output]")
