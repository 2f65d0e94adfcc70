"""engine.json: what an engine directory holds, and the check that it still holds it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import EngineError, InputError

SCHEMA = 2  # 2: the graphs of global attention mask keys that pad, and gene rows are picked in the graph
MANIFEST = "engine.json"
WEIGHTS = "weights.bin"
GENES = "genes.tsv.gz"
ATTENTIONS = ("global", "knn")
PRECISIONS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of an STPath model, which show in the shapes of its checkpoint, and how it was trained to attend."""

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
class Manifest:
    """The contents of engine.json."""

    schema: int
    model: ModelConfig
    precision: str  #: "fp32" or "fp16": the type of the weights and of what passes between the stages
    opset: int
    encoder: str  #: what computed the features that the model was trained on
    checkpoint: dict[str, str]  #: name and sha256
    created: str  #: ISO 8601, UTC
    files: dict[str, str]  #: path in the directory -> sha256
    versions: dict[str, str]  #: library -> version
    parity: dict[str, Any]  #: the proof, as stpath_export.proof writes it

    def write(self, directory: Path) -> None:
        """Write engine.json."""
        (directory / MANIFEST).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read engine.json.

        Raises
        ------
        InputError
            If there is no engine, its manifest is damaged, or it has another schema than this version reads.
        """
        path = directory / MANIFEST
        if not path.is_file():
            why = "no such folder" if not directory.exists() else f"it is a folder without {MANIFEST}"
            why = why if directory.is_dir() or not directory.exists() else "it is a file; give its folder"
            raise EngineError(
                f"{directory}: not an engine ({why}); make one with: stpath export CHECKPOINT --out ENGINE"
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            schema = found["schema"]
            if type(schema) is int and schema > 0 and schema != SCHEMA:
                age, mend = ("newer", "upgrade stpath-engine, or ") if schema > SCHEMA else ("older", "")
                raise EngineError(
                    f"{path}: schema {schema} is {age} than {SCHEMA}, which this version reads; {mend}export the "
                    "engine again with this version"
                )
            manifest = cls(**{**found, "model": ModelConfig(**found["model"])})
            manifest.check()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, InputError):
                raise
            raise EngineError(f"{path}: damaged engine manifest ({error}); export the engine again") from error
        return manifest

    def check(self) -> None:
        """Check types and values; what a damaged file holds must not be run.

        Raises
        ------
        ValueError
            If a field cannot be.
        """
        model = self.model
        sizes = [getattr(model, f.name) for f in fields(ModelConfig) if f.name not in ("attention", "neighbors")]
        trained = {"global": model.neighbors == 0, "knn": type(model.neighbors) is int and model.neighbors > 0}
        named = self.checkpoint | self.versions if _texts(self.checkpoint) and _texts(self.versions) else None
        checks = {
            "schema": type(self.schema) is int and self.schema == SCHEMA,
            "model": all(type(size) is int and size > 0 for size in sizes) and model.d_model % model.n_heads == 0,
            "attention": trained.get(model.attention, False),
            "precision": self.precision in PRECISIONS,
            "opset": type(self.opset) is int,
            "encoder or created": isinstance(self.encoder, str) and isinstance(self.created, str),
            "checkpoint or versions": named is not None and {"name", "sha256"} <= set(self.checkpoint),
            "files": _texts(self.files) and set(self.files) >= {WEIGHTS, GENES, *graph_files(model.n_layers)},
            "parity": isinstance(self.parity, dict) and self.parity.get("passed", True) is True,
        }
        if wrong := [name for name, right in checks.items() if not right]:
            raise ValueError(f"{wrong[0]} is missing, or not what it can be")

    def check_files(self, directory: Path) -> None:
        """Compare every file with its SHA-256.

        Raises
        ------
        InputError
            If a file is missing, truncated or altered.
        """
        for name, expected in self.files.items():
            path = directory / name
            if not path.is_file():
                raise EngineError(f"{path}: missing from the engine; copy it again or export the engine again")
            if sha256(path) != expected:
                raise EngineError(
                    f"{path}: truncated or altered (its SHA-256 is not the one in {MANIFEST}); "
                    "copy it again or export the engine again"
                )


def graph_files(n_layers: int) -> list[str]:
    """Names of an engine's graphs."""
    blocks = [f"{kind}_{layer}" for kind in ("block", "knn_block") for layer in range(1, n_layers + 1)]
    return [f"{name}.onnx" for name in ("tokens", "embed", *blocks, "head", "fused", "fused_knn")]


def _texts(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(value, str) for value in found.values())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
