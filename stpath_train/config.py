"""The config of a training run: every choice is a named field, with its type, range and published default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class FlowData(Section):
    """Which slides and genes STFlow is trained on."""

    store: Path = Field(description="the training store (stpath data prepare)")
    slides: list[str] | None = Field(None, description="slides to use; null: all of the store, or the fold's")
    validation: list[str] = Field(min_length=1, description="slides, out of those, by which the epoch is chosen")
    genes: Path | list[str] | None = Field(None, description="names, or a JSON file of them; null: the benchmark's")
    benchmark: str | None = Field(None, description="a task of the store, such as HEST-bench's, for genes and slides")
    fold: int = Field(0, ge=0, description="with a benchmark: whose training slides; its test slides are never seen")
    counts: Literal["raw", "log1p"] = Field("raw", description="log1p lets in slides whose counts are transformed")
    windows_per_slide: int = Field(1, ge=1, description="windows drawn from each slide in an epoch")
    workers: int = Field(2, ge=0, description="processes that load windows")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.genes is None) == (self.benchmark is None):
            raise ValueError("genes: give genes, or a benchmark that names them")
        if self.slides is not None and self.benchmark is not None:
            raise ValueError("slides: a benchmark names them; leave them out")
        return self


class FlowModel(Section):
    """STFlow, and how it is sampled; defaults as published."""

    kind: Literal["stflow"] = Field("stflow", description="the model")
    d_model: int = Field(128, ge=1, description="width")
    d_edge: int = Field(128, ge=1, description="width of edges")
    n_layers: int = Field(4, ge=1, description="layers")
    n_heads: int = Field(4, ge=1, description="attention heads")
    neighbors: int = Field(8, ge=1, description="nearest spots, without the spot itself")
    activation: Literal["swiglu", "gelu", "silu", "relu"] = Field("swiglu", description="of the units")
    steps: int = Field(5, ge=2, description="points of the time grid")
    start: Literal["zinb", "gaussian", "zero", "uniform"] = Field("zinb", description="what samples begin with")
    dropout: float = Field(0.2, ge=0, lt=1, description="in training")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.d_model % (2 * self.n_heads) or self.d_edge % (2 * self.n_heads):
            raise ValueError(f"d_model: {self.d_model}, or d_edge, {self.d_edge}, does not divide by twice the heads")
        return self


class FlowOptimizer(Optimizer):
    """Adam, as published for STFlow."""

    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate grows from 0")


class FlowTrainConfig(Section):
    """A training run of STFlow: `model: stflow`, or a section of `kind: stflow`."""

    data: FlowData
    model: FlowModel
    optimizer: FlowOptimizer = FlowOptimizer()
    run: Run

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, model: Any) -> Any:
        return {"kind": model} if isinstance(model, str) else model


AnyConfig = TrainConfig | FlowTrainConfig


def _class_of(raw: Any) -> type[TrainConfig] | type[FlowTrainConfig]:
    model = raw.get("model") if isinstance(raw, dict) else None
    named = model == "stflow" or (isinstance(model, dict) and model.get("kind") == "stflow")
    return FlowTrainConfig if named else TrainConfig


def read_config(path: str | Path) -> AnyConfig:
    """Read a YAML config of either model; paths in it are relative to its folder.

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
    chosen = _class_of(raw)
    try:
        config = chosen.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{path}: {'; '.join(_tell(fault, chosen) for fault in error.errors())}") from None
    return _anchored(config, path.absolute().parent)


def as_yaml(config: AnyConfig) -> str:
    """A config as YAML, every field of it."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: AnyConfig, new: AnyConfig) -> list[str]:
    """The fields that differ, beside those that may change when a run goes on: 'run.seed 0, now 1'."""
    if type(old) is not type(new):
        return ["model, of another kind"]
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


def _anchored(config: AnyConfig, folder: Path) -> AnyConfig:
    data: dict[str, Any] = {"store": folder / config.data.store}
    model: dict[str, Any] = {}
    if isinstance(config, FlowTrainConfig):
        if isinstance(config.data.genes, Path):
            data["genes"] = folder / config.data.genes
    elif config.model.checkpoint is not None:
        model["checkpoint"] = folder / config.model.checkpoint
    sections = {"data": data, "model": model, "run": {"out": folder / config.run.out}}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=changed) for name, changed in sections.items()}
    )


def _tell(fault: Any, config: type[AnyConfig]) -> str:
    """One fault of pydantic's, as 'run.epochs: -1, should be greater than or equal to 1'."""
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        sections = config.model_fields
        near = nearest_names(name, [*sections, *_fields(config)] if "." in name else sections)
        return f"{name}: {fault['input']!r}: no such field{near}"
    if fault["type"] == "missing":
        return f"{name}: is missing, and has no default"
    if fault["type"] in ("model_type", "model_attributes_type"):
        return f"{name or 'the whole'}: {fault['input']!r} should be a section of named fields"
    if fault["type"] == "value_error":
        return f"{name}.{fault['msg'].removeprefix('Value error, ')}".lstrip(".")
    return f"{name}: {fault['input']!r} {fault['msg'].removeprefix('Input ')}"


def _fields(config: type[AnyConfig]) -> list[str]:
    sections = config.model_fields.items()
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
