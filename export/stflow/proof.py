"""The proof of parity of an STFlow engine: against the float64 reference, over slides, steps and grids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stpath_runtime.engine import Engine, check_slide
from stpath_runtime.errors import EngineError, ParityError
from stpath_runtime.flow_engine import FlowEngine
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.slide import Slide
from stpath_runtime.stflow.geometry import Neighborhoods
from stpath_runtime.stflow.sampler import sample
from stpath_runtime.stflow.starts import draw_start
from stpath_train.stflow import STFlow

from ..proof import L2_BAR, LOW_DTYPES, LOW_PEARSON_BAR, PEARSON_BAR, TIMES_TORCH, Floats, Report, lowest_pearson

SPOTS = (1, 2, 9, 37, 500)
SMALL_TILE = 16
SAMPLES = 3
PITCH = 120.0  # pixels between spots


@dataclass(frozen=True)
class FlowCase:
    """One comparison: a slide, and the points of the time grid."""

    name: str
    slide: Slide
    steps: int
    given: bool = False  # a slide of the user, not of the grid


def grid(model: STFlow) -> list[FlowCase]:
    """Slides of 1 to 500 random spots by 2 and 5 steps; and spots in squares, in hexagons and at one place."""
    rng, width, steps = np.random.default_rng(0), model.config.n_features, model.config.steps
    places = {f"{n} {'spot' if n == 1 else 'spots'}": rng.random((n, 2)) * PITCH * n**0.5 for n in SPOTS}
    row, column = np.divmod(np.arange(100), 10)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    square = PITCH * np.stack([column, row], axis=1)
    places["100 spots in squares"], places["100 spots in turned squares"] = square, square @ turn
    places["100 spots in hexagons"] = PITCH * np.stack([column + row % 2 / 2, row * 0.75**0.5], axis=1)
    places["40 spots at 4 places"] = PITCH * np.repeat(np.array([[0.0, 0], [1, 0], [0, 1], [3, 3]]), 10, axis=0)
    cases = []
    for name, coords in places.items():
        slide = Slide(coords, rng.standard_normal((len(coords), width), np.float32), name=name)
        cases += [FlowCase(f"{name}, {points} steps", slide, points) for points in sorted({2, steps})]
    return cases


def prove(
    directory: Path,
    model: STFlow,
    given: Sequence[Slide] = (),
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    precision: str | None = None,
    on_step: OnTile | None = None,
) -> Report:
    """Hold an STFlow engine to the float64 reference, with the same starts and neighbours.

    Every case runs as `Engine.predict` does, in small tiles, as one of several samples, and with too little memory to
    keep edges.

    Parameters
    ----------
    model
        The reference, in float32, with the weights of the checkpoint.
    given
        Slides beside those of the grid.
    backend, device, precision
        What runs the engine, as for `Engine.load`. Below float32 the bar is twice the error that PyTorch makes in the
        same precision, edges in float32 in both; and, on the slides given, a Pearson r of 0.999 for every gene.
    on_step
        Called with (done, total) after each case.

    Raises
    ------
    InputError
        As `Engine.load`, and if a slide does not fit the engine.
    """
    engine = Engine.load(directory, backend=backend, device=device, precision=precision)
    if not isinstance(engine, FlowEngine):
        raise EngineError(f"{directory}: an STPath engine; expected one of STFlow")
    engine.manifest.check_files(directory)
    cases = grid(model) + [FlowCase(slide.name, slide, model.config.steps, given=True) for slide in given]
    exact, low_dtype = copy.deepcopy(model).double(), LOW_DTYPES.get(engine.precision)
    rows = []
    for done, case in enumerate(cases, 1):
        check_slide(case.slide, engine.manifest)
        around = Neighborhoods.of(case.slide.coords, model.config.neighbors)
        wanted = reference(exact, exact, case, around)
        low = reference(copy.deepcopy(model).to(low_dtype), model, case, around) if low_dtype is not None else None
        pearson_bar = PEARSON_BAR if low is None else LOW_PEARSON_BAR if case.given else None
        for path, found in _paths(engine, case, around):
            rows.append({"case": case.name, "path": path, **_compare(found, wanted, low, pearson_bar)})
        if on_step is not None:
            on_step(done, len(cases))
    bar: Any = L2_BAR if low_dtype is None else f"{TIMES_TORCH:g} times PyTorch's own error in {engine.precision}"
    return {
        "passed": all(row["passed"] for row in rows),
        "reference": "float64",
        "bars": {"relative_l2": bar, "pearson": PEARSON_BAR if low_dtype is None else LOW_PEARSON_BAR},
        "precision": engine.precision,
        "backend": f"{engine.backend.name} on {engine.backend.device}",
        "cases": rows,
    }


def reference(model: STFlow, of_edges: STFlow, case: FlowCase, around: Neighborhoods) -> Floats:
    """A sample by PyTorch, [N, G], as float64; its edges by another copy of the model, which may be more exact."""
    slide, dtype = case.slide, next(model.parameters()).dtype
    start = torch.from_numpy(draw_start(model.config, len(slide), 0, 0)).to(dtype)
    neighbors = torch.from_numpy(around.neighbors)
    with torch.inference_mode():
        coords, features = torch.tensor(slide.coords), torch.tensor(slide.features).to(dtype)
        edges = [each.to(dtype) for each in of_edges.edges(coords, neighbors)]
        *_, (_, found) = model.walk(features, edges, start, case.steps, neighbors)
    return found.double().numpy()


def _paths(engine: FlowEngine, case: FlowCase, around: Neighborhoods) -> Iterator[tuple[str, Floats]]:
    """The ways in which an engine computes a case."""
    slide, model, n = case.slide, engine.manifest.model, len(case.slide)

    def run(samples: int = 1, tile: int | None = None, layers: int | None = None) -> Floats:
        start = partial(draw_start, model, n, 0)
        given = (engine.backend, model, engine.precision, slide.features, around, slide.coords, start, samples)
        first, *_ = sample(*given, case.steps, case.name, tile=tile, layers=layers)
        return first

    yield "tiles", run()
    if n > SMALL_TILE:
        yield "small tiles", run(tile=SMALL_TILE)
    yield f"one of {SAMPLES} samples", run(samples=SAMPLES)
    yield "edges anew in each step", run(layers=0)


def _compare(found: Floats, exact: Floats, low: npt.NDArray[Any] | None, pearson_bar: float | None) -> dict[str, Any]:
    """One row of the report."""
    bar = L2_BAR if low is None else TIMES_TORCH * relative_l2(low, exact)
    l2, (pearson, flat) = relative_l2(found, exact), lowest_pearson(found, exact)
    correlated = pearson_bar is None or pearson is None or pearson >= pearson_bar
    return {
        "spots": len(exact),
        "genes": exact.shape[1],
        "relative_l2": l2,
        "bar_l2": bar,
        "pearson_min": pearson,
        "flat_genes": flat,
        "max_abs": float(np.abs(found - exact).max()),
        "passed": bool(l2 <= bar and correlated),  # `<=` on purpose: NaN compares false, so that NaN fails
    }


def require_passed(report: Report) -> None:
    """Raise ParityError, naming the worst case, unless the report passed."""
    failed = [row for row in report["cases"] if not row["passed"]]
    if failed:
        worst = max(failed, key=lambda row: np.nan_to_num(row["relative_l2"] / row["bar_l2"], nan=np.inf))
        raise ParityError(
            f"{len(failed)} of {len(report['cases'])} comparisons miss the bar; the worst is {worst['case']}, "
            f"{worst['path']}: relative L2 {worst['relative_l2']:.2e} (bar {worst['bar_l2']:.2e})"
        )
