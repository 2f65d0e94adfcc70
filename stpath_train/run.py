"""A training run with Lightning: a folder, from which it goes on.

What is minimised is in `training` for STPath and in `flow_training` for STFlow.

    RUN/
      config.yaml          every choice
      store.json           the slides and genes that it is trained on
      history.csv          a row an epoch: losses, learning rate, seconds
      loss.png             its curves
      checkpoints/         what a run goes on from: the last two epochs, and the best by validation loss
      model.safetensors    the model: the best by validation loss, or the last; goes into `stpath export`
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from stpath_runtime.errors import ConfigError, DeviceError, InputError, InstallError, MemoryLimitError, OutputError
from stpath_runtime.files import written_whole

from .checkpoint import genes_hash
from .config import AnyConfig, Optimizer, as_yaml, differences, read_config
from .store import Store
from .windows import DrawSampler

if TYPE_CHECKING:
    import pandas as pd

CONFIG, STORE, HISTORY, CURVES, CHECKPOINTS, MODEL = (
    "config.yaml",
    "store.json",
    "history.csv",
    "loss.png",
    "checkpoints",
    "model.safetensors",
)
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
KEPT = 2  # checkpoints of the last epochs: should the machine die while it writes one, the other is whole


class Objective(L.LightningModule):
    """A loss of a model, minimised by Adam, gradients clipped, a linear warm-up."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()
        self.model = model.requires_grad_(True).train()
        self.learning_rate, self.warmup_steps = optimizer.learning_rate, optimizer.warmup_steps

    def loss(self, batch: Any) -> tuple[Tensor, int]:
        """Loss of a batch, and how many windows it is of."""
        raise NotImplementedError

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Loss of one batch."""
        loss, size = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=False, batch_size=size, sync_dist=True, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        """Log the loss of one batch."""
        loss, size = self.loss(batch)
        self.log("validation_loss", loss, batch_size=size, sync_dist=True, prog_bar=True)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm; Lightning's own refuses a fused optimizer in mixed precision, even where nothing is scaled."""
        if gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    def configure_optimizers(self) -> Any:
        """Adam, its learning rate growing from 0 in the first steps."""
        # fused: one pass over the weights; of 49 million, most are untouched columns of a step.
        adam = torch.optim.Adam(self.parameters(), lr=self.learning_rate, fused=True)
        warmup = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)))
        return {"optimizer": adam, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Slides(L.LightningDataModule):
    """Windows of the training and validation slides.

    Parameters
    ----------
    chosen
        Slides, those for validation among them.
    windows
        Makes the data set of some slides, whose draws a seed decides.
    collate_fn
        Makes a batch of windows.
    """

    def __init__(
        self,
        config: AnyConfig,
        chosen: list[str],
        windows: Callable[[list[str], list[int]], Dataset[Any]],
        collate_fn: Callable[[Any], Any],
    ) -> None:
        super().__init__()
        self.config, self.windows, self.collate_fn = config, windows, collate_fn
        self.training = [slide for slide in chosen if slide not in config.data.validation]

    def train_dataloader(self) -> DataLoader[Any]:
        """Windows drawn anew each epoch."""
        return self._loader(self.training, 0, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """The same windows each epoch."""
        return self._loader(self.config.data.validation, 1, shuffle=False) if self.config.data.validation else []

    def _loader(self, slides: list[str], stream: int, *, shuffle: bool) -> DataLoader[Any]:
        config, run = self.config, self.config.run
        windows = self.windows(slides, [run.seed, stream])
        trainer = self.trainer
        assert trainer is not None
        sampler = DrawSampler(windows, trainer.world_size, trainer.global_rank, shuffle=shuffle, seed=run.seed)
        if shuffle:  # Lightning tells it of each epoch, but of a run that goes on too late: workers load ahead
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        else:  # the same windows in each epoch
            sampler.set_epoch = lambda epoch: None  # type: ignore[method-assign]
        return DataLoader(
            windows,
            run.batch,
            sampler=sampler,
            num_workers=config.data.workers,
            collate_fn=self.collate_fn,
            persistent_workers=config.data.workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class History(Callback):
    """Losses of each epoch, kept in the checkpoints, so that a run that goes on has one curve."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the history of a checkpoint."""
        self.rows = list(state_dict["rows"])

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the time."""
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add a row, and write the table and its plot."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if not math.isfinite(metrics["loss"]):  # before a checkpoint is written
            raise ConfigError(
                f"epoch {trainer.current_epoch + 1}: the loss is {metrics['loss']}; lower "
                "optimizer.learning_rate or set optimizer.clip to 1, in a new run.out"
            )
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, "loss": metrics["loss"]}
        if "validation_loss" in metrics:
            row["validation_loss"] = metrics["validation_loss"]
        row["learning_rate"] = trainer.optimizers[0].param_groups[0]["lr"]
        row["seconds"] = round(time.perf_counter() - self.start, 3)
        self.rows.append(row)
        if trainer.is_global_zero:
            write_history(self.rows, self.folder)
            if trainer.progress_bar_callback is None:  # in a pipe or a log file
                shown = ", ".join(f"{name.replace('_', ' ')} {row[name]:.4f}" for name in row if "loss" in name)
                print(f"epoch {row['epoch']}: {shown}, {row['seconds']:.1f} s", flush=True)  # noqa: T201


class Stopping(EarlyStopping):
    """Early stopping, also of a run that goes on: by its own patience, and at once where it had stopped already."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of a checkpoint, but not the patience that it was written with."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop a run that had stopped."""
        trainer.should_stop = self.wait_count >= self.patience


def prepare_lightning(seed: int) -> None:
    """Seed what draws random numbers, and let Lightning keep its tips and device lists to itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(seed, verbose=False)


Trained = TypeVar("Trained", bound=Objective)


def fit(config: AnyConfig, store: Store, module: Trained, slides: Slides, chosen: list[str]) -> Trained | None:
    """Train, or continue a run; returns the best epoch's module, or the last's, in the process that is to save it."""
    run = config.run
    trainer = _trainer(config)
    if trainer.is_global_zero:
        _start_or_resume(config, store, chosen)
        print(as_yaml(config), flush=True)  # noqa: T201
    last = _last_checkpoint(run.out)
    if last is not None and trainer.is_global_zero:
        print(f"continuing from {last}", flush=True)  # noqa: T201
        for path in last.parent.glob("last-epoch=*.ckpt"):
            if path != last:  # those that a kill left, of which the run would not know
                path.unlink()
    with warnings.catch_warnings():
        for known in ("does not have many workers", "Total length of", "exists and is not empty", "LeafSpec"):
            warnings.filterwarnings("ignore", f".*{known}.*")
        with _clear_errors(trainer):
            trainer.fit(module, slides, ckpt_path=last, weights_only=True)
    if not trainer.is_global_zero:
        return None
    if best := _best(trainer):
        module.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])
    return module


@contextmanager
def _clear_errors(trainer: L.Trainer) -> Iterator[None]:
    """Turn the error that ended a run into one line with what to do."""
    try:
        yield
    except SystemExit:  # as Lightning turns Ctrl-C into
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    except InputError as error:  # of a process that loads windows PyTorch gives the traceback, and then the fault
        raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2]) from error
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(
            "the GPU has not enough memory; lower run.batch (and raise run.accumulate), or the most of data.spots, in "
            "a new run.out"
        ) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MemoryLimitError(
            "a process that loads windows was killed, as where memory is short; run again with fewer data.workers, it "
            "goes on"
        ) from error


def write_history(rows: list[dict[str, float]], folder: Path) -> None:
    """Write history.csv and loss.png."""
    import pandas as pd

    table = pd.DataFrame(rows)
    with written_whole(folder / HISTORY) as partial:
        table.to_csv(partial, index=False)
    with written_whole(folder / CURVES) as partial:
        _plot(table, partial)


def _plot(table: pd.DataFrame, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    marker = "o" if len(table) == 1 else ""  # a line of one point cannot be seen
    axes.plot(table["epoch"], table["loss"], marker=marker, label="training")
    if "validation_loss" in table:
        axes.plot(table["epoch"], table["validation_loss"], marker=marker, label="validation")
    axes.set(xlabel="epoch", ylabel="mean squared error on masked spots\n(log1p of raw counts)")
    axes.locator_params("x", integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=150)


def check_slides(store: Store, config: AnyConfig, chosen: Sequence[str]) -> None:
    """Check that slides are in the store, those for validation among them, and no patient on both sides.

    Raises
    ------
    InputError
        If it is not so.
    """
    data = config.data
    store.require_slides([*chosen, *data.validation])
    if outside := [slide for slide in data.validation if slide not in chosen]:
        raise ConfigError(f"data.validation: {outside[0]!r} is not among data.slides; add it there")
    training = [slide for slide in chosen if slide not in data.validation]
    if not training:
        raise ConfigError(f"{store.path}: no slide is left to train on; give data.slides and data.validation others")
    patients = {store.records[slide].patient for slide in training} - {""}
    for slide in data.validation:
        if (patient := store.records[slide].patient) in patients:
            raise ConfigError(f"data.validation: {slide!r} is of patient {patient!r}, who has slides in training too")
    for slide in chosen:
        if store.records[slide].counts == "log1p" and data.counts == "raw":
            raise ConfigError(f"slide {slide}: its counts are log-transformed already; set data.counts to log1p")


def _trainer(config: AnyConfig) -> L.Trainer:
    from rich.console import Console

    run = config.run
    folder = run.out / CHECKPOINTS
    callbacks: list[Callback] = [History(run.out)]
    keep = partial(ModelCheckpoint, folder, save_on_train_epoch_end=True, enable_version_counter=False)
    if config.data.validation:  # before the other, whose file then knows of this one's
        callbacks.append(keep("best-{epoch}", monitor="validation_loss"))
    callbacks.append(keep("last-{epoch}", monitor="epoch", mode="max", save_top_k=KEPT))
    if run.early_stopping is not None:
        callbacks.append(Stopping("validation_loss", patience=run.early_stopping, check_on_train_epoch_end=True))
    _require_gpus(config)
    interactive = Console(stderr=True).is_terminal
    if interactive:
        from lightning.pytorch.callbacks import RichProgressBar

        callbacks.append(RichProgressBar(leave=True))
    return L.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.nodes,
        strategy="ddp" if run.devices * run.nodes > 1 else "auto",
        precision=PRECISIONS[run.precision],  # type: ignore[arg-type]
        max_epochs=run.epochs,
        accumulate_grad_batches=run.accumulate,
        gradient_clip_val=config.optimizer.clip or None,
        callbacks=callbacks,
        logger=_logger(config),
        default_root_dir=run.out,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        enable_progress_bar=interactive,
        enable_model_summary=False,
    )


def _require_gpus(config: AnyConfig) -> None:
    run, gpus = config.run, torch.cuda.device_count()
    if run.accelerator == "gpu" and gpus == 0:
        raise DeviceError("run.accelerator: gpu, but PyTorch finds no GPU; set it to cpu, or install a build for CUDA")
    if run.accelerator != "cpu" and 0 < gpus < run.devices:
        raise DeviceError(f"run.devices: {run.devices}, but PyTorch finds {gpus} GPUs; set it to {gpus} or fewer")


def _logger(config: AnyConfig) -> Any:
    run = config.run
    if run.logger == "none":
        return False
    from importlib.util import find_spec

    if run.logger == "tensorboard":
        from lightning.pytorch.loggers import TensorBoardLogger

        if find_spec("tensorboard") is None:
            raise InstallError(
                "run.logger: tensorboard is not installed; run: pip install 'stpath-engine[tensorboard]'"
            )
        return TensorBoardLogger(run.out, name="tensorboard", version="")
    if find_spec("wandb") is None:
        raise InstallError("run.logger: wandb is not installed; run: pip install wandb")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(name=run.out.name, save_dir=run.out, config=config.model_dump(mode="json"))


def _start_or_resume(config: AnyConfig, store: Store, chosen: list[str]) -> None:
    """Write the config and a record of the store's contents into the run's folder, or check that they are the same."""
    out = config.run.out
    held = {"slides": chosen, "features": store.n_features, "genes": genes_hash(store.vocabulary)}
    if (out / CONFIG).exists():
        if changed := differences(read_config(out / CONFIG), config):
            raise OutputError(f"{out}: a run with another config ({'; '.join(changed)}); choose another run.out")
    elif out.exists() and (not out.is_dir() or any(path.suffix != ".partial" for path in out.iterdir())):
        raise OutputError(f"{out}: exists and is not a run of stpath; choose another run.out")
    if (out / STORE).exists():
        began_with = json.loads((out / STORE).read_text())
        if changed := [name for name in held if held[name] != began_with[name]]:
            raise OutputError(
                f"{store.path}: its {' and '.join(changed)} are no longer those that the run in {out} began with (see "
                f"{STORE} there); choose another run.out"
            )
    out.mkdir(parents=True, exist_ok=True)
    for name, text in ((CONFIG, as_yaml(config)), (STORE, json.dumps(held, indent=1))):
        with written_whole(out / name) as partial:
            partial.write_text(text)


def _last_checkpoint(out: Path) -> Path | None:
    """The checkpoint of the last epoch, if there is one; what a killed run left half-written is passed over."""
    found = {int(path.stem.rsplit("=")[-1]): path for path in (out / CHECKPOINTS).glob("last-epoch=*.ckpt")}
    # A zip archive, as PyTorch writes it, has its table at the end.
    whole = [epoch for epoch, path in found.items() if zipfile.is_zipfile(path)]
    return found[max(whole)] if whole else None


def _best(trainer: L.Trainer) -> str:
    """The best checkpoint by validation loss; empty where there is no validation."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor == "validation_loss":
            return callback.best_model_path
    return ""
