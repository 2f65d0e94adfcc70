"""What the benchmarks share: an engine of the published sizes, and a table printed at the end."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

from stpath_export.exporter import export_engine
from stpath_train.checkpoint import save_checkpoint, seeded_checkpoint
from stpath_train.model import PUBLISHED_SIZES, STPath

ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def model() -> STPath:
    """A model of the published sizes (49.2 M parameters, 38,984 tokens), weights from a seed."""
    return seeded_checkpoint(PUBLISHED_SIZES, 0)


@pytest.fixture(scope="session")
def engine_path(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    save_checkpoint(model, folder / "checkpoint.safetensors")
    export_engine(folder / "checkpoint.safetensors", folder / "engine")
    return folder / "engine"


@pytest.fixture
def report(request):
    """Add a row to the closing table: what, measured, goal."""
    return lambda *row: request.config.stash[ROWS].append(row)


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_terminal_summary(config):
    table = Table(title=f"{_machine()}, {torch.get_num_threads()} threads, {platform.python_version()}")
    for column in ("what", "measured", "goal"):
        table.add_column(column)
    for row in config.stash[ROWS]:
        table.add_row(*row)
    if config.stash[ROWS]:
        Console(width=140).print(table)


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
