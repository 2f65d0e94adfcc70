"""A store over the genes of the tiny model, with regions and labels, that the tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evaluation_helpers import fill_store

from stpath_runtime.cli.app import main
from stpath_train.store import Store


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on several threads wait for each other where other processes run beside them.

    For each test: scanpy's neighbours set the number back.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(tiny, made_once) -> Store:
    """Slides S0 to S5; the task TINY."""
    fill = lambda folder: fill_store(folder, tiny.vocabulary, tiny.model.config.n_features)  # noqa: E731
    return Store.open(made_once("evaluation_store", fill))


@pytest.fixture
def evaluate(store, tiny_checkpoint, tmp_path, capsys):
    """Run `stpath evaluate` in this process: exit code, output, errors and the folder of results."""

    def run(task: str, *words, data: Path = store.path, model=("--checkpoint", tiny_checkpoint), out: str = "out"):
        folder = tmp_path / out
        line = ["evaluate", task, *model, "--data", data, "--out", folder, *words]
        code = main([str(word) for word in line])
        output, errors = capsys.readouterr()
        return code, output, errors, folder

    return run
