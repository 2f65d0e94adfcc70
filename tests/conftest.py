"""Golden cases and engines that the tests share."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch.onnx._internal.exporter._registration import onnxscript_apis

import timm_here  # noqa: F401, before anything imports timm
from helpers import (
    GOLDEN_CASES,
    Golden,
    load_flow_golden,
    load_golden,
    write_encoder,
    write_flow_checkpoint,
    write_symbol_table,
)
from stpath_export.encoders.exporter import export_encoder
from stpath_export.exporter import export_engine, write_engine
from stpath_runtime.cli.app import main
from stpath_train.checkpoint import seeded_checkpoint

# A shell lets what it starts in the background ignore Ctrl-C, as nohup does SIGHUP, and so do all its children.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing is read from the user's cache, or left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


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
def flow_engine(made_once) -> Path:
    """An engine of the golden cases of STFlow whose units are gated, and beside it what it was made from."""

    def fill(folder):
        checkpoint, config, genes = write_flow_checkpoint(load_flow_golden("random_small").model, folder)
        export_engine(checkpoint, folder / "engine", genes, config=config)

    return made_once("flow_engine", fill) / "engine"


@pytest.fixture(scope="session")
def tiny_genes(tiny, made_once) -> Path:
    fill = lambda folder: write_symbol_table(tiny.vocabulary, folder / "symbol2ensembl.json")  # noqa: E731
    return made_once("tiny_genes", fill) / "symbol2ensembl.json"


@pytest.fixture(scope="session")
def one_layer_checkpoint(tiny, made_once) -> Path:
    """The tiny model with one layer alone: for tests of what an export does, half of whose time the layers take."""

    def fill(folder: Path) -> None:
        model = seeded_checkpoint(dataclasses.replace(tiny.model.config, n_layers=1), 0)
        torch.save(model.state_dict(), folder / "one_layer.pth")

    return made_once("one_layer_checkpoint", fill) / "one_layer.pth"


@pytest.fixture(scope="session")
def tiny_engine(tiny, tiny_checkpoint, tiny_genes, made_once) -> Path:
    """An engine directory of the tiny model with context, fp32, proven."""
    return made_once("tiny_engine", lambda f: export_engine(tiny_checkpoint, f / "engine", tiny_genes)) / "engine"


@pytest.fixture(scope="session")
def tiny_fp16_engine(tiny_checkpoint, tiny_genes, made_once) -> Path:
    """The same in fp16, proven."""

    def fill(folder: Path) -> None:
        export_engine(tiny_checkpoint, folder / "engine", tiny_genes, "fp16")

    return made_once("tiny_context_fp16", fill) / "engine"


@pytest.fixture(scope="session")
def tiny_bf16_engine(tiny, made_once) -> Path:
    """The same in bf16; not proven, as its proof runs on a GPU."""

    def fill(folder: Path) -> None:
        (folder / "engine").mkdir()
        write_engine(tiny.model, tiny.vocabulary, folder / "engine", "bf16", {"name": "tiny.pth", "sha256": "0" * 64})

    return made_once("tiny_context_bf16", fill) / "engine"


@pytest.fixture(scope="session")
def encoder_folder(made_once) -> Path:
    """A small Gigapath as the Hub has it, of as many features as the tiny model takes."""
    return made_once("encoder_folder", write_encoder)


@pytest.fixture(scope="session")
def tiny_encoder(encoder_folder, made_once) -> Path:
    """Its engine, fp32, proven."""
    return made_once("tiny_encoder", lambda f: export_encoder(str(encoder_folder), f / "encoder")) / "encoder"


@pytest.fixture(scope="session")
def golden_engine(golden, tiny, tiny_engine, made_once) -> Path:
    """An engine directory of a golden case's model, fp32; not proven, as the tests hold it to the published outputs."""
    if golden.name == tiny.name:
        return tiny_engine

    def fill(folder: Path) -> None:
        (folder / "engine").mkdir()
        source = {"name": f"{golden.name}.pth", "sha256": "0" * 64}
        write_engine(golden.model, golden.vocabulary, folder / "engine", "fp32", source)

    return made_once(golden.name, fill) / "engine"


@pytest.fixture
def stpath(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session", autouse=True)
def _fast_exporter() -> Iterator[None]:
    """PyTorch's exporter, which coverage does not follow, and which lists its operators once, not for every graph."""
    export = torch.onnx.export

    def untraced(*args, **kwargs):
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return export(*args, **kwargs)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", untraced)
        patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))
        yield
