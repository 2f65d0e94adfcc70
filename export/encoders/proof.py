"""The proof of a tile encoder: its graph against timm in float64, part by part, then as a whole.

One part's weights are in memory at a time, so that the largest encoders are proven on a laptop. Every part is the
graph that it is in the whole, cut out; the same nodes on the same file of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from stpath_runtime.errors import EncoderError, ParityError, warn
from stpath_runtime.files import sha256
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.manifest import ENCODER_GRAPH
from stpath_runtime.measures.agreement import gene_pearson, relative_l2
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.slide import Slide
from stpath_train.encoders import find_encoder

from ..proof import L2_BAR, LOW_DTYPES, TIMES_TORCH
from .graph import STATE, TILES, Parts

if TYPE_CHECKING:
    from stpath_runtime.engine import Engine

PROOF_TILES = 6
FILE = "part.onnx"
BY_RUNTIME = "onnxruntime on cpu"
EMULATED = f"{BY_RUNTIME}, bfloat16 emulated: float32 sums of numbers rounded to bfloat16"
Floats = npt.NDArray[Any]
Report = dict[str, Any]


def proof_tiles(size: int, n: int = PROOF_TILES, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Tiles [n, size, size, 3] in the colours of H&E: smooth shapes with noise; the last two are white and black."""
    rng = np.random.default_rng(seed)
    stains = np.array([[255, 255, 255], [235, 170, 200], [110, 70, 150]], float)  # glass, eosin, haematoxylin
    coarse = rng.dirichlet(np.full(3, 0.4), (n, 9, 9))
    rows = np.linspace(0, 7.999, size)
    low, share = rows.astype(int), (rows % 1)[:, None, None]
    smooth = coarse[:, low] * (1 - share) + coarse[:, low + 1] * share
    smooth = smooth[:, :, low] * (1 - share) + smooth[:, :, low + 1] * share
    tiles: npt.NDArray[np.uint8] = np.clip(smooth @ stains + rng.normal(0, 12, (n, size, size, 3)), 0, 255).astype(
        np.uint8
    )
    tiles[-2:] = np.array([255, 0], np.uint8)[:, None, None, None]
    return tiles


def prove(directory: Path, parts: Parts, on_step: OnTile | None = None, engine: Engine | None = None) -> Report:
    """Hold an encoder to the float64 reference.

    Parameters
    ----------
    directory
        With the graph of the whole and the weights.
    on_step
        Called with (done, total) after each part.
    engine
        An STPath engine, to say what the encoder's precision changes in predicted expression.

    Returns
    -------
    Report
        For `encoder.json`: whether it passed, the bars, and a row a part: "relative_l2" of the engine's own run up to
        there, "own_l2" of the part alone given the reference's numbers, and the bar on the first.
    """
    encoder, precision = parts.encoder, parts.precision
    emulated = precision == "bf16"  # ONNX Runtime has no kernels for it on CPUs
    tiles = proof_tiles(encoder.size)
    rows: list[dict[str, Any]] = []
    features = {}
    for part, states in enumerate(_lockstep(directory, parts, tiles, emulated)):
        name = "tokens" if part == 0 else "features" if part == parts.last else f"block {part}"
        rows.append({"part": name, **_compare(states)})
        features = states
        if on_step is not None:
            on_step(part + 1, parts.last + 2)
    if not emulated:
        whole = _run(directory / f"{ENCODER_GRAPH}.onnx", {TILES: tiles})
        rows.append({"part": "whole graph", **_compare({**features, "own": whole, "engine": whole})})
    report = {
        "passed": all(row["passed"] for row in rows),
        "reference": "float64",
        "bars": {
            "relative_l2": L2_BAR if precision == "fp32" else f"{TIMES_TORCH:g} times PyTorch's own in {precision}"
        },
        "precision": precision,
        "backend": EMULATED if emulated else BY_RUNTIME,
        "tiles": len(tiles),
        "parts": rows,
    }
    if engine is not None:
        report["expression"] = change_of_expression(engine, features["exact"], features["engine"])
    return report


def verify(
    directory: Path,
    model: str,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    precision: str | None = None,
    on_step: OnTile | None = None,
) -> Report:
    """Hold an encoder that exists to timm in float64, its whole graph on a backend.

    Parameters
    ----------
    model
        What it was made from, as for `find_encoder`.
    backend, device, precision
        What runs it, as for `TileEncoder.load`. Below float32 the bar is twice what PyTorch errs in the same precision.

    Raises
    ------
    InputError
        If the encoder or the model is at fault, or they are not of one kind.
    """
    loaded = TileEncoder.load(directory, backend=backend, device=device, precision=precision)
    loaded.manifest.check_files(directory)
    encoder, made_of = find_encoder(model), loaded.manifest
    if (encoder.architecture, encoder.width, encoder.depth) != (made_of.architecture, made_of.width, made_of.depth):
        raise EncoderError(f"{model}: another encoder than {directory} was made from, {made_of.encoder}")
    if sha256(encoder.weights.path) != made_of.weights["sha256"]:
        warn(f"{encoder.weights.path} is not the file that {directory} was made from (SHA-256 differs)")
    tiles = proof_tiles(encoder.size)
    low_dtype = LOW_DTYPES.get(loaded.precision)
    exact = encoder.normalized(torch.from_numpy(tiles))
    low = exact.float()
    with torch.inference_mode():
        for done, part in enumerate(encoder.parts(torch.float64), 1):
            exact = part(exact)
            if on_step is not None:
                on_step(done, encoder.depth + 3)
        if low_dtype is not None:
            with torch.autocast("cpu", dtype=low_dtype):
                for part in encoder.parts(torch.float32):
                    low = part(low).float()
    found = loaded(tiles)
    states = {"exact": exact.numpy(), "engine": found, "own": found}
    row = _compare({**states, "low": low.numpy()} if low_dtype is not None else states)
    return {
        "passed": row["passed"],
        "reference": "float64",
        "precision": loaded.precision,
        "backend": f"{backend} on {device}",
        "tiles": len(tiles),
        "parts": [{"part": "whole graph", **row}],
    }


def require_passed(report: Report) -> None:
    """Raise ParityError, naming the first part that misses its bar, unless the report passed."""
    failed = [row for row in report["parts"] if not row["passed"]]
    if failed:
        first = failed[0]
        raise ParityError(
            f"{len(failed)} of {len(report['parts'])} parts miss the bar, from {first['part']} on: relative L2 "
            f"{first['relative_l2']:.2e} (bar {first['bar_l2']:.2e}), alone {first['own_l2']:.2e}"
        )


def change_of_expression(engine: Engine, exact: Floats, found: Floats) -> dict[str, Any]:
    """What features that err change in the expression of all genes, on the tiles of the proof as a slide."""
    coords = np.stack(np.divmod(np.arange(len(exact)), 3), axis=1)
    by_exact, by_found = (
        engine.decode(engine.embed(Slide(coords, np.asarray(rows, np.float32)))) for rows in (exact, found)
    )
    r = gene_pearson(by_found, by_exact, flat=1e-3 * float(np.abs(by_exact).max()))
    return {
        "engine": engine.hash(),
        "relative_l2": relative_l2(by_found, by_exact),
        "max_abs": float(np.abs(by_found - by_exact).max()),
        "pearson_min": float(r.min()) if len(r) else None,
    }


def _lockstep(
    directory: Path, parts: Parts, tiles: npt.NDArray[np.uint8], emulated: bool
) -> Iterator[dict[str, Floats]]:
    """What each part gives in the runs of the reference ("exact"), the engine, and below float32 PyTorch ("low").

    And what the engine's part gives alone, given the reference's numbers ("own").
    """
    encoder = parts.encoder
    low_dtype = LOW_DTYPES.get(parts.precision)
    exact = encoder.normalized(torch.from_numpy(tiles))
    low = exact.float()
    engine: Floats = tiles
    lows = encoder.parts(torch.float32) if low_dtype is not None else repeat(None)
    for part, (exact_part, low_part) in enumerate(zip(encoder.parts(torch.float64), lows, strict=False)):
        given = tiles if part == 0 else parts.kept(part - 1, exact).float().numpy()
        path = directory / FILE
        ir.save(parts.graph(part, part, emulated), path)
        name = TILES if part == 0 else STATE
        engine, own = _run(path, {name: engine}, emulated), _run(path, {name: given}, emulated)
        path.unlink()
        states = {"engine": engine, "own": own}
        with torch.inference_mode():
            exact = exact_part(exact)
            states["exact"] = parts.kept(part, exact).numpy()
            if low_part is not None:
                with torch.autocast("cpu", dtype=low_dtype):
                    low = low_part(low).float()
                states["low"] = parts.kept(part, low).numpy()
        yield states


def _compare(states: dict[str, Floats]) -> dict[str, Any]:
    exact = states["exact"]
    bar = TIMES_TORCH * relative_l2(states["low"], exact) if "low" in states else L2_BAR
    error = relative_l2(states["engine"], exact)
    return {
        "relative_l2": error,
        "own_l2": relative_l2(states["own"], exact),
        "bar_l2": bar,
        "max_abs": float(np.abs(states["engine"] - exact).max()),
        "passed": bool(error <= bar),  # NaN is not
    }


def _run(graph: Path, inputs: dict[str, Any], emulated: bool = False) -> Floats:
    """Run a graph once, with its weights as they are mapped: to pack them takes their size again."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_prepacking", "1")
    if emulated:  # what is rounded must stay rounded
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, inputs)
    return np.asarray(found)
