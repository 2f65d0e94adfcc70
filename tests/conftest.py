"""Golden cases and engines that the tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from helpers import GOLDEN_CASES, Golden, load_golden, write_symbol_table
from stpath_export.exporter import export_engine
from stpath_train.checkpoint import save_checkpoint

# timm and torchvision are where the Makefile puts them. torchvision's wheels on the package index are built for CUDA:
# beside a PyTorch for the CPU they load only if the operators that they lack are declared.
sys.path.append(str(Path(sys.prefix) / "features"))
if "+cpu" in torch.__version__ and find_spec("torchvision") and "+cpu" not in version("torchvision"):
    TORCHVISION = torch.library.Library("torchvision", "DEF")
    TORCHVISION.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    TORCHVISION.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    """The smallest golden case with context."""
    return load_golden("tiny_context")


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Make a folder once for all processes of the run: exports are what the tests take their time for."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    shared = tmp_path_factory.getbasetemp().parent / run if run else tmp_path_factory.mktemp("shared")
    shared.mkdir(exist_ok=True)

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny, made_once) -> Path:
    fill = lambda folder: torch.save(tiny.model.state_dict(), folder / "tiny.pth")  # noqa: E731
    return made_once("tiny_checkpoint", fill) / "tiny.pth"


@pytest.fixture(scope="session")
def tiny_genes(tiny, made_once) -> Path:
    fill = lambda folder: write_symbol_table(tiny.vocabulary, folder / "symbol2ensembl.json")  # noqa: E731
    return made_once("tiny_genes", fill) / "symbol2ensembl.json"


@pytest.fixture(scope="session")
def tiny_engine(made_once) -> Path:
    """An engine directory of the tiny model with context, fp32, proven."""
    return _golden_engine(load_golden("tiny_context"), made_once)


@pytest.fixture(scope="session")
def golden_engine(golden, made_once) -> Path:
    """An engine directory of a golden case's model, fp32, proven."""
    return _golden_engine(golden, made_once)


def _golden_engine(golden: Golden, made_once) -> Path:
    def fill(folder: Path) -> None:
        save_checkpoint(golden.model, folder / "model.safetensors")
        genes = write_symbol_table(golden.vocabulary, folder / "symbol2ensembl.json")
        export_engine(folder / "model.safetensors", folder / "engine", genes)

    return made_once(golden.name, fill) / "engine"
