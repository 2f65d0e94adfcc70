"""A training step on a window of 1,024 spots: against the literal formula with dense tokens, its time and memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stpath_runtime.measures.bench.results import Row
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.model import PUBLISHED_SIZES
from stpath_train.training import masked_loss
from training_step import SPOTS, a_batch, literal_loss, step_alone, steps

STEP = Row("training step", attention="global", spots=SPOTS)


@pytest.fixture
def published_alone(pytestconfig):
    if pytestconfig.getoption("--tiny"):
        pytest.skip("of the published sizes alone")


@pytest.mark.quick
def test_time(in_turn, report, published_alone):
    """Both steps are of one model and batch, and ours is held to the literal one by the loss before the first."""
    model, batch = seeded_checkpoint(PUBLISHED_SIZES, 0), a_batch()
    with torch.no_grad():
        ours, literal = masked_loss(model, batch), literal_loss(model, batch)
    step = steps(model, batch)
    calls = {
        replace(STEP, variant="ours"): step["collapsed"],
        replace(STEP, variant="literal formula"): step["literal"],
    }
    for call in calls.values():
        call()
    first, second = in_turn(calls)
    report([replace(first, relative_l2=abs(ours / literal - 1).item(), parity="the literal loss"), second])


def test_memory(report, published_alone):
    """Three steps in a fresh process; weights, gradients and Adam's moments take 1.3 GB of it."""
    for variant, kind in {"ours": "collapsed", "literal formula": "literal"}.items():
        found = step_alone(kind)
        note = f"{found['above'] / 1e9:.2f} GB above the process and the state"
        row = replace(STEP, what="training step, peak", variant=variant, note=note)
        report([replace(row, seconds=(found["seconds"],), peak_bytes=int(found["peak"]))])
