"""The proof of parity of an STFlow engine: against the float64 reference, over slides, steps and grids."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from stpath_runtime.checks import check_slide
from stpath_runtime.engine import Engine
from stpath_runtime.errors import EngineError
from stpath_runtime.flow_engine import FlowEngine
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.slide import Slide
from stpath_runtime.stflow.geometry import Neighborhoods
from stpath_runtime.stflow.sampler import sample
from stpath_runtime.stflow.starts import draw_start
from stpath_train.stflow import STFlow

from ..proof import LOW_DTYPES, Floats, Report, compare_expression, pearson_bar_of, summary

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
        pearson_bar = pearson_bar_of(engine.precision, case.given)
        for path, found in _paths(engine, case, around):
            row = compare_expression(found, wanted, low, pearson_bar)
            rows.append({"case": case.name, "path": path, **row})
        if on_step is not None:
            on_step(done, len(cases))
    return summary(engine, rows)


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
