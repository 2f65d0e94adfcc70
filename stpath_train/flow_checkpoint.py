"""Checkpoints of STFlow: a state_dict, and the arguments of its training run beside it.

Sizes show in the weights; the number of neighbours, the steps, the start and the activation are in `config.json` alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stpath_runtime.errors import CheckpointError, ConfigError
from stpath_runtime.manifest import FlowConfig

from .checkpoint import read_state_dict
from .stflow import STFlow

# Names in config.json of what the weights say, too; and of what they do not.
SIZES = {
    "n_genes": "n_genes",
    "hidden_dim": "d_model",
    "pairwise_hidden_dim": "d_edge",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "feature_dim": "n_features",
}
CHOICES = {
    "n_neighbors": "neighbors",
    "n_sample_steps": "steps",
    "prior_sampler": "start",
    "activation": "activation",
    "zinb_logits": "start_log_mean",
    "zinb_total_count": "start_dispersion",
    "zinb_zi_logits": "start_zero_logit",
}
NEEDED = ("n_neighbors", "n_sample_steps", "prior_sampler", "activation")
PUBLISHED = {"normalize_method": "log1p", "variant": "published"}  # where the config says it
# What forks of the published code are known by: parts of their keys.
FORKS = {
    "time_": "one that embeds the time by other layers",
    "t_embedder": "one that embeds the time by other layers",
    "w12": "one whose gated units are packed (w12, w3)",
    "to_q": "one that has queries, keys and values apart",
    "denoiser.": "one whose model is wrapped (denoiser.)",
}
ENCODERS = {"uni_v1_official": "UNI", "gigapath": "Gigapath", "ciga": "Ciga's ResNet18"}


def is_flow_checkpoint(weights: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict is STFlow's, or of a fork of it."""
    return any("backbone.blks." in key or key.startswith("fourier_proj.") for key in weights)


def load_flow_checkpoint(
    path: str | Path, config: str | Path | None, known: FlowConfig | None = None
) -> tuple[STFlow, str]:
    """Load a checkpoint with the published keys, in float32, ready to infer; and the name of its features' encoder.

    Parameters
    ----------
    config
        The `config.json` of its training run.
    known
        What an engine of it says, in the place of the config.

    Raises
    ------
    InputError
        If a file is missing or damaged, the keys are those of a fork, a choice is not in the config, or config and
        weights disagree.
    """
    path = Path(path)
    weights, _ = read_state_dict(path)
    if config is None and known is not None:
        run = {name: getattr(known, field) for name, field in CHOICES.items()}
        found = config_of(weights, run, path, Path("the engine's manifest"))
    elif config is None:
        raise CheckpointError(
            f"{path}: a checkpoint of STFlow, whose neighbours, steps, start and activation are not in its weights; "
            "give its config.json with --config"
        )
    else:
        run = _read_run(Path(config))
        found = config_of(weights, run, path, Path(config))
    with torch.device("meta"):
        model = STFlow(found)
    _require_keys(weights, model.state_dict(), path)
    try:
        model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a checkpoint of STFlow ({' '.join(str(error).split())[:300]})") from error
    encoder = run.get("feature_encoder")
    named = ENCODERS.get(str(encoder), str(encoder)) if encoder else "the encoder that the model was trained on"
    return model.requires_grad_(False).eval(), named


def config_of(weights: Mapping[str, Tensor], run: Mapping[str, Any], path: Path, config: Path) -> FlowConfig:
    """Sizes and choices of a model, from its weights and the arguments of its training run.

    Raises
    ------
    InputError
        If a key is missing that tells a size, a choice is missing, or the two disagree.
    """
    try:
        sizes = _sizes(weights)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path}: {_fork(weights)} (missing or misshapen: {error})") from error
    for name, field in SIZES.items():
        if name in run and run[name] != sizes[field]:
            raise ConfigError(f"{config}: {name} is {run[name]!r}, but {path} has {sizes[field]}; give its own config")
    for name, value in PUBLISHED.items():
        if name in run and run[name] not in (value, None):
            raise ConfigError(f"{config}: {name} is {run[name]!r}, of a variant that is not known; {value!r} is")
    if missing := [name for name in NEEDED if name not in run]:
        raise ConfigError(f"{config}: lacks {', '.join(missing)}, which the weights do not tell; add it")
    choices: dict[str, Any] = {field: run[name] for name, field in CHOICES.items() if name in run}
    for field in ("start_log_mean", "start_dispersion", "start_zero_logit"):
        if isinstance(choices.get(field), int):
            choices[field] = float(choices[field])
    for field, value in choices.items():
        wanted = type(getattr(FlowConfig, field))
        if type(value) is not wanted:
            name = next(name for name, each in CHOICES.items() if each == field)
            raise ConfigError(f"{config}: {name} is {value!r}; expected {_WANTED[wanted]}")
    gated = _is_gated(weights)
    if gated != (choices["activation"] == "swiglu"):
        has = "gated units (swiglu)" if gated else "plain units (gelu, silu or relu, as forks have them)"
        raise ConfigError(
            f"{config}: activation is {choices['activation']!r}, but {path} has {has}; give its own config"
        )
    found = FlowConfig(**{**sizes, **choices})
    try:
        found.check()
    except ValueError as error:
        raise ConfigError(f"{config}: {error}") from error
    return found


_WANTED = {int: "a whole number", float: "a number", str: "a name"}


def _sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    first = "backbone.blks.0."
    d_model, n_features = weights["image_transform.weight"].shape
    n_genes = weights[f"{first}gene_updater.output.4.weight"].shape[0]
    d_edge = weights[f"{first}attn.edge_trans.fc2.weight"].shape[0]
    of_score = weights[f"{first}attn.mlp_attn.fc1.weight"].shape[1]
    n_heads, rest = divmod(2 * d_model + d_edge, of_score - n_genes)
    if rest or n_heads < 1:
        raise ValueError(f"scores of {of_score} inputs do not fit widths {d_model} and {d_edge} and {n_genes} genes")
    layers = {int(key.split(".")[2]) for key in weights if key.startswith("backbone.blks.")}
    sizes = {"n_genes": n_genes, "d_model": d_model, "d_edge": d_edge, "n_layers": max(layers) + 1}
    return {**sizes, "n_heads": n_heads, "n_features": n_features}


def _is_gated(weights: Mapping[str, Tensor]) -> bool:
    unit = "backbone.blks.0.mlp."
    norm, fc1 = weights.get(f"{unit}norm.weight"), weights.get(f"{unit}fc1.weight")
    return norm is not None and fc1 is not None and 2 * norm.shape[0] == fc1.shape[0]


def _require_keys(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    missing, more = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or more:
        said = [f"lacks {missing[0]}"] * bool(missing) + [f"has {more[0]}, which that has not"] * bool(more)
        raise CheckpointError(f"{path}: {_fork(weights)} ({', '.join(said)})")
    for key, value in wanted.items():
        if weights[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {_fork(weights)} ({key} is {list(weights[key].shape)}, not {list(value.shape)})"
            )


def _fork(weights: Mapping[str, Tensor]) -> str:
    kind = next((what for part, what in FORKS.items() if any(part in key for key in weights)), "a fork of it")
    return f"keys of another STFlow than the published one, which alone is known: it looks like {kind}"


def _read_run(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}); give the config.json of the training run") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object; give the config.json of the training run")
    return content
