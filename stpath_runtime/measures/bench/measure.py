"""What `stpath bench ENGINE` measures: every backend and precision that runs the engine here, at several sizes.

Loads and first calls are those of fresh processes, each of which does nothing else: their peak memory is theirs alone.
Warm calls run in this process, in turn, encoder and head separately. Each is compared with the way that the engine was
proven in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from ...encoding.sizes import USUAL_KEYS
from ...engine import Engine
from ...errors import BackendError, InputError, InputWarning, OptionError
from ...machine import nvidia_gpus
from ...manifest import read_manifest
from ...progress import OnTile
from ...slides.slide import random_slide
from ..agreement import Floats, relative_l2
from ..doctor import WAYS, Way, fault_of
from . import roofline
from .alone import Found, Task, run_alone
from .results import Results, Row
from .timing import in_turn

Engines = Mapping[Way, Engine]
OnCall = Callable[[Row], None]
ORDER = ("first call", "encode", "decode")


def ways_here(engine: Path, backend: str | None = None, precision: str | None = None) -> list[Way]:
    """The ways to run an engine that work on this machine, the one that it was proven in first.

    Parameters
    ----------
    backend, precision
        Only these; None means all.

    Raises
    ------
    EngineError
        If there is no engine.
    BackendError
        If none of the ways works; the message says of each why not.
    """
    manifest, gpus = read_manifest(engine), nvidia_gpus()
    ways = [replace(way, precision=way.precision or manifest.precision) for way in WAYS]
    asked = [way for way in ways if backend in (None, way.backend) and precision in (None, way.precision)]
    faults = {way: fault_of(way, gpus, engine) for way in asked}
    found = [way for way, fault in faults.items() if fault is None]
    if not found:
        why = "; ".join(f"{way.backend}, {way.precision} on {way.device}: {fault}" for way, fault in faults.items())
        raise BackendError(f"{engine}: no backend to measure ({why or 'none is such'}); see stpath doctor {engine}")
    proven = manifest.parity.get("backend"), manifest.parity.get("precision", manifest.precision)
    return sorted(found, key=lambda way: (f"{way.backend} on {way.device}", way.precision) != proven)


def measure_engine(
    path: Path, ways: Sequence[Way], sizes: Sequence[Row], rounds: int, on_step: OnTile | None = None
) -> Results:
    """Measure an engine in several ways; the first is the base, to which the others are held.

    Parameters
    ----------
    sizes
        Rows of which only attention, neighbors, spots and genes are set.
    rounds
        Timed calls of each way at each size.
    on_step
        Called with (done, total) after each call, counted in operations of the model.

    Raises
    ------
    EngineError
        If the engine is damaged.
    OptionError
        If it has fewer genes than are asked for.
    BackendError
        If no way can run it at any size.
    """
    engines = {way: Engine.load(path, backend=way.backend, device=way.device, precision=way.precision) for way in ways}
    engine = engines[ways[0]]
    for size in sizes:
        if size.genes > len(engine.vocabulary):
            raise OptionError(f"--genes {size.genes:,}: the engine has {len(engine.vocabulary):,}; give fewer")
    on_call = _counted(engine, sizes, len(ways) * (rounds + 2), on_step)
    peaks = roofline.measure_peaks()
    rows: list[Row] = []
    decoded: set[int] = set()
    loads: dict[Way, list[float]] = {way: [] for way in ways}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # that kNN may be an approximation is no matter here
        for size in sizes:
            found, embeddings = _encode(engines, size, rounds, peaks, on_call)
            if size.spots not in decoded:  # attention makes no difference to the head
                found += _decode(engines, embeddings, size, rounds, peaks)
                decoded.add(size.spots)
            for way in embeddings:
                row, alone = _alone(path, way, size)
                on_call(size)
                loads[way] += [alone.load] if alone is not None else []
                rows.append(row)
            rows += found
    cold = [replace(row_of("load", way, Row("")), seconds=tuple(seconds)) for way, seconds in loads.items() if seconds]
    for what in ("first call", "encode"):
        if all(row.failed for row in rows if row.what == what):
            raise BackendError(f"{path}: nothing could be measured: {next(row.failed for row in rows if row.failed)}")
    rows.sort(key=lambda row: ORDER.index(row.what))
    hashes = {"engine": engine.hash(), "checkpoint": engine.manifest.checkpoint["sha256"]}
    return Results(f"stpath bench {path.resolve().name}: random slides", (*cold, *rows), hashes, peaks.facts())


def _encode(
    engines: Engines, size: Row, rounds: int, peaks: roofline.Peaks, on_call: OnCall
) -> tuple[list[Row], dict[Way, Floats]]:
    """Warm calls of the encoder; and the embedding by each way that can run it."""
    model = next(iter(engines.values())).manifest.model
    slide = random_slide(size.spots, model.n_features, 0)
    embed = partial(Engine.embed, slide=slide, attention=size.attention, neighbors=size.neighbors or None)
    calls: dict[Row, Callable[[], Floats]] = {}
    embeddings: dict[Way, Floats] = {}
    failed = []
    for way, engine in engines.items():
        row, call = row_of("encode", way, replace(size, genes=0)), partial(embed, engine)
        try:
            embeddings[way] = call()
            calls[row] = call
        except InputError as error:  # such as too little memory: a result, too
            failed.append(replace(row, failed=str(error)))
        on_call(size)
    keys = roofline.keys_of_a_spot(slide.coords, size.attention, size.neighbors)
    operations = roofline.encoder_operations(model, size.spots, keys)
    limit = peaks.seconds(operations, roofline.encoder_bytes(model, size.spots))
    timed = in_turn(calls, rounds, on_call)
    return [*held(timed, list(embeddings.values()), next(iter(engines)), limit), *failed], embeddings


def _decode(
    engines: Engines, embeddings: Mapping[Way, Floats], size: Row, rounds: int, peaks: roofline.Peaks
) -> list[Row]:
    """Warm calls of the head, each on the embedding of its own way."""
    engine = next(iter(engines.values()))
    names = engine.vocabulary.ensembl_ids[: size.genes]
    calls = {
        row_of("decode", way, replace(size, attention="", neighbors=0)): partial(engines[way].decode, embedding, names)
        for way, embedding in embeddings.items()
    }
    expressions = [call() for call in calls.values()]
    model = engine.manifest.model
    operations = roofline.decoder_operations(model, size.spots, size.genes)
    limit = peaks.seconds(operations, roofline.decoder_bytes(model, size.spots, size.genes))
    return held(in_turn(calls, rounds), expressions, next(iter(engines)), limit)


def held(rows: Sequence[Row], outputs: Sequence[Floats], base: Way, limit: float) -> list[Row]:
    """The rows with how far their outputs are from those of the base, and the limit of the machine's peaks."""
    if not rows:
        return []
    name = f"{base.backend} on {base.device}, {base.precision}"
    exact = outputs[0] if rows[0].by == row_of("", base, Row("")).by else None
    return [
        replace(
            row,
            relative_l2=relative_l2(output, exact) if exact is not None else None,
            parity=name if exact is not None else "",
            limit=limit if (row.device, row.precision) == ("cpu", "fp32") else None,
        )
        for row, output in zip(rows, outputs, strict=True)
    ]


def _alone(path: Path, way: Way, size: Row) -> tuple[Row, Found | None]:
    """The first call in a fresh process."""
    row = row_of("first call", way, size)
    try:
        found = run_alone(
            Task(
                str(path),
                size.spots,
                size.genes,
                size.attention,
                size.neighbors or None,
                way.backend,
                way.device,
                way.precision,
            )
        )
    except InputError as error:
        return replace(row, failed=str(error)), None
    return replace(row, seconds=(found.encode + found.decode,), peak_bytes=found.peak), found


def row_of(what: str, way: Way, size: Row) -> Row:
    """A row of a size, by a way."""
    assert way.precision is not None  # ways_here gives it
    return replace(size, what=what, backend=way.backend, device=way.device, precision=way.precision)


def _counted(engine: Engine, sizes: Sequence[Row], calls: int, on_step: OnTile | None) -> OnCall:
    """What tells `on_step` of the work done after each call at a size."""
    model = engine.manifest.model
    cost = {
        (size.attention, size.neighbors, size.spots): int(
            roofline.encoder_operations(model, size.spots, size.spots if size.attention == "global" else USUAL_KEYS)
        )
        for size in sizes
    }
    done, total = 0, calls * sum(cost.values())

    def on_call(row: Row) -> None:
        nonlocal done
        done += cost[row.attention, row.neighbors, row.spots]
        if on_step is not None:
            on_step(done, total)

    return on_call
