"""The main job on the sample slide, from a checkpoint to maps of genes."""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from stpath_runtime.engine import Engine
from stpath_runtime.errors import ParityError
from stpath_runtime.output import write_h5ad
from stpath_runtime.plot import plot_genes, require_matplotlib
from stpath_runtime.progress import progress_bar
from stpath_runtime.readers import read_slide
from stpath_runtime.sample import load_sample, simulate_features, write_features
from stpath_runtime.slide import Slide

from .cli import LIBRARIES, require_torch

if TYPE_CHECKING:
    from anndata import AnnData

SEED = 0
# Markers of the nine cell types of the sample: endothelial, fibroblasts, perivascular, B, T, myeloid, normal
# epithelial, plasma, cancer epithelial.
MARKERS = (
    *("PECAM1", "VWF", "COL1A1", "DCN", "ACTA2", "RGS5", "MS4A1", "CD79A", "CD3E", "CD3D", "CD68", "LYZ"),
    *("KRT14", "KRT5", "MZB1", "IGKC", "EPCAM", "ERBB2"),
)
SHOWN = ("PECAM1", "COL1A1", "CD79A", "CD3E", "CD68", "KRT14", "MZB1", "ERBB2")
NOTE = "random weights, simulated features: shows the path, not biology"


def run_demo(out: Path) -> None:
    """Write the sample slide, export or load the demo engine, predict, verify, plot; print what it took."""
    require_matplotlib()  # before the work, not after it
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    seconds: dict[str, float] = {}
    features, checkpoint, engine_path = (
        out / "simulated_sample_slide.h5",
        out / "checkpoint.safetensors",
        out / "engine",
    )
    has_torch = all(find_spec(name) is not None for name in LIBRARIES)

    if not engine_path.exists():
        require_torch()
        start = time.perf_counter()
        _export(checkpoint, engine_path)
        seconds["export and proof"] = time.perf_counter() - start

    start = time.perf_counter()
    engine = Engine.load(engine_path)
    seconds["load"] = time.perf_counter() - start
    sample = load_sample()
    write_features(sample, simulate_features(sample, engine.manifest.model.n_features, SEED), features)
    slide = read_slide(features, organ="Breast", technology="Visium")
    start = time.perf_counter()
    with progress_bar("predict the sample slide") as on_tile:
        adata = engine.predict(slide, genes=MARKERS, embeddings=True, on_tile=on_tile)
    seconds["predict"] = time.perf_counter() - start
    adata.obs["region"] = sample.regions
    adata.uns["stpath"]["note"] = NOTE
    write_h5ad(adata, out / "prediction.h5ad")
    plot_genes(adata, SHOWN, out / "maps.png", title=f"Predicted expression, sample slide ({NOTE})")

    row = None
    if has_torch and checkpoint.exists():
        row = _compare_with_reference(checkpoint, engine, slide, adata)

    table = Table(title="stpath demo", show_header=False)
    table.add_row("spots", f"{adata.n_obs:,} (real layout and cell types, human breast, Visium)")
    table.add_row("features", f"{slide.features.shape[1]:,}, simulated from the cell types")
    table.add_row(
        "weights", f"random, seed {SEED}, published sizes ({engine.manifest.precision}); no trained checkpoint yet"
    )
    table.add_row("genes", f"{adata.n_vars:,}")
    table.add_row("seconds", ", ".join(f"{name} {value:.2f}" for name, value in seconds.items()))
    table.add_row("parity", _verdict(row))
    table.add_row(
        "written", ", ".join(str(out / name) for name in ("simulated_sample_slide.h5", "prediction.h5ad", "maps.png"))
    )
    console.print(table)
    if row is not None and not row["passed"]:
        raise ParityError(f"the demo's prediction is below the bar: {_verdict(row)}")


def _export(checkpoint: Path, engine: Path) -> None:
    from stpath_train.checkpoint import save_checkpoint, seeded_checkpoint
    from stpath_train.model import PUBLISHED_SIZES

    from .exporter import export_engine

    save_checkpoint(seeded_checkpoint(PUBLISHED_SIZES, SEED), checkpoint)
    with progress_bar("export the demo engine") as on_step:
        export_engine(checkpoint, engine, on_step=on_step)


def _compare_with_reference(checkpoint: Path, engine: Engine, slide: Slide, adata: AnnData) -> dict[str, Any]:
    from stpath_train.checkpoint import load_checkpoint

    from .proof import Case, compare, reference

    case = Case("sample slide", slide, None, MARKERS)
    exact = reference(load_checkpoint(checkpoint).double(), case, engine.vocabulary)
    return {"case": case.name, "path": "stages", **compare((adata.obsm["stpath_embedding"], adata.X), exact)}


def _verdict(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not checked: no torch, or no checkpoint beside the engine"
    return (
        f"{'passed' if row['passed'] else 'FAILED'} against float64: relative L2 {row['relative_l2']:.1e} "
        f"(bar {row['bar_l2']:.0e}), lowest Pearson {row['pearson_min']:.7f}"
    )
