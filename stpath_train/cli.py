"""The commands `stpath data`, `stpath features`, `stpath train` and `stpath evaluate`.

The libraries that a command needs are imported when it runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from stpath_runtime.errors import InputError

TRAIN = ("torch", "torch_geometric", "safetensors", "lightning", "pydantic", "yaml", "scanpy", "sklearn", "matplotlib")

data = typer.Typer(no_args_is_help=True, help="Prepare slides with measured expression for training and evaluation.")


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The run; stpath train --example prints one.")],
) -> None:
    """Train a model, or go on with a run that was stopped."""
    require(TRAIN, "train")


def require(libraries: tuple[str, ...], extra: str) -> None:
    """Raise InputError, with what to install, where a library is not."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise InputError(f"this command needs {', '.join(missing)}; run: pip install 'stpath-engine[{extra}]'")
