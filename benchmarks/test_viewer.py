"""The viewer: how long one waits for a gene, a region, co-expressed genes, a slide to open; random embeddings."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import anndata.io
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from stpath_runtime import Engine, open_lazy
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import seconds_of
from stpath_runtime.viewer.shown import open_shown

MILLION, SLIDE, REGION = 1_000_000, 200_000, 20_000


@pytest.fixture(scope="module")
def prediction(engines, tmp_path_factory) -> Callable[[int], Path]:
    """The file of a prediction of so many spots on a square grid: one gene, and embeddings."""
    folder, engine = tmp_path_factory.mktemp("predictions"), engines[0]
    made: dict[int, Path] = {}

    def make(spots: int) -> Path:
        if spots not in made:
            for path in made.values():
                path.unlink()  # a million take 2 GB
            made.clear()
            made[spots] = folder / f"{spots}.h5ad"
            _write(engine, spots, made[spots])
        return made[spots]

    return make


def _write(engine: Engine, spots: int, path: Path) -> None:
    d, rng = engine.manifest.model.d_model, np.random.default_rng(0)
    coords = 200.0 * np.stack(np.divmod(np.arange(spots), int(np.ceil(spots**0.5))), axis=1)
    facts = {"engine": engine.hash(), "units": "log1p raw counts", "patch": {}}
    frame = AnnData(
        np.zeros((spots, 1), np.float32),
        pd.DataFrame(index=[f"s{i}" for i in range(spots)]),
        pd.DataFrame(index=engine.vocabulary.names([2])),
        obsm={"spatial": coords},
        uns={"stpath": facts},
    )
    with h5py.File(path, "w") as file:
        anndata.io.write_elem(file, "/", frame)
        rows = file["obsm"].create_dataset("stpath_embedding", (spots, d), np.float32)
        rows.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        for start in range(0, spots, 65_536):
            rows[start : start + 65_536] = rng.standard_normal((min(65_536, spots - start), d), np.float32)


def test_a_million_spots(report, rounds, engine_path, engines, prediction, size):
    """A process that serves them: until it answers, its memory beyond the file, and a gene not asked for before."""
    path, spots = prediction(size(MILLION)), size(MILLION)
    command = [sys.executable, "-m", "stpath_runtime", "view", path, "--engine", engine_path, "--no-browser"]
    start = time.perf_counter()
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        address = urlsplit(server.stdout.readline().strip())
        opened = time.perf_counter() - start
        token, base = address.query, f"http://{address.netloc}"

        def ask(path: str) -> bytes:
            with urllib.request.urlopen(f"{base}{path}?{token}") as answer:
                return answer.read()

        assert json.loads(ask("/api/info"))["spots"] == spots
        names = iter(engines[0].vocabulary.ensembl_ids)
        first = seconds_of(lambda: ask(f"/api/gene/{next(names)}"))
        seconds = tuple(seconds_of(lambda: ask(f"/api/gene/{next(names)}")) for _ in range(rounds))
        private = _private_bytes(server.pid)
        server.terminate()
    report([
        Row("view: until it answers, the program's start in it", spots=spots, seconds=(opened,), peak_bytes=private),
        Row("view: the first gene", spots=spots, seconds=(first,)),
        Row("view: a new gene, by HTTP", spots=spots, seconds=seconds),
    ])  # fmt: skip


def _private_bytes(pid: int) -> int:
    """Memory of a process that is not pages of mapped files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells RssAnon of every process")


def test_a_region_and_co_expression(report, rounds, engines, prediction, size):
    """All genes: a region of a tenth of the slide against the rest, and one gene with all; after the first of each."""
    spots = size(SLIDE)
    with open_shown(prediction(spots), engines[0]) as shown:
        rng = np.random.default_rng(1)
        regions = [np.sort(rng.choice(spots, size(REGION), replace=False)) for _ in range(rounds + 1)]
        contrasts = [seconds_of(lambda: shown.expression.contrast(inside)) for inside in regions]  # noqa: B023
        together = [seconds_of(lambda: shown.expression.correlations(gene)) for gene in range(rounds + 1)]  # noqa: B023
    genes = len(engines[0].vocabulary)
    report([
        Row("view: the first region", spots=spots, genes=genes, seconds=(contrasts[0],)),
        Row("view: a region of a tenth of them", spots=spots, genes=genes, seconds=tuple(contrasts[1:])),
        Row("view: co-expression, after the first", spots=spots, genes=genes, seconds=tuple(together[1:])),
    ])  # fmt: skip


def test_a_lazy_anndata(report, rounds, engines, prediction, size):
    spots, path, engine = size(SLIDE), prediction(size(SLIDE)), engines[0]
    opens = tuple(seconds_of(lambda: open_lazy(path, engine)) for _ in range(rounds))
    adata = open_lazy(path, engine)
    names = iter(adata.var_names)
    adata[:, next(names)].X.compute()  # what is shared by all genes

    def read() -> None:
        adata[:, next(names)].X.compute()

    genes = tuple(seconds_of(read) for _ in range(rounds))
    report([
        Row("open_lazy", spots=spots, genes=len(engine.vocabulary), seconds=opens),
        Row("open_lazy: a gene", spots=spots, seconds=genes),
    ])  # fmt: skip
