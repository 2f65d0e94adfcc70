"""Golden cases and engines that the tests share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import GOLDEN_CASES, Golden, load_golden, write_symbol_table
from stpath_train.checkpoint import save_checkpoint


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    """The smallest golden case with context."""
    return load_golden("tiny_context")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save(tiny.model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_genes(tiny, tmp_path_factory) -> Path:
    return write_symbol_table(tiny.vocabulary, tmp_path_factory.mktemp("genes") / "symbol2ensembl.json")


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint, tiny_genes, tmp_path_factory) -> Path:
    """An engine directory of the tiny model, fp32, proven."""
    from stpath_export.exporter import export_engine

    out = tmp_path_factory.mktemp("engines") / "tiny"
    export_engine(tiny_checkpoint, out, tiny_genes)
    return out


@pytest.fixture(scope="session")
def golden_engine(golden, tmp_path_factory) -> Path:
    """An engine directory of a golden case's model, fp32, proven."""
    from stpath_export.exporter import export_engine

    folder = tmp_path_factory.mktemp(golden.name)
    save_checkpoint(golden.model, folder / "model.safetensors")
    genes = write_symbol_table(golden.vocabulary, folder / "symbol2ensembl.json")
    export_engine(folder / "model.safetensors", folder / "engine", genes)
    return folder / "engine"
