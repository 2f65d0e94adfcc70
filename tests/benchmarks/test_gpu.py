"""The script that measures GPUs, on the CPU: every variant is right, and the results say that it was a dry run."""

from __future__ import annotations

import json

import gpu
import pytest


def run(tmp_path, checkpoint, engines, **options):
    sizes = {"spots": "70", "knn_spots": "90", "rounds": 2, "minutes": 9, "depth": 0} | options
    gpu.main("cpu", checkpoint=checkpoint, engine=engines, backend="onnxruntime", out=tmp_path, **sizes)
    (result,), (picture,) = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    assert result.name.startswith("dry-run-")
    assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(result.read_text())


@pytest.fixture(autouse=True)
def _few(monkeypatch):
    monkeypatch.setattr(gpu, "K", 8)


def test_dry_run(tiny_checkpoint, tiny_engine, tmp_path):
    report = run(tmp_path, tiny_checkpoint, [tiny_engine], depth=1)
    assert report["dry_run"] is True
    assert report["versions"]["torch"]
    assert report["failed"] == {}
    assert all(report["peaks"][name] > 0 for name in ("fp32", "fp16", "bf16", "bytes"))
    alone_at = [("global", 70), ("knn", 90)]
    rows = {(row["variant"], row["attention"], row["spots"], row["features"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"])
    for key in [key for key in rows if "Triton" in key[0]]:
        kernel = rows.pop(key)
        assert kernel["failed"].startswith("DeviceError: fused attention runs on an NVIDIA GPU")
        assert kernel["milliseconds"] == []
    names = ("PyTorch, compiled", "PyTorch, FlexAttention")
    assert len({rows[name, "global", 70, "host"]["relative_l2"] for name in names}) == 2  # none under another's name
    for key in [key for key in rows if key[0].endswith("a fresh process")]:
        alone = rows.pop(key)
        assert alone["failed"] == ""
        assert (key[1:3], alone["first"] > 0, alone["milliseconds"]) == (alone_at.pop(0), True, [])
    of_both = ("PyTorch, eager", "PyTorch, compiled", "engine, onnxruntime")
    assert set(rows) == {
        *((name, "global", 70, "host") for name in (*of_both, "literal formula", names[1])),
        *((name, "global", 37, "host") for name in ("PyTorch, eager", "literal formula", "engine, onnxruntime")),
        *((name, "knn", 37, "host") for name in ("PyTorch, eager", "engine, onnxruntime")),
        *((name, "knn", 90, "host") for name in of_both),
        *(("PyTorch, compiled", *of, "device") for of in (("global", 70), ("knn", 90))),
        *((f"tile encoder, timm, {how}", "", 2, "device") for how in ("eager", "compiled")),
    }
    for (_, _, spots, _), row in rows.items():
        assert row["failed"] == ""
        assert row["relative_l2"] < 1e-5
        assert row["first"] > 0
        assert row["operations"] > 0
        assert row["context"] == (5 if spots == 37 else 0)
        assert len(row["milliseconds"]) == (0 if spots == 37 else 2)


def test_a_variant_that_fails_is_a_result(tiny_checkpoint, tiny_engine, tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("of the literal formula")

    def by_engine(model, slide, attention, device, context, *_, **how):
        return gpu._engine(gpu.Engine.load(tiny_engine), slide, attention, context)

    monkeypatch.setattr(gpu, "_literal", no_memory)
    monkeypatch.setattr(gpu, "_torch", by_engine)
    rows = run(tmp_path, tiny_checkpoint, [tiny_engine], spots="9", knn_spots="9", rounds=1)["rows"]
    literal = [row for row in rows if row["variant"] == "literal formula"]
    assert {row["failed"] for row in literal} == {"MemoryError: of the literal formula"}
    assert all(row["failed"] == "" and row["first"] > 0 for row in rows if row not in literal)


def test_an_engine_that_cannot_be_had_and_a_slide_that_is_too_late_are_told(tiny_checkpoint, tmp_path):
    report = run(tmp_path, tiny_checkpoint, [tmp_path / "none"], minutes=0)
    assert "not an engine" in report["failed"].pop(f"engine {tmp_path / 'none'}, onnxruntime")
    late = "not begun in 0 minutes"
    assert report["failed"] == {"global, 70 spots": late, "knn, 90 spots": late}
    assert {row["spots"] for row in report["rows"]} == {37}  # parity is told all the same


def test_a_wrong_result_has_no_speed(tiny_checkpoint, tiny_engine, tmp_path, monkeypatch):
    real = gpu._engine
    monkeypatch.setattr(gpu.torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(gpu, "_engine", lambda *given: lambda: 1.1 * real(*given)())
    rows = run(tmp_path, tiny_checkpoint, [tiny_engine])["rows"]
    wrong = [row for row in rows if row["variant"] == "engine, onnxruntime"]
    assert len(wrong) == 4
    for row in wrong:
        assert row["failed"].startswith("wrong: relative L2 1.0e-01")
        assert row["milliseconds"] == []
