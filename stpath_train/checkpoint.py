"""Checkpoints: a plain state_dict, in PyTorch's format or safetensors. Nothing is ever unpickled freely.

How a model was trained to attend, and which genes its tokens are, shows in no weight: a safetensors file says it in its
metadata (`attention` "knn" and `neighbors`; `genes`, a hash). A file that says nothing, as the published one, is of a
model that attends globally; its genes are taken to be those that it is used with.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stpath_runtime.errors import CheckpointError, VocabularyError
from stpath_runtime.files import written_whole
from stpath_runtime.manifest import ATTENTIONS, ModelConfig
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary

from .model import STPath

WRAPPERS = ("module.", "_orig_mod.")


def load_checkpoint(path: str | Path) -> STPath:
    """Load a checkpoint with the published keys, in float32, ready to infer; every size is read from its shapes.

    Raises
    ------
    InputError
        If the file is missing, not a state_dict of tensors, or not one of STPath.
    """
    path = Path(path)
    weights, metadata = read_state_dict(path)
    config = config_of(weights, metadata, str(path))
    with torch.device("meta"):
        model = STPath(config)
    try:
        model.load_state_dict({key: value.float() for key, value in weights.items()}, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not a checkpoint of STPath ({_brief(error)})") from error
    return model.requires_grad_(False).eval()


def save_checkpoint(model: STPath, path: str | Path, vocabulary: GeneVocabulary | None = None) -> None:
    """Write a model's weights, how it attends and, where they are given, which genes it knows, as safetensors."""
    from safetensors.torch import save

    metadata = {"attention": model.config.attention, "neighbors": str(model.config.neighbors)}
    if vocabulary is not None:
        metadata["genes"] = genes_hash(vocabulary)
    with written_whole(Path(path)) as partial:
        # Not save_file: what it writes, no one else may read.
        partial.write_bytes(save({key: value.contiguous() for key, value in model.state_dict().items()}, metadata))


def require_genes(path: str | Path, vocabulary: GeneVocabulary, whose: str) -> None:
    """Check that a checkpoint is of the genes of a vocabulary, where it says which its genes are.

    Raises
    ------
    InputError
        If they are others, as many as they may be.
    """
    from safetensors import safe_open

    if Path(path).suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get("genes")
    if said is not None and said != genes_hash(vocabulary):
        raise VocabularyError(
            f"{path}: trained on other genes than those of {whose}; give those that it was trained on"
        )


def genes_hash(vocabulary: GeneVocabulary) -> str:
    """SHA-256 of the genes of a vocabulary, in the order of their tokens."""
    return hashlib.sha256("\n".join(vocabulary.ensembl_ids).encode()).hexdigest()


def config_of(weights: Mapping[str, Tensor], metadata: Mapping[str, str], name: str = "checkpoint") -> ModelConfig:
    """Sizes of the model that a state_dict belongs to, from its shapes, and how it attends, from the metadata.

    Raises
    ------
    InputError
        If a key is missing that tells a size, or the attention is none that this package knows.
    """
    attention, neighbors = metadata.get("attention", "global"), metadata.get("neighbors", "0")
    if attention not in ATTENTIONS or not neighbors.isdigit() or (attention == "knn") != (int(neighbors) > 0):
        raise CheckpointError(f"{name}: unknown attention {attention!r} to {neighbors!r} spots; upgrade stpath-engine")
    layers = [int(m[1]) for key in weights if (m := re.match(r"model\.blks\.(\d+)\.", key))]
    try:
        d_model, n_features = weights["input_encoder.image_embed.weight"].shape
        config = ModelConfig(
            d_model=d_model,
            n_heads=weights["model.blks.0.attn.edge_bias.0.weight"].shape[0],
            n_layers=max(layers) + 1,
            d_mlp=weights["model.blks.0.mlp.fc1.weight"].shape[0],
            n_features=n_features,
            n_tokens=weights["input_encoder.gene_embed.weight"].shape[1],
            n_organs=weights["input_encoder.organ_embed.weight"].shape[0],
            n_technologies=weights["input_encoder.tech_embed.weight"].shape[0],
            attention=attention,
            neighbors=int(neighbors),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{name}: not a checkpoint of STPath (missing or misshapen: {error})") from error
    if config.n_heads == 0 or config.d_model % config.n_heads:
        raise CheckpointError(
            f"{name}: not a checkpoint of STPath (width {d_model} does not divide by {config.n_heads} heads)"
        )
    known = {"organs": (config.n_organs, len(ORGANS)), "technologies": (config.n_technologies, len(TECHNOLOGIES))}
    for what, (found, expected) in known.items():
        if found != expected:
            raise CheckpointError(f"{name}: the checkpoint has {found} {what}; STPath has {expected}")
    return config


def seeded_checkpoint(config: ModelConfig, seed: int) -> STPath:
    """A model with random weights that a seed repeats: for tests, benchmarks and the demo, never for biology."""
    rng = np.random.RandomState(seed)
    with torch.device("meta"):
        model = STPath(config)
    weights = {}
    for key, value in sorted(model.state_dict().items()):
        shape = tuple(value.shape)
        drawn = rng.standard_normal(shape)
        if key.endswith(("layernorm_qkv.0.weight", "norm.weight")) or key == "gene_exp_head.0.weight":
            drawn = 1 + 0.1 * drawn
        elif key.endswith(".bias"):
            drawn = 0.1 * drawn
        elif "edge_bias" in key:
            drawn = 0.05 * drawn
        elif any(name in key for name in ("tech_embed", "organ_embed", "gene_embed")):
            drawn = 0.5 * drawn
        else:
            drawn = drawn / np.sqrt(shape[-1])
        weights[key] = torch.from_numpy(drawn.astype(np.float32))
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names of the model itself: DistributedDataParallel and torch.compile put theirs before all."""
    for prefix in WRAPPERS * 2:  # either may be around the other
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights and metadata of a checkpoint file, by the names that the model itself gives them.

    Raises
    ------
    InputError
        If the file is missing, or not a state_dict of dense, finite tensors of floats.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each raise their own
        # torch's own words advise to unpickle freely: they are left out, and shown by --debug.
        refused = isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error)
        why = "it holds more than tensors, and nothing else is unpickled" if refused else "damaged, or another format"
        raise CheckpointError(
            f"{path}: not a state_dict of tensors ({why}); give stfm.pth or a .safetensors file"
        ) from error
    tensors = isinstance(weights, dict) and all(isinstance(value, Tensor) for value in weights.values())
    named = tensors and all(isinstance(key, str) for key in weights)
    if named:
        weights = _without_wrappers(weights)
    if not named:
        raise CheckpointError(
            f"{path}: not a plain state_dict; expected keys such as 'model.blks.0.attn.W_output.0.weight'"
        )
    for key, value in weights.items():
        if not value.is_floating_point() or value.layout != torch.strided or value.is_meta:
            raise CheckpointError(f"{path}: {key} is of type {value.dtype}, {value.layout}; expected dense floats")
        if not torch.isfinite(value).all():
            raise CheckpointError(
                f"{path}: {key} holds NaN or infinity; the checkpoint is of a training run that failed"
            )
    return weights, metadata


def _brief(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) if lines else type(error).__name__
    return text if len(text) <= 200 else text[:200] + "…"
