"""Mutated files, thousands of them in `make test-soak`: each is refused in one line, or read."""

from __future__ import annotations

import gzip
import json
import os
import selectors
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
from anndata import AnnData
from readers_helpers import (
    BARCODES,
    COORDS,
    FEATURES,
    make_anndata,
    write_anndata,
    write_hdf5,
    write_spatialdata,
    write_trident,
)
from scipy.sparse import csr_matrix

from stpath_runtime.manifest import SCHEMA, Manifest, ModelConfig, graph_files
from stpath_runtime.slides.vocabulary import GeneVocabulary

WORKERS = 2
SECONDS, MEMORY = 10, 2 * 2**30  # that one file may take


def write_originals(folder: Path) -> None:
    """A small file of every kind, as the tools write them."""
    write_hdf5(folder / "hest.h5", embeddings=FEATURES, coords=COORDS, barcodes=[[b.encode()] for b in BARCODES])
    write_trident(folder / "trident.h5")
    tables = {"index": BARCODES}
    counts = AnnData(csr_matrix(FEATURES > 0, dtype="f4"), obs=pd.DataFrame(**tables))
    written = make_anndata(uns={"stpath": {"engine": "e", "attention": "knn", "neighbors": 8}})
    for kind in ("h5ad", "v2.zarr", "v3.zarr", "v2.zarr.zip", "v3.zarr.zip"):
        write_anndata(make_anndata(), folder / f"slide.{kind}")
    for kind in ("h5ad", "v3.zarr"):
        write_anndata(counts, folder / f"context.{kind}")
        write_anndata(written, folder / f"prediction.{kind}")
    write_spatialdata(folder / "lazyslide.v2.zarr", version=2)
    write_spatialdata(folder / "lazyslide.v3.zarr")
    write_spatialdata(folder / "archive.zarr.zip")
    genes = GeneVocabulary(["ENSG01", "ENSG02"], ["A", "B"], [["A1", "A2"], []], ["human", "human"])
    genes.write(folder / "genes.tsv.gz")
    (folder / "genes.tsv").write_bytes(gzip.decompress((folder / "genes.tsv.gz").read_bytes()))
    (folder / "genes.json").write_text(json.dumps({"A": "ENSG01", "A1": "ENSG01", "B": "ENSG02"}))
    model = ModelConfig(8, 2, 1, 16, 8, 4, 25, 5)
    files = dict.fromkeys(["weights.bin", "genes.tsv.gz", *graph_files(1)], "0" * 64)
    parity = {"passed": True, "cases": [], "reference": "float64"}
    named = {"name": "model", "sha256": "0" * 64}
    Manifest(SCHEMA, model, "fp32", 23, "gigapath", named, "2026-11-01", files, {"numpy": "2"}, parity).write(folder)


def run_worker(originals: Path, scratch: Path, first: int, cases: int) -> Counter:
    """Run every second case in a process of its own; what it dies of, or takes too long or too much for, fails."""
    script, which = Path(__file__).with_name("fuzz_worker.py"), map(str, (first, WORKERS, cases))
    worker = subprocess.Popen(
        [sys.executable, script, originals, scratch, *which],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
    )
    kinds = len(list(originals.iterdir()))
    seen, case, pending = Counter(), "before the first case", b""
    with worker, selectors.DefaultSelector() as ready:
        ready.register(worker.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(SECONDS if seen else 60):
                worker.kill()
                pytest.fail(f"case {case} hangs: over {SECONDS} s")
            if not (read := os.read(worker.stdout.fileno(), 65536)):
                break
            *lines, pending = (pending + read).split(b"\n")
            for line in lines:
                kind, number, *rest = line.decode(errors="replace").split("\t")
                if kind == "begin":
                    case = f"{number} ({rest[0]})"
                    continue
                outcome = "\t".join(rest[2:])
                seen[outcome.split(":")[0]] += 1
                assert outcome == "read" or int(number) >= kinds, f"case {case} is not mutated, but {outcome}"
                assert not outcome.startswith("fault"), f"case {case}: {outcome}"
                assert int(rest[1]) < MEMORY, f"case {case} takes {int(rest[1]):,} bytes"
        errors = worker.stderr.read().decode(errors="replace")
    assert worker.returncode == 0, f"case {case} ends the interpreter ({worker.returncode}): {errors[-2000:]}"
    return seen


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    write_originals(folder)
    for archive in folder.glob("archive.zarr"):  # the folder that the archive was made of
        archive.rename(folder.parent / f"{folder.name}.archived")
    return folder


@pytest.mark.parametrize("first", range(WORKERS))
@pytest.mark.parametrize("cases", [400, pytest.param(4_800, marks=pytest.mark.soak)])
def test_every_mutated_file_is_refused_in_one_line_or_read(first, cases, originals, tmp_path):
    seen = run_worker(originals, tmp_path, first, cases)
    assert seen.total() == cases // WORKERS
    assert min(seen["refused"], seen["read"]) > cases // WORKERS // 20  # neither is all that mutations lead to
