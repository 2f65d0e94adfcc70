"""A prediction in a process of its own: its time, and its peak memory.

`python benchmarks/alone.py ENGINE SPOTS [K] [DTYPE] [MEMORY]`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from stpath_runtime import Engine, Slide
from stpath_runtime.memory import parse_bytes


def predict_alone(
    engine: Path, spots: int, neighbors: int = 0, dtype: str = "float32", memory: str = ""
) -> dict[str, float]:
    """Predict 50 genes of a random slide in a new process; returns seconds, and bytes in all and above the features."""
    command = [sys.executable, __file__, str(engine), str(spots), str(neighbors), dtype, memory]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _hexagonal(spots: int) -> np.ndarray:
    row, column = np.divmod(np.arange(spots), int(np.ceil(np.sqrt(spots))))
    return np.stack([200 * column + 100 * (row % 2), 173 * row], axis=1)


def _main(path: str, n: str, neighbors: str = "0", dtype: str = "float32", memory: str = "") -> None:
    warnings.simplefilter("ignore")
    engine, spots = Engine.load(path), int(n)
    features = np.empty((spots, engine.manifest.model.n_features), dtype)
    rng = np.random.default_rng(0)
    for start in range(0, spots, 10_000):  # in parts: the peak must not be that of making the slide
        part = features[start : start + 10_000]
        part[:] = rng.standard_normal(part.shape, np.float32)
    slide = Slide(_hexagonal(spots), features)
    how = {"attention": "knn", "neighbors": int(neighbors)} if int(neighbors) else {}
    start = time.perf_counter()
    budget = parse_bytes(memory) if memory else None
    engine.predict(slide, genes=engine.vocabulary.ensembl_ids[:50], memory=budget, **how)
    seconds = time.perf_counter() - start
    # Not ru_maxrss: a child's starts at what its parent held when it forked.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "above_features": peak - features.nbytes}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
