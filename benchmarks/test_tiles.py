"""Tile encoders: tiles a second beside PyTorch, from a file to features, and memory. Gigapath's sizes, random weights.

The blocks of Gigapath are all of one kind, so speed is compared on 4 of its 40: all of them, for every variant at once,
take more memory than most machines have. The whole encoder runs alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest
import torch
from PIL import Image

from stpath_runtime.images.encoder import TileEncoder, noise
from stpath_runtime.images.features import FeaturesJob, extract_one
from stpath_runtime.images.reading import open_image
from stpath_runtime.images.settings import TileSettings
from stpath_runtime.images.tiles import TileReader
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.measures.bench.alone import Task, run_alone
from stpath_runtime.measures.bench.measure import ways_here
from stpath_runtime.measures.bench.results import Row
from stpath_train.encoders import read_encoder
from tile_encoder import encoder_engine, encoder_folder, slide_image

DEPTH, WHOLE, TILES = 4, 40, 4


@pytest.fixture(scope="module")
def tiny(pytestconfig) -> bool:
    return pytestconfig.getoption("--tiny")


def test_tiles_beside_pytorch(in_turn, report, peaks, tiny):
    """Engines in each way that works here, and timm in PyTorch: float32, and bfloat16 by autocast."""
    depth, tiles = 1 if tiny else DEPTH, 1 if tiny else TILES
    path, folder = encoder_engine(depth, small=tiny), encoder_folder(depth, small=tiny)
    given = noise(tiles, 224)
    model = read_encoder(folder)
    whole, exact = model.whole(), model.normalized(torch.from_numpy(given))
    pixels = exact.float()
    with torch.inference_mode():
        for part in model.parts(torch.float64):
            exact = part(exact)

    def by_torch(dtype: torch.dtype | None) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return whole(pixels).float().numpy()

    calls, errors, limits = {}, {}, {}
    row = Row(f"{depth} of Gigapath's 40 blocks", tiles=tiles)
    for way in (way for way in ways_here(path) if way.device == "cpu"):
        encoder = TileEncoder.load(path, backend=way.backend, precision=way.precision)
        calls[replace(row, backend=way.backend, precision=way.precision)] = partial(encoder, given)
        limits = {"fp32": encoder.manifest.operations * tiles / peaks.operations}
    for precision, dtype in {"fp32": None, "bf16": torch.bfloat16}.items():
        calls[replace(row, variant="PyTorch, timm", precision=precision)] = partial(by_torch, dtype)
    for each, call in calls.items():
        errors[each] = relative_l2(call(), exact.numpy())
    report(
        [
            replace(timed, relative_l2=errors[each], parity="timm in float64", limit=limits.get(timed.precision))
            for timed, each in zip(in_turn(calls), calls, strict=True)
        ]
    )


def test_the_whole_encoder_alone(report, tiny, pytestconfig):
    """Load, first call and peak memory of a process that does nothing else."""
    path = encoder_engine(1 if tiny else WHOLE, small=tiny)
    for way in (way for way in ways_here(path) if way.device == "cpu"):
        found = run_alone(Task(str(path), 1, backend=way.backend, precision=way.precision))
        row = Row("whole Gigapath, first call", backend=way.backend, precision=way.precision, tiles=1)
        report([replace(row, seconds=(found.encode,), peak_bytes=found.peak, note=f"load {found.load:.1f} s")])


def everywhere(folder: Path) -> TileSettings:
    """All of an image is tissue."""
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(folder / "all.png")
    return TileSettings(tissue=str(folder / "all.png"))


def test_a_file_keeps_the_encoder_busy(report, tmp_path, tiny):
    """From a slide image to its features, against the encoder alone on tiles in memory."""
    side = 2 if tiny else 6
    image = slide_image(tmp_path / "a.svs", side)
    with TileEncoder.load(encoder_engine(1 if tiny else DEPTH, small=tiny)) as encoder:
        batch = encoder.batch()
        given = noise(batch, 224)
        encoder(given)
        alone, file = [], []
        for turn in range(1 if tiny else 3):
            start = perf_counter()
            for _ in range(-(-(side**2) // batch)):
                encoder(given)
            alone.append((perf_counter() - start) * side**2 / (-(-(side**2) // batch) * batch))
            start = perf_counter()
            made = extract_one(FeaturesJob(image, tmp_path / f"{turn}.h5", everywhere(tmp_path)), encoder)
            file.append(perf_counter() - start)
    shares = tuple(a / b for a, b in zip(alone, file, strict=True))
    note = f"{', '.join(f'{share:.0%}' for share in shares)} of the encoder's own throughput"
    report([
        Row("features, encoder alone", backend="onnxruntime", tiles=side**2, seconds=tuple(alone)),
        Row("features, from a file", backend="onnxruntime", tiles=made.total, seconds=tuple(file), note=note),
    ])  # fmt: skip


def test_decoding_by_threads(report, tmp_path, tiny):
    """Tiles a second by 1 and by 2 threads, in turn."""
    side = 3 if tiny else 20
    image, corners = (
        slide_image(tmp_path / "a.svs", side),
        [(224 * x, 224 * y) for y in range(side) for x in range(side)],
    )
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(1 if tiny else 5):
        for threads, found in seconds.items():
            with open_image(image) as opened, ThreadPoolExecutor(threads) as pool:
                reader = TileReader.of(opened, 112, 224)
                start = perf_counter()
                list(pool.map(lambda xy, reader=reader: reader.read(*xy), corners))
                found.append(perf_counter() - start)
    ratio = tuple(two / one for one, two in zip(seconds[1], seconds[2], strict=True))
    report([
        Row("decoding alone", variant="1 thread", tiles=side**2, seconds=tuple(seconds[1])),
        Row("decoding alone", variant="2 threads", tiles=side**2, seconds=tuple(seconds[2]), ratios=ratio),
    ])  # fmt: skip


ALONE = """
import json, sys
from pathlib import Path
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.images.features import FeaturesJob, extract_one
from stpath_runtime.images.settings import TileSettings
from stpath_runtime.machine import memory_of_process
with TileEncoder.load(sys.argv[1]) as encoder:
    made = extract_one(FeaturesJob(Path(sys.argv[2]), Path(sys.argv[3]), TileSettings(tissue=sys.argv[4])), encoder, 16)
print(json.dumps([made.total, memory_of_process()]))
"""


def test_memory_does_not_grow_with_the_slide(report, tmp_path, tiny):
    """Peak memory of a process that makes features of about 1,000 and of 12,000 tiles."""
    path = encoder_engine(1, small=True)
    peaks = []
    for side in (3, 5) if tiny else (32, 110):
        image = slide_image(tmp_path / f"{side}.svs", side)
        command = [sys.executable, "-c", ALONE, str(path), str(image), str(tmp_path / f"{side}.h5")]
        command.append(str(everywhere(tmp_path).tissue))
        start = perf_counter()
        total, peak = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        peaks.append(peak)
        row = Row("features, memory", backend="onnxruntime", tiles=total, seconds=(perf_counter() - start,))
        report([replace(row, peak_bytes=peak, note=f"{peak / peaks[0]:.2f} times that of the first")])


def test_exporting_the_whole_encoder(report, tmp_path, tiny):
    """Export and proof, in a process of its own."""
    folder = encoder_folder(1 if tiny else WHOLE, small=tiny)
    for precision in ("fp32",) if tiny else ("fp32", "bf16"):
        code = (
            "import sys, timm_here; from pathlib import Path; from stpath_export.encoders.exporter import "
            "export_encoder; "
            "from stpath_runtime.machine import memory_of_process; "
            "export_encoder(sys.argv[1], Path(sys.argv[2]), sys.argv[3]); print(memory_of_process())"
        )
        command = [sys.executable, "-W", "ignore", "-c", code, str(folder), str(tmp_path / precision), precision]
        start = perf_counter()
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(Path(__file__).parents[1] / "tests")},
        )
        row = Row("export and proof of the whole Gigapath", variant="timm", precision=precision)
        report([replace(row, seconds=(perf_counter() - start,), peak_bytes=int(done.stdout.split()[-1]))])
