"""The demo of STFlow, small."""

from __future__ import annotations

import json

from stpath_export.stflow import demo


def test_the_demo_trains_exports_and_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SAMPLES", 2)
    demo.main(tmp_path, slides=8, epochs=1)
    report = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert report["note"] == "simulated"
    assert report["pictures"] == ["pearson.png", "calibration.png"]
    assert {row["predictor"] for row in report["figures"]} == {"model", "mean", "ridge"}
