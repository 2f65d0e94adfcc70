"""The script that measures GPUs, on the CPU: every variant is right, and the results say that it was a dry run."""

from __future__ import annotations

import json

import gpu


def test_dry_run(tiny_checkpoint, tiny_genes, tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "K", 8)
    gpu.main("cpu", "70", 2, tiny_checkpoint, tiny_genes, [tiny_engine], "onnxruntime", tmp_path)
    (result,), (picture,) = tmp_path.glob("*.json"), tmp_path.glob("*.png")
    assert result.name.startswith("dry-run-")
    assert picture.read_bytes().startswith(b"\x89PNG")
    report = json.loads(result.read_text())
    assert report["dry_run"] is True
    assert report["versions"]["torch"]
    rows = {(row["variant"], row["attention"]): row for row in report["rows"]}
    kernel = rows.pop(("PyTorch, Triton kernel", "global"))
    assert kernel["failed"].startswith("DeviceError: fused attention runs on an NVIDIA GPU")
    assert kernel["milliseconds"] == []
    errors = [rows[name, "global"]["relative_l2"] for name in ("PyTorch, compiled", "PyTorch, FlexAttention")]
    assert errors[0] != errors[1]  # it is not the other under another name
    assert set(rows) == {
        ("literal formula", "global"),
        ("PyTorch, FlexAttention", "global"),
        *(
            (name, way)
            for name in ("PyTorch, eager", "PyTorch, compiled", "engine, onnxruntime")
            for way in ("global", "knn")
        ),
    }
    for row in rows.values():
        assert row["failed"] == ""
        assert row["relative_l2"] < 1e-5
        assert len(row["milliseconds"]) == 2


def test_a_variant_that_fails_is_a_result(tiny_checkpoint, tiny_genes, tiny_engine, tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError("of the literal formula")

    monkeypatch.setattr(gpu, "_literal", no_memory)
    monkeypatch.setattr(gpu, "_torch", lambda *given, **how: gpu._engine(gpu.Engine.load(tiny_engine), *given[1:3]))
    gpu.main("cpu", "9", 1, tiny_checkpoint, tiny_genes, [tiny_engine], "onnxruntime", tmp_path)
    rows = json.loads(next(tmp_path.glob("*.json")).read_text())["rows"]
    assert rows[0]["failed"] == "MemoryError: of the literal formula"
    assert all(row["failed"] == "" and row["median"] > 0 for row in rows[1:])
