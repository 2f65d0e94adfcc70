"""A prediction in a process of its own: seconds of the load and of the first call, and its peak memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

from ...errors import BackendError, InputWarning, MemoryLimitError
from ...machine import memory_of_process
from ...manifest import is_encoder


@dataclass(frozen=True)
class Task:
    """What the process does: load an engine, and predict genes of a random slide; or an encoder, and encode tiles."""

    engine: str
    spots: int
    genes: int = 50
    attention: str | None = None
    neighbors: int | None = None
    backend: str = "onnxruntime"
    device: str = "cpu"
    precision: str | None = None
    dtype: str = "float32"  # of the features
    memory: int | None = None


@dataclass(frozen=True)
class Found:
    """Seconds, and bytes of the process at the most."""

    load: float
    encode: float  # the first call, which makes sessions or compiles graphs
    decode: float
    peak: int  # of the process
    features: int  # of which the slide's features


def run_alone(task: Task) -> Found:
    """Do a task in a new process.

    Raises
    ------
    BackendError
        If the process fails; the message is its last line.
    MemoryLimitError
        If it is killed, as systems do where memory is short.
    """
    command = [sys.executable, "-m", __name__, json.dumps(asdict(task))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise MemoryLimitError(f"killed by signal {-done.returncode}; this machine's memory may be too small for it")
    if done.returncode:
        *_, last = ["", *done.stderr.strip().splitlines()]
        raise BackendError(re.sub(r"^[\w.]+Error: ", "", last) or f"ended with exit code {done.returncode}")
    return Found(**json.loads(done.stdout.splitlines()[-1]))


def _run(task: Task) -> Found:
    from ...engine import Engine
    from ...slides.slide import random_slide

    if is_encoder(Path(task.engine)):
        return _run_encoder(task)
    start = perf_counter()
    engine = Engine.load(Path(task.engine), backend=task.backend, device=task.device, precision=task.precision)
    load = perf_counter() - start
    slide = random_slide(task.spots, engine.manifest.model.n_features, 0, dtype=task.dtype)
    names = engine.vocabulary.ensembl_ids[: task.genes]
    start = perf_counter()
    embedding = engine.embed(slide, attention=task.attention, neighbors=task.neighbors, memory=task.memory)
    encoded = perf_counter()
    engine.decode(embedding, names)
    decoded = perf_counter()
    return Found(load, encoded - start, decoded - encoded, memory_of_process(), slide.features.nbytes)


def _run_encoder(task: Task) -> Found:
    """Features of as many tiles as the task has spots."""
    from ...images.encoder import TileEncoder, noise

    start = perf_counter()
    encoder = TileEncoder.load(task.engine, backend=task.backend, device=task.device, precision=task.precision)
    load = perf_counter() - start
    tiles = noise(task.spots, encoder.size)
    start = perf_counter()
    encoder(tiles)
    return Found(load, perf_counter() - start, 0.0, memory_of_process(), tiles.nbytes)


if __name__ == "__main__":
    warnings.simplefilter("ignore", InputWarning)  # that kNN may be an approximation is no matter here
    print(json.dumps(asdict(_run(Task(**json.loads(sys.argv[1]))))))  # noqa: T201
