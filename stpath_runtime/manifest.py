"""The manifests of engines (engine.json) and of tile encoders (encoder.json), and the check that files match them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from .errors import EngineError
from .files import known_sha256, sha256
from .records import record

SCHEMA = 2  # 2: the graphs of global attention mask keys that pad, and gene rows are picked in the graph
MANIFEST = "engine.json"
ENCODER_SCHEMA, ENCODER_MANIFEST = 1, "encoder.json"
ENCODER_GRAPH = "encoder"
WEIGHTS = "weights.bin"
GENES = "genes.tsv.gz"
ATTENTIONS = ("global", "knn")
PRECISIONS = ("fp32", "fp16", "bf16")
FLOW_SCHEMA = 3  # of STFlow's engines; versions that read STPath's alone say of it that it is newer
FLOW, FLOW_VARIANT = "stflow", "published"
ACTIVATIONS = ("swiglu", "gelu", "silu", "relu")
STARTS = ("zinb", "gaussian", "zero", "uniform")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an STPath model, as its checkpoint has them, and the attention that it was trained with."""

    d_model: int
    n_heads: int
    n_layers: int
    d_mlp: int
    n_features: int
    n_tokens: int  #: genes and the pad and mask tokens
    n_organs: int
    n_technologies: int
    attention: str = "global"  #: every spot to every spot; or "knn", every spot to its nearest
    neighbors: int = 0  #: with "knn": to how many, itself included


@dataclass(frozen=True)
class FlowConfig:
    """Sizes of an STFlow model, and how it is sampled; the defaults are the published ones."""

    n_genes: int = 50
    d_model: int = 128
    d_edge: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_features: int = 1536
    neighbors: int = 8  #: nearest spots, without the spot itself
    activation: str = "swiglu"
    steps: int = 5  #: points of the time grid
    start: str = "zinb"  #: what the first state is drawn from
    start_log_mean: float = 0.1  #: with "zinb": log of the mean of a count over the dispersion
    start_dispersion: float = 1.0  #: with "zinb"
    start_zero_logit: float = 0.0  #: with "zinb": of the probability that a count is 0 whatever was drawn

    def check(self) -> None:
        """Check the values beyond their types.

        Raises
        ------
        ValueError
            If a field has a value that it cannot have; the message names it.
        """
        for name in ("n_genes", "d_model", "d_edge", "n_layers", "n_heads", "n_features", "neighbors"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")
        for name in ("d_model", "d_edge"):
            if getattr(self, name) % self.n_heads:
                raise ValueError(f"{name} is {getattr(self, name)}, not a multiple of n_heads, {self.n_heads}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}, not {', '.join(ACTIVATIONS)}")
        if self.activation == "swiglu" and (self.d_model % 2 or self.d_edge % 2):
            raise ValueError(f"d_model and d_edge are {self.d_model} and {self.d_edge}; swiglu needs even ones")
        if self.start not in STARTS:
            raise ValueError(f"start is {self.start!r}, not {', '.join(STARTS)}")
        if self.steps < 2:
            raise ValueError(f"steps is {self.steps}, not 2 or more")
        numbers = (self.start_log_mean, self.start_dispersion, self.start_zero_logit)
        if not all(map(math.isfinite, numbers)) or self.start_dispersion <= 0 or abs(self.start_log_mean) > 50:
            raise ValueError(f"the start's log mean, dispersion and zero logit are {numbers}")

    def inner(self, hidden: int) -> int:
        """What is left of a hidden layer of such a width behind its activation: half where that is a gate."""
        return hidden // 2 if self.activation == "swiglu" else hidden


class _InFolder:
    """A manifest in its folder: how it is written, read, and held to the files beside it."""

    FILE: ClassVar[str]  # its name
    SCHEMA: ClassVar[int]  # that this version reads
    WHAT: ClassVar[str]  # what messages call the folder
    MAKE: ClassVar[str]  # the command that makes one
    schema: int
    files: dict[str, str]

    def write(self, directory: Path) -> None:
        """Write it into a folder."""
        content = json.dumps(asdict(self), indent=2)  # type: ignore[call-overload]
        (directory / self.FILE).write_text(content + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read it from a folder.

        Raises
        ------
        InputError
            If there is none, it is damaged, or it has another schema than this version reads.
        """
        path, again = directory / cls.FILE, f"export the {cls.WHAT} again"
        if not path.is_file():
            why = "no such folder" if not directory.exists() else f"it is a folder without {cls.FILE}"
            why = why if directory.is_dir() or not directory.exists() else "it is a file; give its folder"
            raise EngineError(f"{directory}: not an {cls.WHAT} ({why}); make one with: {cls.MAKE}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{path}: damaged {cls.WHAT} manifest ({error}); {again}") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if type(schema) is int and schema > 0 and schema != cls.SCHEMA:
            age, upgrade = ("newer", "upgrade stpath-engine, or ") if schema > cls.SCHEMA else ("older", "")
            raise EngineError(
                f"{path}: schema {schema} is {age} than {cls.SCHEMA}, which this version reads; {upgrade}{again} "
                "with this version"
            )
        try:
            manifest = record(cls, content)
            if manifest.schema != cls.SCHEMA:
                raise ValueError(f"schema is {manifest.schema}, not {cls.SCHEMA}")
            manifest.check()
        except ValueError as error:
            raise EngineError(f"{path}: damaged {cls.WHAT} manifest ({error}); {again}") from error
        return manifest

    def check(self) -> None:
        """Check the values beyond their types: what is damaged must not run.

        Raises
        ------
        ValueError
            If a field has a value that it cannot have; the message names it.
        """
        raise NotImplementedError

    def check_files(self, directory: Path, afresh: bool = True) -> None:
        """Compare every file with its SHA-256.

        Parameters
        ----------
        afresh
            Whether to read the files; or else only those that have changed since they were last read.

        Raises
        ------
        InputError
            If a file is missing, truncated or altered.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise EngineError(
                    f"{path}: missing from the {self.WHAT}; copy it again or export the {self.WHAT} again"
                )
            if (sha256(path) if afresh else known_sha256(path)) != expected:
                raise EngineError(
                    f"{path}: truncated or altered (its SHA-256 is not the one in {self.FILE}); "
                    f"copy it again or export the {self.WHAT} again"
                )


@dataclass(frozen=True)
class Manifest(_InFolder):
    """The contents of engine.json."""

    FILE, SCHEMA, WHAT = MANIFEST, SCHEMA, "engine"
    MAKE = "stpath export CHECKPOINT --out ENGINE"

    schema: int
    model: ModelConfig
    precision: str  #: "fp32", "fp16" or "bf16": the type of the weights and of what passes between the stages
    opset: int
    encoder: str  #: what computed the features that the model was trained on
    checkpoint: dict[str, str]  #: name and sha256
    created: str  #: ISO 8601, UTC
    files: dict[str, str]  #: path in the directory -> sha256
    versions: dict[str, str]  #: library -> version
    parity: dict[str, Any]  #: the proof, as stpath_export.proof writes it

    @property
    def n_genes(self) -> int:
        """Genes that it predicts."""
        return self.model.n_tokens - 2

    def check(self) -> None:
        """Check the values beyond their types: a damaged engine must not run.

        Raises
        ------
        ValueError
            If a field has a value that it cannot have; the message names it.
        """
        model = self.model
        sizes = {name: size for name, size in asdict(model).items() if name not in ("attention", "neighbors")}
        for name, size in sizes.items():
            if size <= 0:
                raise ValueError(f"model.{name} is {size}, not above 0")
        if model.d_model % model.n_heads:
            raise ValueError(f"model.d_model is {model.d_model}, not a multiple of n_heads, {model.n_heads}")
        if model.attention not in ATTENTIONS:
            raise ValueError(f"model.attention is {model.attention!r}, not {' or '.join(ATTENTIONS)}")
        if (model.neighbors > 0) != (model.attention == "knn") or model.neighbors < 0:
            raise ValueError(f"model.neighbors is {model.neighbors} for {model.attention} attention")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, not {', '.join(PRECISIONS)}")
        if missing := sorted({"name", "sha256"} - set(self.checkpoint)):
            raise ValueError(f"checkpoint.{missing[0]} is missing")
        if missing := sorted({WEIGHTS, GENES, *graph_files(model.n_layers)} - set(self.files)):
            raise ValueError(f"files names no {missing[0]}")
        if self.parity.get("passed", True) is not True:
            raise ValueError("its proof of parity did not pass")


@dataclass(frozen=True)
class FlowManifest(_InFolder):
    """The contents of engine.json of an STFlow engine."""

    FILE, SCHEMA, WHAT = MANIFEST, FLOW_SCHEMA, "engine"
    MAKE = "stpath export CHECKPOINT --config config.json --genes genes.json --out ENGINE"

    schema: int
    family: str  #: FLOW
    variant: str  #: which code's sampler and coordinates: FLOW_VARIANT
    model: FlowConfig
    precision: str  #: "fp32", "fp16" or "bf16"
    opset: int
    encoder: str  #: what computed the features that the model was trained on
    checkpoint: dict[str, str]  #: name and sha256
    created: str  #: ISO 8601, UTC
    files: dict[str, str]  #: path in the directory -> sha256
    versions: dict[str, str]  #: library -> version
    parity: dict[str, Any]  #: the proof, as stpath_export.stflow.proof writes it

    @property
    def n_genes(self) -> int:
        """Genes that it predicts."""
        return self.model.n_genes

    def check(self) -> None:
        """Check the values beyond their types: a damaged engine must not run.

        Raises
        ------
        ValueError
            If a field has a value that it cannot have; the message names it.
        """
        if (self.family, self.variant) != (FLOW, FLOW_VARIANT):
            raise ValueError(f"family and variant are {self.family!r} and {self.variant!r}, not {FLOW}, {FLOW_VARIANT}")
        self.model.check()
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, not {', '.join(PRECISIONS)}")
        if missing := sorted({"name", "sha256"} - set(self.checkpoint)):
            raise ValueError(f"checkpoint.{missing[0]} is missing")
        if missing := sorted({WEIGHTS, GENES, *flow_graph_files(self.model.n_layers)} - set(self.files)):
            raise ValueError(f"files names no {missing[0]}")
        if self.parity.get("passed", True) is not True:
            raise ValueError("its proof of parity did not pass")


@dataclass(frozen=True)
class Scale:
    """The piece of tissue that a tile shows."""

    microns_a_pixel: float
    microns: float  #: of a side


@dataclass(frozen=True)
class EncoderManifest(_InFolder):
    """The contents of encoder.json: a tile encoder, uint8 RGB tiles [N, size, size, 3] in, features [N, width] out."""

    FILE, SCHEMA, WHAT = ENCODER_MANIFEST, ENCODER_SCHEMA, "encoder"
    MAKE = "stpath export-encoder MODEL --out ENCODER"

    schema: int
    encoder: str  #: its name: one that is known, of the Hub, or of its folder
    architecture: str  #: of timm
    precision: str  #: "fp32", "fp16" or "bf16": the type of products and attention; norms and residual are float32
    opset: int
    size: int  #: pixels of a side of a tile
    width: int  #: features of a tile
    depth: int  #: blocks
    pooling: str  #: "token", "mean" or "token and mean"
    operations: float  #: of a tile: twice its multiplications
    activations: int  #: numbers that a tile takes while it runs
    trained: Scale | None  #: what the encoder was trained on, where it is known
    wanted: Scale  #: what STPath wants its tiles to show
    mean: tuple[float, ...]  #: of each colour, of values from 0 to 1
    std: tuple[float, ...]
    licence: str  #: as the Hub states it
    weights: dict[str, str]  #: name and sha256 of the file
    created: str  #: ISO 8601, UTC
    files: dict[str, str]  #: path in the directory -> sha256
    versions: dict[str, str]  #: library -> version
    parity: dict[str, Any]  #: the proof, as stpath_export.encoders.proof writes it

    def check(self) -> None:
        """Check the values beyond their types: a damaged encoder must not run.

        Raises
        ------
        ValueError
            If a field has a value that it cannot have; the message names it.
        """
        for name in ("size", "width", "depth", "operations", "activations"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not above 0")
        for name, scale in (("trained", self.trained), ("wanted", self.wanted)):
            if scale is not None and min(scale.microns, scale.microns_a_pixel) <= 0:
                raise ValueError(f"{name} is {scale}, not above 0")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("mean and std are not of three colours")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, not {', '.join(PRECISIONS)}")
        if missing := sorted({WEIGHTS, f"{ENCODER_GRAPH}.onnx"} - set(self.files)):
            raise ValueError(f"files names no {missing[0]}")
        if self.parity.get("passed", True) is not True:
            raise ValueError("its proof of parity did not pass")


def is_flow(directory: Path) -> bool:
    """Whether a folder is an STFlow engine's."""
    try:
        content = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # what is wrong with it is said as it is read
    return isinstance(content, dict) and content.get("family") == FLOW


def is_encoder(directory: Path) -> bool:
    """Whether a folder is a tile encoder's, not an STPath engine's."""
    return (directory / ENCODER_MANIFEST).is_file() and not (directory / MANIFEST).is_file()


def manifest_path(directory: Path) -> Path:
    """The manifest in a folder of an engine or of a tile encoder."""
    return directory / (ENCODER_MANIFEST if is_encoder(directory) else MANIFEST)


def read_engine(directory: Path) -> Manifest | FlowManifest:
    """The manifest of an engine of either model.

    Raises
    ------
    InputError
        If it is no engine, or its manifest is damaged or of another schema.
    """
    return FlowManifest.read(directory) if is_flow(directory) else Manifest.read(directory)


def read_manifest(directory: Path) -> Manifest | FlowManifest | EncoderManifest:
    """The manifest of an engine or of a tile encoder.

    Raises
    ------
    InputError
        If it is neither, or its manifest is damaged or of another schema.
    """
    return EncoderManifest.read(directory) if is_encoder(directory) else read_engine(directory)


def graph_files(n_layers: int) -> list[str]:
    """Names of an engine's graphs."""
    blocks = [f"{kind}_{layer}" for kind in ("block", "knn_block") for layer in range(1, n_layers + 1)]
    return [f"{name}.onnx" for name in ("tokens", "embed", *blocks, "head", "fused", "fused_knn")]


def flow_graph_files(n_layers: int) -> list[str]:
    """Names of an STFlow engine's graphs."""
    layers = [f"{kind}_{layer}" for kind in ("edges", "layer") for layer in range(1, n_layers + 1)]
    return [f"{name}.onnx" for name in ("image", *layers)]
