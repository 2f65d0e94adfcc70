"""`stpath verify` on a backend and in a precision: the bar is PyTorch's own error in it."""

from __future__ import annotations

import shutil

import pytest

from helpers import require_bf16
from stpath_export import proof
from stpath_runtime import Engine, InputError, ParityError
from stpath_runtime.backends.openvino import OpenVinoBackend
from stpath_runtime.cli.app import main
from stpath_runtime.manifest import Manifest
from stpath_train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def own(made_once, tiny_engine):
    return made_once("tiny_engine_verify", lambda folder: shutil.copytree(tiny_engine, folder / "engine")) / "engine"


@pytest.fixture(autouse=True)
def _fewer_slides(monkeypatch):
    monkeypatch.setattr(proof, "SPOTS", (1, 37))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_verify_with_openvino(own, tiny_checkpoint, capsys, precision):
    if precision == "bf16":
        require_bf16()
    words = ["verify", own, "--checkpoint", tiny_checkpoint, "--backend", "openvino", "--precision", precision]
    assert main([str(word) for word in words]) == 0
    assert f"openvino on cpu, {precision}: passed" in " ".join(capsys.readouterr().out.split())


def test_verify_reads_files_that_a_kept_hash_vouches_for(own, tiny_checkpoint, tmp_path, monkeypatch):
    engine = shutil.copytree(own, tmp_path / "engine")
    expected = Manifest.read(engine).files
    monkeypatch.setattr("stpath_runtime.manifest.known_sha256", lambda path: expected[path.name])
    weights = bytearray((engine / "weights.bin").read_bytes())
    weights[50] ^= 1
    (engine / "weights.bin").write_bytes(weights)
    Engine.load(engine)
    with pytest.raises(InputError, match=r"weights.bin: truncated or altered"):
        proof.prove(engine, load_checkpoint(tiny_checkpoint))


def test_a_backend_that_errs_fails(own, tiny_checkpoint, monkeypatch):
    real = OpenVinoBackend.run
    monkeypatch.setattr(
        OpenVinoBackend, "run", lambda self, graph, inputs: [a * 1.001 for a in real(self, graph, inputs)]
    )
    report = proof.prove(own, load_checkpoint(tiny_checkpoint), backend="openvino")
    assert not report["passed"]
    assert (report["backend"], report["precision"]) == ("openvino on cpu", "fp32")
    with pytest.raises(ParityError, match="comparisons miss the bar"):
        proof.require_passed(report)


def test_a_given_slide_is_held_to_pearson_in_a_low_precision(own, tiny, tiny_checkpoint, monkeypatch):
    require_bf16()
    (_, slide, _), *_ = tiny.slides()
    monkeypatch.setattr(proof, "LOW_PEARSON_BAR", 1.1)  # none reaches it
    report = proof.prove(own, load_checkpoint(tiny_checkpoint), [slide], backend="openvino", precision="bf16")
    assert {row["case"] for row in report["cases"] if not row["passed"]} == {slide.name}


def test_verify_refuses_what_a_backend_lacks(own, tiny_checkpoint, capsys):
    assert main(["verify", str(own), "--checkpoint", str(tiny_checkpoint), "--precision", "bf16"]) == 2
    assert "give --backend openvino" in capsys.readouterr().err
