"""A training step on a window of 1,024 spots, published sizes: against the literal formula with dense tokens."""

from __future__ import annotations

import statistics
import time

from training_step import a_batch, step_alone, steps

ROUNDS = 5


def test_training_step(benchmark, report):
    """Interleaved: the literal step runs before each round of ours, on the same model and batch."""
    step = steps(a_batch())
    losses = {kind: run() for kind, run in step.items()}
    literal_seconds = []

    def literal():
        start = time.perf_counter()
        losses["literal"] = step["literal"]()
        literal_seconds.append(time.perf_counter() - start)

    benchmark.pedantic(step["collapsed"], setup=literal, rounds=ROUNDS)
    ours = benchmark.stats.stats.data
    ratios = [a / b for a, b in zip(literal_seconds, ours, strict=True)]
    benchmark.extra_info.update(literal_seconds=literal_seconds, ratios=ratios)
    report(
        "training step, 1,024 spots, 38,984 tokens, fp32: literal formula and dense tokens / ours",
        f"{statistics.median(literal_seconds):.2f} s / {statistics.median(ours):.2f} s = "
        f"{statistics.median(ratios):.1f}x (pairs {min(ratios):.1f} to {max(ratios):.1f})",
        "4x",
    )


def test_memory_of_a_training_step(report):
    ours, literal = (step_alone(kind) for kind in ("collapsed", "literal"))
    for what, name in {
        "above the process, weights, gradients and Adam's moments": "above",
        "of the whole process, of which those are 1.3 GB": "peak",
    }.items():
        report(
            f"training step, 1,024 spots: peak memory {what}, ours / literal",
            f"{ours[name] / 1e9:.2f} GB / {literal[name] / 1e9:.2f} GB = {ours[name] / literal[name]:.2f}",
            "0.5",
        )
