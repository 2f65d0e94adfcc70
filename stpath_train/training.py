"""Training of STPath: masked gene modelling of a store's slides, from a config to a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from stpath_runtime.errors import ConfigError
from stpath_runtime.manifest import ModelConfig
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES

from .checkpoint import load_checkpoint, require_genes, save_checkpoint
from .config import AnyConfig, FlowTrainConfig, Optimizer, TrainConfig
from .flow_training import train_flow
from .model import STPath
from .run import MODEL, Objective, Slides, check_slides, fit, prepare_lightning
from .store import Store, open_slide
from .windows import Batch, Windows, collate, require_windows


def masked_loss(model: STPath, batch: Batch) -> Tensor:
    """Mean over the windows of the squared error over masked spots and genes asked for, in log1p of counts.

    The mean of windows, not of all their pairs, so that it does not matter how windows are shared out among steps and
    devices.
    """
    features = batch.features.to(model.head[1].weight.dtype)
    embedding = model.embed(
        features, batch.coords, batch.organ, batch.technology, batch.context(), batch.sizes, blocks=batch.blocks
    )
    losses = [
        F.mse_loss(model.decode(embedding[asked.spots], asked.tokens).float(), asked.dense()) for asked in batch.asked
    ]
    return torch.stack(losses).mean()


class MaskedGeneModelling(Objective):
    """STPath's published objective: MSE of log1p of counts on masked spots."""

    model: STPath

    def __init__(self, model: STPath, optimizer: Optimizer) -> None:
        super().__init__(model, optimizer)
        # A token's column of gene_embed [d, V] is gathered at each step: stored as a row, it is one run of memory.
        weight = model.input_encoder.gene_embed.weight
        weight.data = weight.data.T.contiguous().T

    def loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Loss of a batch, and how many windows it is of."""
        return masked_loss(self.model, batch), len(batch.sizes)


def train(config: AnyConfig) -> Path:
    """Train, or continue the run of the same config in `config.run.out`; returns the model's file.

    Raises
    ------
    InputError
        If the store, a slide or the checkpoint does not fit the config, the run's folder holds another run, the device
        is not there, memory is short, or the loss is no number.
    """
    if isinstance(config, FlowTrainConfig):
        return train_flow(config)
    store = Store.open(config.data.store)
    chosen = config.data.slides if config.data.slides is not None else sorted(store.records)
    check_slides(store, config, chosen)
    for slide in chosen:
        require_windows(open_slide(store, slide), config.masking)

    def windows(slides: list[str], seed: list[int]) -> Windows:
        return Windows(store, slides, config.data, config.masking, seed)

    slides = Slides(config, chosen, windows, partial(collate, neighbors=config.model.neighbors))
    prepare_lightning(config.run.seed)
    module = fit(config, store, MaskedGeneModelling(_model(store, config), config.optimizer), slides, chosen)
    if module is not None:
        save_checkpoint(module.model, config.run.out / MODEL, store.vocabulary)
        print(f"{config.run.out / MODEL}: trained; stpath export takes it", flush=True)  # noqa: T201
    return config.run.out / MODEL


def _model(store: Store, config: TrainConfig) -> STPath:
    """The model to train: random weights from the seed, or those of the checkpoint."""
    wanted = config.model
    if wanted.checkpoint is None:
        return STPath(
            ModelConfig(
                d_model=wanted.d_model,
                n_heads=wanted.n_heads,
                n_layers=wanted.n_layers,
                d_mlp=wanted.d_mlp,
                n_features=store.n_features,
                n_tokens=store.vocabulary.n_tokens,
                n_organs=len(ORGANS),
                n_technologies=len(TECHNOLOGIES),
                attention=wanted.attention,
                neighbors=wanted.neighbors,
            )
        )
    model = load_checkpoint(wanted.checkpoint)
    for field in ("d_model", "n_heads", "n_layers", "d_mlp"):
        if field in wanted.model_fields_set and getattr(wanted, field) != getattr(model.config, field):
            raise ConfigError(
                f"model.{field}: {getattr(wanted, field)}, but {wanted.checkpoint} has {getattr(model.config, field)}; "
                "leave the sizes out"
            )
    for what, found, needed in (
        ("features", store.n_features, model.config.n_features),
        ("gene tokens", store.vocabulary.n_tokens, model.config.n_tokens),
    ):
        if found != needed:
            raise ConfigError(f"{wanted.checkpoint}: a model of {needed:,} {what}; those of {store.path} are {found:,}")
    require_genes(wanted.checkpoint, store.vocabulary, str(store.path))
    model.config = replace(model.config, attention=wanted.attention, neighbors=wanted.neighbors)
    return model
