"""What `stpath bench ENCODER` measures: every backend and precision that runs a tile encoder here, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...errors import BackendError, InputError
from ...images.encoder import TileEncoder, noise
from ...progress import OnTile
from ..agreement import Floats
from ..doctor import Way
from .alone import Task, run_alone
from .measure import held, row_of
from .results import Results, Row
from .roofline import measure_peaks
from .timing import in_turn


def measure_encoder(
    path: Path, ways: Sequence[Way], batches: Sequence[int], rounds: int, on_step: OnTile | None = None
) -> Results:
    """Measure a tile encoder in several ways; the first is the base, to which the others are held.

    Parameters
    ----------
    batches
        Tiles at once; none: what the encoder takes by itself in the first way.
    rounds
        Timed calls of each way and batch.
    on_step
        Called with (done, total) after each call.

    Raises
    ------
    InputError
        If the encoder is damaged, or no way can run it.
    """
    encoders = {
        way: TileEncoder.load(path, backend=way.backend, device=way.device, precision=way.precision) for way in ways
    }
    first = encoders[ways[0]]
    sizes = list(batches) or [first.batch()]
    peaks = measure_peaks()
    done, total = 0, len(sizes) * len(ways) * (rounds + 1)

    def on_call(_: Row) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)

    rows: list[Row] = []
    for size in sizes:
        tiles = noise(size, first.size)
        calls: dict[Row, Callable[[], Floats]] = {}
        outputs: list[Floats] = []
        for way, encoder in encoders.items():
            row = row_of("encode", way, Row("", tiles=size))
            try:
                outputs.append(encoder(tiles))
                calls[row] = partial(encoder, tiles)
            except InputError as error:  # such as too little memory: a result, too
                rows.append(replace(row, failed=str(error)))
            on_call(row)
        limit = first.manifest.operations * size / peaks.operations
        rows += held(in_turn(calls, rounds, on_call), outputs, ways[0], limit)
        rows += [_alone(path, way, size) for way in encoders]
    if all(row.failed for row in rows if row.what == "encode"):
        raise BackendError(f"{path}: nothing could be measured: {next(row.failed for row in rows if row.failed)}")
    rows.sort(key=lambda row: row.what != "encode")
    hashes = {"engine": first.about["engine"], "checkpoint": first.manifest.weights["sha256"]}
    return Results(f"stpath bench {path.resolve().name}: tiles of noise", tuple(rows), hashes, peaks.facts())


def _alone(path: Path, way: Way, tiles: int) -> Row:
    """The first call in a fresh process, and its memory."""
    row = row_of("first call", way, Row("", tiles=tiles))
    try:
        found = run_alone(Task(str(path), tiles, backend=way.backend, device=way.device, precision=way.precision))
    except InputError as error:
        return replace(row, failed=str(error))
    return replace(row, seconds=(found.encode,), peak_bytes=found.peak)
