"""STFlow from a simulated cohort to its calibration: trained, exported, and scored against ridge regression.

python -m stpath_export.stflow.demo OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stpath_train.cohort import MARKERS
from stpath_train.config import read_config
from stpath_train.demo_checkpoint import make_store
from stpath_train.evaluation.run import Choices, TaskName
from stpath_train.evaluation.run import run as evaluate
from stpath_train.flow_training import GENES, RUN_CONFIG
from stpath_train.run import MODEL
from stpath_train.store import Store
from stpath_train.training import train

from ..exporter import export_engine

SLIDES, TEST, VALIDATION = 24, 4, 3  # simulated; the last are tested on, those before them choose the epoch
SAMPLES = 8
MODEL_AND_RUN: dict[str, dict[str, Any]] = {
    "model": {"kind": "stflow", "d_model": 64, "d_edge": 64, "n_layers": 2},
    "optimizer": {"learning_rate": 2e-3},
    "run": {"epochs": 60, "accelerator": "cpu"},
}


def main(out: Path, slides: int = SLIDES, epochs: int | None = None) -> None:
    """Simulate a cohort, train on it, export, and evaluate on slides that no training saw."""
    cohort = out / "cohort"
    store = Store.open(cohort) if cohort.exists() else make_store(cohort, slides)
    names = sorted(store.records)
    learned, tested = names[:-TEST], names[-TEST:]
    genes = list(dict.fromkeys(" ".join(MARKERS.values()).split()))
    data = {"store": "cohort", "slides": learned, "validation": learned[-VALIDATION:], "genes": genes, "workers": 1}
    run = MODEL_AND_RUN["run"] | {"out": "run"} | ({"epochs": epochs} if epochs is not None else {})
    (out / "train.yaml").write_text(json.dumps({"data": data, **MODEL_AND_RUN, "run": run}, indent=1))  # YAML, too
    train(read_config(out / "train.yaml"))
    engine, folder = out / "engine", out / "run"
    if not engine.exists():
        export_engine(folder / MODEL, engine, folder / GENES, config=folder / RUN_CONFIG)
    choices = Choices(
        genes=",".join(genes), slides=",".join(tested), train_slides=",".join(learned), baselines=True, samples=SAMPLES
    )
    evaluate(TaskName.EXPRESSION, engine, None, cohort, out / "evaluation", choices, seed=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
