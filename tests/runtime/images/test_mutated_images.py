"""Mutated slide images, hundreds of them in `make test-soak`: each is refused in one line, or read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import CROP
from images_helpers import tissue_pixels, write_png, write_svs, write_tiff

SECONDS = 60  # that a process may say nothing


@pytest.mark.parametrize("cases", [25, pytest.param(300, marks=pytest.mark.soak)])
def test_mutated_images_crash_and_hang_nothing(cases, tmp_path):
    originals, scratch = tmp_path / "originals", tmp_path / "scratch"
    originals.mkdir()
    scratch.mkdir()
    (originals / "a.svs").write_bytes(CROP.read_bytes())
    pixels = tissue_pixels(700, 500, ((50, 75, 310, 400), (400, 75, 650, 350)))
    write_svs(originals / "b.svs", pixels, levels=2)
    write_tiff(originals / "c.tif", pixels, photometric="rgb", resolution=(20_000, 20_000), resolutionunit=3)
    write_png(originals / "d.png", pixels)
    script = Path(__file__).with_name("mutated_worker.py")
    command = [sys.executable, script, originals, scratch, *map(str, (0, 1, cases))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=SECONDS + 2 * cases
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died at {lines[-1] if lines else 'the start'}:\n{done.stderr[-3000:]}"
    outcomes = [line.split()[1] for line in lines[1::2]]
    assert len(outcomes) == cases
    assert {"read", "refused"} == set(outcomes)
