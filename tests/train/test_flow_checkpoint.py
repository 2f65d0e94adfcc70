"""Checkpoints of STFlow: what is read of weights and config, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import FLOW_SIZES, write_flow_checkpoint
from stpath_runtime.errors import InputError
from stpath_train.flow_checkpoint import load_flow_checkpoint
from stpath_train.stflow import seeded_flow


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_sizes_come_from_the_weights_and_choices_from_the_config(wrapper, tmp_path):
    model = seeded_flow(FLOW_SIZES, 0)
    checkpoint, config, _ = write_flow_checkpoint(model, tmp_path)
    torch.save({wrapper + key: value for key, value in model.state_dict().items()}, checkpoint)
    found, encoder = load_flow_checkpoint(checkpoint, config)
    assert (found.config, encoder) == (FLOW_SIZES, "UNI")
    assert all((value == found.state_dict()[key]).all() for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"n_genes": 49}, "n_genes is 49, but .* has 50"),
        ({"hidden_dim": 64}, "hidden_dim is 64, but .* has 32"),
        ({"n_heads": 8}, "n_heads is 8, but .* has 4"),
        ({"feature_dim": 1536}, "feature_dim is 1536"),
        ({"activation": "gelu"}, "activation is 'gelu', but .* gated units"),
        ({"activation": "mish"}, "activation is 'mish'"),
        ({"prior_sampler": "poisson"}, "start is 'poisson', not zinb"),
        ({"n_sample_steps": 1}, "steps is 1"),
        ({"n_sample_steps": "5"}, "n_sample_steps is '5'; expected a whole number"),
        ({"n_neighbors": 0}, "neighbors is 0"),
        ({"n_neighbors": True}, "n_neighbors is True"),
        ({"zinb_logits": float("nan")}, "log mean"),
        ({"normalize_method": "zscore"}, "normalize_method is 'zscore', of a variant that is not known"),
    ],
)
def test_a_config_that_is_not_the_weights_own_is_refused(changed, said, tmp_path):
    checkpoint, config, _ = write_flow_checkpoint(seeded_flow(FLOW_SIZES, 0), tmp_path, **changed)
    with pytest.raises(InputError, match=said):
        load_flow_checkpoint(checkpoint, config)


@pytest.mark.parametrize("lacking", ["n_neighbors", "n_sample_steps", "prior_sampler", "activation"])
def test_what_the_weights_do_not_tell_is_asked_for(lacking, tmp_path):
    checkpoint, config, _ = write_flow_checkpoint(seeded_flow(FLOW_SIZES, 0), tmp_path)
    run = json.loads(config.read_text())
    del run[lacking]
    config.write_text(json.dumps(run))
    with pytest.raises(InputError, match=f"lacks {lacking}"):
        load_flow_checkpoint(checkpoint, config)
    with pytest.raises(InputError, match="give its config.json with --config"):
        load_flow_checkpoint(checkpoint, None)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("fourier_proj.mlp.0", "time_embed.mlp.0", "another STFlow .* embeds the time by other layers"),
        ("attn.mlp_attn.fc1", "attn.mlp_attn.w12", "another STFlow .* gated units are packed"),
        ("image_transform", "denoiser.image_transform", "another STFlow .* wrapped"),
        ("gene_updater.output.4", "gene_updater.output.3", "another STFlow"),
    ],
)
def test_keys_of_a_fork_are_refused_by_what_they_look_like(old, new, said, tmp_path):
    model = seeded_flow(FLOW_SIZES, 0)
    checkpoint, config, _ = write_flow_checkpoint(model, tmp_path)
    torch.save({key.replace(old, new): value for key, value in model.state_dict().items()}, checkpoint)
    with pytest.raises(InputError, match=said):
        load_flow_checkpoint(checkpoint, config)


@pytest.mark.parametrize("text", ["[]", "no JSON", '{"a":'])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    checkpoint, config, _ = write_flow_checkpoint(seeded_flow(FLOW_SIZES, 0), tmp_path)
    config.write_text(text)
    with pytest.raises(InputError, match="config.json"):
        load_flow_checkpoint(checkpoint, config)
    with pytest.raises(InputError, match="no such config file"):
        load_flow_checkpoint(checkpoint, tmp_path / "nothing.json")
