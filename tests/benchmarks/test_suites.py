"""The benchmarks run, at tiny sizes of a small model: every variant is right, and the results can be compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import published
import variants
from stpath_runtime.errors import CheckpointError
from stpath_runtime.measures.bench.results import Results, Row

ROOT = Path(__file__).parents[2]


def run_pytest(*words) -> str:
    """In a process of its own, where pytest-benchmark is not disabled by pytest-xdist, and nothing is compiled."""
    settings = {"TORCH_COMPILE_DISABLE": "1"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-quiet", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=plain | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_at_tiny_sizes(tiny_engine, tiny_checkpoint, tmp_path):
    """What takes processes of its own or proofs is left out, but for the starts; all files are collected."""
    which = (
        "latency and (spots and 3000 or 0.5 or precision and knn or tile and global) or stages or start or viewer "
        "or cohort and 3"
    )
    own = shutil.copytree(tiny_engine, tmp_path / "engine")  # OpenVINO keeps compiled graphs in it
    words = ["--tiny", "--engine", own, "--checkpoint", tiny_checkpoint, "--results", tmp_path]
    printed = run_pytest(*words, "-k", f"({which} or speed) and not test_memory")
    assert "no figures" in printed
    results = Results.read(tmp_path / "latest.json")
    assert (tmp_path / "latest.md").read_text() in printed
    assert set(results.hashes) == {"engine", "checkpoint"}
    rows = {(row.what, row.attention, row.by): row for row in results.rows if not row.tile}
    literal = rows["latency", "global", "literal formula, fp32"]
    assert (literal.parity, len(literal.ratios)) == ("float64", 1)
    for by in ("engine, onnxruntime, fp32", "PyTorch eager, fp32", "PyTorch Geometric, fp32"):
        assert rows["latency", "knn", by].relative_l2 < 1e-5
    assert literal.relative_l2 < 1e-5
    assert rows["latency by context", "global", "PyTorch eager, fp32"].context == 35
    assert rows["latency by precision", "knn", "PyTorch eager, bf16"].relative_l2 > 1e-4
    assert "TORCH_COMPILE_DISABLE" in rows["latency", "knn", "PyTorch compiled, fp32"].failed
    assert {row.tile for row in results.rows} == {0, 128, 256, 512, 1024, 2048}
    assert {"read", "encode", "decode", "write", "load", "first call", "warm call", "stpath --help", "open_lazy"} <= {
        row.what for row in results.rows
    }
    size = next(row.note for row in results.rows if row.what == "installed, stpath-engine[cpu]")
    assert re.fullmatch(r"\d{3} MB in \d\d packages: scipy \d+, .*", size)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1.1e-5), ("fp32", float("nan")), ("bf16", 0.06)])
def test_a_wrong_result_has_no_speed(precision, error):
    with pytest.raises(ArithmeticError, match=r"relative L2 .* to float64: wrong, so not timed"):
        variants.require_right(Row("latency", precision=precision), error, "float64")
    variants.require_right(Row("latency", precision=precision), 1e-6, "float64")


def test_the_quick_ones_are_the_key_rows():
    found = [line.rpartition("::")[2] for line in run_pytest("--collect-only", "--quick").splitlines() if "::" in line]
    assert [name for name in found if name.startswith("test_by_spots")] == [
        *("test_by_spots[global-0-3000]", "test_by_spots[knn-32-3000]", "test_by_spots[knn-32-20000]"),
        "test_by_spots[global-0-3000]",  # of memory
    ]
    assert {"test_cohort[3]", "test_parts_of_a_prediction", "test_warm_call", "test_time"} < set(found)
    assert not {"test_cohort[20]", "test_one_layer", "test_proof[fp32]"} & set(found)


def test_the_published_engine_is_made_once_and_again_when_its_code_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(published, "seeded_checkpoint", lambda *_: "weights")
    monkeypatch.setattr(published, "save_checkpoint", lambda model, path: path.write_text(model))
    first = published.checkpoint()
    first.write_text("made before")
    assert published.checkpoint().read_text() == "made before"
    monkeypatch.setattr(published, "SEED", 1)
    assert published.checkpoint().read_text() == "weights"
    assert not first.parent.exists()
    with pytest.raises(CheckpointError, match="not a state_dict"):
        published.engine()
    assert not (published.checkpoint().parent / "fp32").exists()
