"""The config of a training run: every choice is a named field, with its type, range and published default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stpath_runtime.errors import ConfigError
from stpath_runtime.slides.vocabulary import nearest_names

CHANGEABLE = ("run.epochs", "run.early_stopping", "run.logger", "data.workers")  # when a run goes on
Share = Annotated[float, Field(ge=0, le=1)]
Above0 = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Fields by these names and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(Section):
    """Which slides, and the windows cut from them."""

    store: Path = Field(description="the training store (stpath data prepare)")
    slides: list[str] | None = Field(None, description="slides to use; null: all of the store")
    validation: list[str] = Field([], description="slides kept for validation, out of those")
    counts: Literal["raw", "log1p"] = Field("raw", description="log1p lets in slides whose counts are transformed")
    spots: tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=2)]] = Field(
        (64, 1024), description="a window's least and most spots: those nearest to a random one"
    )
    windows_per_slide: int = Field(1, ge=1, description="windows drawn from each slide in an epoch")
    workers: int = Field(2, ge=0, description="processes that load windows")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.spots[0] > self.spots[1]:
            raise ValueError(f"spots: the least ({self.spots[0]}) is above the most ({self.spots[1]})")
        return self


class Model(Section):
    """The model that is trained."""

    checkpoint: Path | None = Field(None, description="fine-tune from this one (stfm.pth); null: from random weights")
    attention: Literal["global", "knn"] = Field("global", description="to all spots of a window, or to the nearest")
    neighbors: int = Field(0, ge=0, description="with knn: to how many spots, the spot itself among them")
    d_model: int = Field(512, ge=1, description="width; the sizes are those of the checkpoint where one is given")
    n_heads: int = Field(4, ge=1, description="attention heads")
    n_layers: int = Field(4, ge=1, description="blocks")
    d_mlp: int = Field(1024, ge=1, description="width inside the MLP")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.attention == "knn") != (self.neighbors > 0):
            raise ValueError("neighbors: attention knn needs a number of neighbors, and attention global takes none")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model: {self.d_model} does not divide by {self.n_heads} heads")
        return self


class Masking(Section):
    """What is hidden of a window, and what is to be predicted."""

    ratio: tuple[Above0, Above0] = Field((10, 1), description="a and b of the Beta distribution of the masked share")
    whole: Share = Field(0.9, description="of the masked spots, the share that gets the mask token")
    genes_lost: Share = Field(0.5, description="share of the genes asked for that the other masked spots lose")
    highly_variable: Share = Field(0.8, description="share of windows asked for highly variable genes; else for all")
    technology_dropped: Share = Field(0.8, description="share of spots whose technology is hidden")


class Optimizer(Section):
    """Adam."""

    learning_rate: Above0 = Field(5e-4, description="after the warm-up")
    warmup_steps: int = Field(100, ge=0, description="steps in which the learning rate grows from 0")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0: no limit")


class Run(Section):
    """How long, on what, and where to."""

    out: Path = Field(description="folder of the run; the same config goes on there with a run that was stopped")
    epochs: int = Field(ge=1, description="times that every slide is drawn from")
    batch: int = Field(2, ge=1, description="windows a step and device")
    accumulate: int = Field(1, ge=1, description="steps whose gradients are added up")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: mixed, with weights in fp32")
    accelerator: Literal["auto", "cpu", "gpu"] = Field("auto", description="what to train on")
    devices: int = Field(1, ge=1, description="GPUs of a node, or processes on CPUs")
    nodes: int = Field(1, ge=1, description="machines")
    early_stopping: int | None = Field(None, ge=1, description="epochs without a better validation loss; null: never")
    logger: Literal["none", "tensorboard", "wandb"] = Field("none", description="beside history.csv and loss.png")
    seed: int = Field(0, ge=0, description="of weights, windows and masks")


class TrainConfig(Section):
    """A training run."""

    data: Data
    model: Model = Model()
    masking: Masking = Masking()
    optimizer: Optimizer = Optimizer()
    run: Run

    @model_validator(mode="after")
    def _stoppable(self) -> Self:
        if self.run.early_stopping is not None and not self.data.validation:
            raise ValueError("run.early_stopping: needs slides in data.validation to judge by")
        return self


def read_config(path: str | Path) -> TrainConfig:
    """Read a YAML config; paths in it are relative to its folder.

    Raises
    ------
    InputError
        If the file is missing, no YAML, or a field is unknown, missing, of another type or out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; stpath train --example prints one")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _OnceLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    try:
        config = TrainConfig.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_tell(fault) for fault in error.errors())}") from None
    return _anchored(config, path.absolute().parent)


def as_yaml(config: TrainConfig) -> str:
    """A config as YAML, every field of it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The fields that differ, beside those that may change when a run goes on: 'run.seed 0, now 1'."""
    before, after = (_flat(config.model_dump(mode="json")) for config in (old, new))
    changed = [name for name in after if after[name] != before[name] and name not in CHANGEABLE]
    return [f"{name} {before[name]}, now {after[name]}" for name in changed]


def example() -> str:
    """A config with every field at its published value, and what each means."""
    given = {"data.store": "store", "run.out": "run", "run.epochs": 100}
    lines = ["# A training run of stpath: stpath train CONFIG.yaml. Paths are relative to this file's folder."]
    for name, section in TrainConfig.model_fields.items():
        lines.append(f"{name}:")
        fields: dict[str, Any] = section.annotation.model_fields  # type: ignore[union-attr]
        for field, about in fields.items():
            value = given.get(f"{name}.{field}", about.default)
            shown = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True)
            lines.append(f"  {field}: {shown.splitlines()[0]}  # {about.description}")
    return "\n".join(lines) + "\n"


def _anchored(config: TrainConfig, folder: Path) -> TrainConfig:
    model, run = config.model, config.run
    if model.checkpoint is not None:
        model = model.model_copy(update={"checkpoint": folder / model.checkpoint})
    data = config.data.model_copy(update={"store": folder / config.data.store})
    return config.model_copy(
        update={"data": data, "model": model, "run": run.model_copy(update={"out": folder / run.out})}
    )


def _tell(fault: Any) -> str:
    """One fault of pydantic's, as 'run.epochs: -1, should be greater than or equal to 1'."""
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        near = nearest_names(name, [*TrainConfig.model_fields, *_fields()] if "." in name else TrainConfig.model_fields)
        return f"{name}: {fault['input']!r}: no such field{near}"
    if fault["type"] == "missing":
        return f"{name}: is missing, and has no default"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{name or 'the whole'}: {fault['input']!r} should be a section of named fields"
    if fault["type"] == "value_error":
        return f"{name}.{fault['msg'].removeprefix('Value error, ')}".lstrip(".")
    return f"{name}: {fault['input']!r} {fault['msg'].removeprefix('Input ')}"


def _fields() -> list[str]:
    sections = TrainConfig.model_fields.items()
    return [f"{name}.{field}" for name, section in sections for field in section.annotation.model_fields]  # type: ignore[union-attr]


def _flat(sections: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()}


class _OnceLoader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that appears twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep) for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)
