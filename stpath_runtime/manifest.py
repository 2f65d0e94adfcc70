"""engine.json, the manifest of an engine directory, and the check that the files still match it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import EngineError
from .files import sha256
from .records import record

SCHEMA = 2  # 2: the graphs of global attention mask keys that pad, and gene rows are picked in the graph
MANIFEST = "engine.json"
WEIGHTS = "weights.bin"
GENES = "genes.tsv.gz"
ATTENTIONS = ("global", "knn")
PRECISIONS = ("fp32", "fp16", "bf16")


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
class Manifest:
    """The contents of engine.json."""

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
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{path}: damaged engine manifest ({error}); export the engine again") from error
        schema = content.get("schema") if isinstance(content, dict) else None
        if type(schema) is int and schema > 0 and schema != SCHEMA:
            age, upgrade = ("newer", "upgrade stpath-engine, or ") if schema > SCHEMA else ("older", "")
            raise EngineError(
                f"{path}: schema {schema} is {age} than {SCHEMA}, which this version reads; {upgrade}export the engine "
                "again with this version"
            )
        try:
            manifest = record(cls, content)
            manifest.check()
        except ValueError as error:
            raise EngineError(f"{path}: damaged engine manifest ({error}); export the engine again") from error
        return manifest

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
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema}, not {SCHEMA}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}, not {', '.join(PRECISIONS)}")
        if missing := sorted({"name", "sha256"} - set(self.checkpoint)):
            raise ValueError(f"checkpoint.{missing[0]} is missing")
        if missing := sorted({WEIGHTS, GENES, *graph_files(model.n_layers)} - set(self.files)):
            raise ValueError(f"files names no {missing[0]}")
        if self.parity.get("passed", True) is not True:
            raise ValueError("its proof of parity did not pass")

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
