"""A training step in a process of its own: its time, and the peak memory of the process.

`python benchmarks/training_step.py collapsed|literal`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import torch

from stpath_runtime.machine import memory_of_process
from stpath_runtime.measures.bench.timing import seconds_of
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.config import Optimizer
from stpath_train.literal import literal_forward
from stpath_train.model import PUBLISHED_SIZES, STPath
from stpath_train.training import MaskedGeneModelling, masked_loss
from stpath_train.windows import Batch, collate, masked_window

SPOTS, MEASURED, NONZERO = 1024, 18_000, 5_000  # of a Visium slide: genes measured, and a spot's nonzero counts


def step_alone(kind: str) -> dict[str, float]:
    """Three steps in a new process: seconds of the last, bytes of the peak, and those above what every step must hold.

    That is the process with its batch, and weights, gradients and Adam's two moments.
    """
    command = [sys.executable, __file__, kind]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def a_batch() -> Batch:
    """One window of 1,024 spots, masked as published, of a simulated slide."""
    return collate([masked_window(_SimulatedSlide(), np.arange(SPOTS), _masking(), np.random.default_rng(1))])


def steps(model: STPath, batch: Batch) -> dict[str, Callable[[], float]]:
    """The collapsed and the literal step on one model; each returns its loss."""
    module = MaskedGeneModelling(model, Optimizer())
    adam = module.configure_optimizers()["optimizer"]

    def step(loss_of: Callable[[STPath, Batch], torch.Tensor]) -> float:
        adam.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return loss.item()

    return {"collapsed": lambda: step(masked_loss), "literal": lambda: step(literal_loss)}


def literal_loss(model: STPath, batch: Batch) -> torch.Tensor:
    """The published step: literal formula, dense tokens [N, 38,984], and a head over all genes."""
    context = batch.context()
    expression = literal_forward(
        model, batch.features, batch.coords, batch.organ, batch.technology, context, batch.sizes
    )[1]
    (asked,) = batch.asked
    predicted = expression[asked.spots][:, asked.tokens]
    return torch.nn.functional.mse_loss(predicted, asked.dense())


def _masking():
    from stpath_train.config import Masking

    return Masking(highly_variable=1)


class _SimulatedSlide:
    """Random counts in the shape of a Visium slide, read as a `StoredSlide` is."""

    def __init__(self) -> None:
        from stpath_train.store import Record

        rng = np.random.default_rng(0)
        self.record = Record("simulated", "Breast", "Visium")
        self.tokens = np.sort(rng.choice(np.arange(2, GeneVocabulary.published().n_tokens), MEASURED, replace=False))
        self.highly_variable = np.arange(MEASURED) < 200
        row, column = np.divmod(np.arange(SPOTS), 32)
        self.pixels = np.stack([200 * column + 100 * (row % 2), 173 * row], axis=1)
        self.coords = (self.pixels / self.pixels.max(axis=0) * 100).astype(np.float32)
        self._rng = rng

    def read(self, spots):
        from scipy.sparse import csr_matrix

        column = np.concatenate([self._rng.choice(MEASURED, NONZERO, replace=False) for _ in spots])
        values = np.log1p(self._rng.poisson(2, len(column)) + 1).astype(np.float32)
        counts = csr_matrix((values, column, np.arange(len(spots) + 1) * NONZERO), shape=(len(spots), MEASURED))
        return self._rng.standard_normal((len(spots), 1536)).astype(np.float32), counts


def _main(kind: str) -> None:
    batch = a_batch()
    before = memory_of_process("VmRSS")
    model = seeded_checkpoint(PUBLISHED_SIZES, 0)
    step = steps(model, batch)[kind]
    for _ in range(3):
        seconds = seconds_of(step)
    peak = memory_of_process()
    state = 4 * 4 * sum(value.numel() for value in model.state_dict().values())
    print(json.dumps({"seconds": seconds, "peak": peak, "above": peak - before - state}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
