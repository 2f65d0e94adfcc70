"""Training of STFlow: flow matching of a store's slides, by the published recipe.

A sample is the part of a slide nearest to a random spot, between a start and its expression at a random time; the model
is to tell the expression. The epoch is chosen on validation slides. A run's folder is that of `run`, and beside
the model it has what `stpath export` asks for: `config.json` and `genes.json`.

n spots of a window, F features, G genes, k neighbours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stpath_runtime.errors import ConfigError
from stpath_runtime.files import written_whole
from stpath_runtime.manifest import FlowConfig
from stpath_runtime.names import listed_names
from stpath_runtime.stflow.geometry import Neighborhoods
from stpath_runtime.stflow.starts import draw_start

from .config import FlowTrainConfig
from .flow_checkpoint import CHOICES, SIZES
from .run import MODEL, Objective, Slides, check_slides, fit, prepare_lightning
from .stflow import STFlow
from .store import Store, open_slide
from .windows import nearest_spots

RUN_CONFIG, GENES = "config.json", "genes.json"


class FlowWindow(NamedTuple):
    """A window of one slide, on the way from a start to its expression."""

    features: Tensor  # [n, F]
    frames: Tensor  # [n, k, 3]
    neighbors: Tensor  # [n, k]
    state: Tensor  # [n, G]
    time: Tensor  # of no axes
    expression: Tensor  # [n, G], log1p of raw counts


class FlowWindows(Dataset[FlowWindow]):
    """Windows of a store's slides. Draw d is of slide d % slides in epoch d // slides, and always the same."""

    def __init__(
        self,
        store: Store,
        slides: Sequence[str],
        per_slide: int,
        model: FlowConfig,
        genes: Sequence[str],
        seed: list[int],
    ) -> None:
        self.store, self.model, self.seed = store, model, seed
        self.tokens = store.vocabulary.tokens(genes)
        self.slides = [slide for slide in slides for _ in range(per_slide)]

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, draw: int) -> FlowWindow:
        epoch, index = divmod(draw, len(self.slides))
        rng = np.random.default_rng([*self.seed, epoch, index])
        slide = open_slide(self.store, self.slides[index])
        n = max(2, int(rng.random() * len(slide)))
        spots = nearest_spots(slide.pixels, int(rng.integers(len(slide))), n)
        features, log_counts = slide.read(spots)
        column = {token: i for i, token in enumerate(slide.tokens.tolist())}
        expression = log_counts[:, [column[token] for token in self.tokens.tolist()]].toarray().astype(np.float32)
        around = Neighborhoods.of(slide.pixels[spots], self.model.neighbors)
        start, time = draw_start(self.model, len(spots), int(rng.integers(2**31)), 0), rng.random()
        return FlowWindow(
            torch.from_numpy(features.astype(np.float32)),
            torch.from_numpy(around.frames),
            torch.from_numpy(around.neighbors),
            torch.from_numpy((1 - time) * start + time * expression).float(),
            torch.tensor(time, dtype=torch.float32),
            torch.from_numpy(expression),
        )


class FlowMatching(Objective):
    """STFlow's published objective: MSE of the expression that a state between a start and it comes from."""

    model: STFlow

    def loss(self, batch: Sequence[FlowWindow]) -> tuple[Tensor, int]:
        """Mean over the spots of all windows, and how many windows there are."""
        squares = [torch.square(self._denoised(window) - window.expression).mean(dim=1) for window in batch]
        return torch.cat(squares).mean(), len(batch)

    def on_train_batch_start(self, batch: Sequence[FlowWindow], batch_idx: int) -> None:
        """Let dropout depend on the step alone, so that a run that goes on is the one that was not stopped."""
        torch.manual_seed(self.global_step)

    def _denoised(self, window: FlowWindow) -> Tensor:
        model = self.model
        edges = [block.attn.edges(window.frames) for block in model.blocks]
        tokens = model.image_transform(window.features)
        found: Tensor = model(tokens, window.state, window.time, edges, window.neighbors)
        return found


def train_flow(config: FlowTrainConfig) -> Path:
    """Train STFlow, or continue the run of the same config; returns the model's file.

    Raises
    ------
    InputError
        As `training.train`, and if a gene is not known or was not measured on a slide.
    """
    data, run = config.data, config.run
    store = Store.open(data.store)
    chosen, genes = _slides_and_genes(store, config)
    check_slides(store, config, chosen)
    _require_genes(store, chosen, genes)
    sizes = config.model.model_dump(exclude={"kind", "dropout"})
    model = FlowConfig(n_genes=len(genes), n_features=store.n_features, **sizes)

    def windows(slides: list[str], seed: list[int]) -> FlowWindows:
        return FlowWindows(store, slides, data.windows_per_slide, model, genes, seed)

    prepare_lightning(run.seed)
    objective = FlowMatching(STFlow(model, config.model.dropout), config.optimizer)
    trained = fit(config, store, objective, Slides(config, chosen, windows, list), chosen)
    if trained is not None:
        _save(trained.model, genes, run.out)
        print(  # noqa: T201
            f"{run.out / MODEL}: trained; stpath export takes it with --config {RUN_CONFIG} --genes {GENES}", flush=True
        )
    return run.out / MODEL


def _slides_and_genes(store: Store, config: FlowTrainConfig) -> tuple[list[str], list[str]]:
    """Of a benchmark's fold the training slides; else those named, or all."""
    data = config.data
    if data.benchmark is not None:
        task = store.task(data.benchmark)
        if data.fold >= len(task.folds):
            raise ConfigError(f"data.fold: {data.fold}, but {data.benchmark} has {len(task.folds)}, from 0")
        return list(task.folds[data.fold]["train"]), list(task.genes)
    genes = listed_names(str(data.genes), "data.genes", "gene") if isinstance(data.genes, Path) else data.genes
    return data.slides if data.slides is not None else sorted(store.records), list(genes or [])


def _require_genes(store: Store, slides: Sequence[str], genes: Sequence[str]) -> None:
    """Check that genes are known, each once, and were measured on every slide."""
    tokens = store.vocabulary.panel(genes).tokens
    if len(tokens) < len(genes):
        raise ConfigError("data.genes: a gene is named more than once; name each once")
    for name in slides:
        slide = open_slide(store, name)
        lacking = np.flatnonzero(~np.isin(tokens, slide.tokens))
        if len(lacking):
            raise ConfigError(
                f"slide {name}: {len(lacking)} of the genes were not measured on it, {genes[lacking[0]]!r} first; "
                "leave it out (data.slides), or them (data.genes)"
            )
        if len(slide) < 2:
            raise ConfigError(f"slide {name}: a window has two spots or more; leave it out (data.slides)")


def _save(model: STFlow, genes: Sequence[str], out: Path) -> None:
    """Write the weights, and what they do not tell."""
    from safetensors.torch import save

    config = model.config
    run = {name: getattr(config, field) for name, field in {**SIZES, **CHOICES}.items()}
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    for name, content in (
        (RUN_CONFIG, json.dumps({**run, "normalize_method": "log1p"}, indent=1).encode()),
        (GENES, json.dumps({"genes": list(genes)}).encode()),
        (MODEL, save(weights)),
    ):
        with written_whole(out / name) as partial:
            partial.write_bytes(content)
