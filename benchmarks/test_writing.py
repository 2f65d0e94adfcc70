"""Writing all 38,982 genes: speed against a plain file of as many bytes, and memory beyond the encoder's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stpath_runtime.encoding.sizes import CHUNK
from stpath_runtime.files import remove
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import seconds_of
from stpath_runtime.results.output import Format, write_frame
from stpath_runtime.results.prediction import new_frame
from stpath_runtime.slides.slide import random_slide

BLOCKS = 8
FORMS = [Format.H5AD, Format.ZARR]


@pytest.mark.parametrize("form", FORMS)
def test_speed(in_turn, report, engines, tmp_path, form):
    """Each to the disk; the base is a plain file. Values are ready: decoding them is not timed."""
    engine = engines[0]
    panel = engine.vocabulary.panel(None)
    slide = random_slide(BLOCKS * CHUNK[0], 1, 0)
    frame = new_frame(slide, panel.names, panel.gene_ids, {"engine": "benchmark"}, None)
    # Predictions of the model: what a compressor makes of them is a part of the speed.
    values = engine.decode(engine.embed(random_slide(CHUNK[0], engine.manifest.model.n_features, 0)))
    plain, ours = tmp_path / "plain", tmp_path / f"p{form.suffix}"

    def sequentially():
        plain.unlink(missing_ok=True)
        with plain.open("wb") as file:
            for _ in range(BLOCKS):
                file.write(values)
            os.fsync(file.fileno())

    def write():
        remove(ours)
        with write_frame(frame, ours, form, np.dtype(np.float32)) as put:
            for block in range(BLOCKS):
                put(slice(block * CHUNK[0], (block + 1) * CHUNK[0]), slice(0, len(panel)), values)
        os.sync()

    sizes = {"precision": "", "spots": len(slide), "genes": len(panel)}
    what = f"write all genes, {form.value}"
    rows = in_turn({Row(what, "plain file", **sizes): sequentially, Row(what, form.value, **sizes): write})
    megabytes = BLOCKS * values.nbytes / 1e6
    report([replace(row, note=f"{megabytes / row.median:,.0f} MB/s") for row in rows])


@pytest.mark.parametrize("form", FORMS)
def test_memory(report, engine_path, size, tmp_path, form):
    """100,000 spots, 15.6 GB; a process that encodes them and writes all genes."""
    words = [sys.executable, __file__, str(engine_path), str(tmp_path), form.value, str(size(100_000))]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    shutil.rmtree(tmp_path)
    row = Row("write all genes, peak", form.value, spots=size(100_000), genes=found["genes"])
    note = f"the encoder before it: {found['encoder'] / 1e9:.2f} GB"
    report([replace(row, seconds=(found["seconds"],), peak_bytes=found["peak"], note=note)])


def _main(engine: str, out: str, form: str, spots: str) -> None:
    import warnings

    from stpath_runtime import Engine
    from stpath_runtime.machine import memory_of_process

    warnings.simplefilter("ignore")
    loaded = Engine.load(engine)
    slide = random_slide(int(spots), loaded.manifest.model.n_features, 0, dtype=np.float16)
    (prediction,) = loaded.predict_many([slide], attention="knn", neighbors=32)
    encoder = memory_of_process()
    seconds = seconds_of(lambda: prediction.write(Path(out) / f"p{Format(form).suffix}", Format(form)))
    genes = prediction.frame.n_vars
    print(json.dumps({"encoder": encoder, "peak": memory_of_process(), "seconds": seconds, "genes": genes}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
