"""Reading checkpoints, and files that are none."""

from __future__ import annotations

import pickle

import pytest
import torch

from stpath_runtime import InputError
from stpath_train import load_checkpoint, save_checkpoint


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_every_size_is_read_from_the_checkpoint(golden, tmp_path):
    for path in (tmp_path / "stfm.pth", tmp_path / "stpath.pkl"):
        torch.save(golden.model.state_dict(), path)
        assert load_checkpoint(path).config == golden.model.config
    save_checkpoint(golden.model, tmp_path / "m.safetensors")
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert loaded.config == golden.model.config
    for key, value in golden.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_keys_are_the_published_ones(tiny):
    keys = set(tiny.model.state_dict())
    attention = ["layernorm_qkv.0", "layernorm_qkv.1", "W_output.0"]
    expected = {
        "input_encoder.gene_embed.weight",
        "input_encoder.tech_embed.weight",
        "input_encoder.organ_embed.weight",
    }
    named = ["input_encoder.image_embed", "gene_exp_head.0", "gene_exp_head.1"]
    for layer in range(3):
        named += [f"model.blks.{layer}.attn.{part}" for part in attention]
        named += [f"model.blks.{layer}.mlp.{part}" for part in ("fc1", "norm", "fc2")]
        expected.add(f"model.blks.{layer}.attn.edge_bias.0.weight")
    assert keys == expected | {f"{name}.{part}" for name in named for part in ("weight", "bias")}


def test_half_precision_checkpoints_load_as_float32(tiny, tmp_path):
    torch.save({k: v.half() for k, v in tiny.model.state_dict().items()}, tmp_path / "m.pth")
    assert {p.dtype for p in load_checkpoint(tmp_path / "m.pth").parameters()} == {torch.float32}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_wrappers_are_taken_off(prefix, tiny, tmp_path):
    weights = {f"{prefix}{key}": value for key, value in tiny.model.state_dict().items()}
    torch.save(weights, tmp_path / "m.pth")
    for key, value in load_checkpoint(tmp_path / "m.pth").state_dict().items():
        assert torch.equal(value, tiny.model.state_dict()[key])
    first = next(iter(weights))
    torch.save({first.removeprefix(prefix) if key == first else key: value for key, value in weights.items()},
               tmp_path / "half.pth")  # fmt: skip
    with pytest.raises(InputError, match="not a checkpoint of STPath"):
        load_checkpoint(tmp_path / "half.pth")


def test_nothing_is_unpickled_freely(tmp_path):
    torch.save({"weights": Payload()}, tmp_path / "m.pth")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Payload()))
    for name in ("m.pth", "raw.pkl"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.blks.1.mlp.fc2.bias"), "not a checkpoint of STPath"),
        (lambda w: w.pop("input_encoder.image_embed.weight"), "image_embed"),
        (lambda w: w.update(extra=torch.ones(1)), "not a checkpoint of STPath"),
        (lambda w: w.update({"gene_exp_head.1.weight": torch.ones(3, 64)}), "not a checkpoint of STPath"),
        (lambda w: w.update({"model.blks.0.attn.edge_bias.0.weight": torch.ones(5, 3)}), "does not divide by 5 heads"),
        (lambda w: w.update(epoch=3), "not a plain state_dict"),
        (lambda w: w.update({3: torch.ones(1)}), "not a plain state_dict"),
        (lambda w: w["gene_exp_head.1.bias"].fill_(torch.nan), "gene_exp_head.1.bias holds NaN"),
        (lambda w: w.update({"gene_exp_head.1.bias": torch.ones(202, dtype=torch.int64)}), "int64"),
        (lambda w: w.update({"gene_exp_head.1.bias": torch.ones(202).to_sparse()}), "sparse"),
        (lambda w: w.update({"input_encoder.organ_embed.weight": torch.ones(10, 64)}), "10 organs; STPath has 25"),
    ],
)
def test_a_state_dict_of_another_model_is_refused(change, message, tiny, tmp_path):
    weights = {key: value.clone() for key, value in tiny.model.state_dict().items()}
    change(weights)
    torch.save(weights, tmp_path / "m.pth")
    with pytest.raises(InputError, match=message):
        load_checkpoint(tmp_path / "m.pth")


def test_a_missing_or_truncated_file_is_refused(tiny, tmp_path):
    with pytest.raises(InputError, match="no such checkpoint"):
        load_checkpoint(tmp_path / "missing.pth")
    torch.save(tiny.model.state_dict(), tmp_path / "m.pth")
    (tmp_path / "m.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:1000])
    with pytest.raises(InputError, match="not a state_dict of tensors"):
        load_checkpoint(tmp_path / "m.pth")
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    with pytest.raises(InputError, match="not a state_dict of tensors"):
        load_checkpoint(tmp_path / "m.safetensors")
