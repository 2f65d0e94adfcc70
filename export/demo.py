"""What the model is for, on the sample slide: from a checkpoint to scores and maps.

The slide's layout, its cell-type fractions and the pathologist's regions are real; its features and counts are
simulated from the fractions, as those of the cohort that the checkpoint was trained on (`stpath_train.cohort`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from stpath_runtime.context import Context
from stpath_runtime.engine import Engine
from stpath_runtime.errors import ParityError
from stpath_runtime.output import write_h5ad
from stpath_runtime.plot import draw_maps
from stpath_runtime.progress import progress_bar
from stpath_runtime.readers import read_slide
from stpath_runtime.sample import load_sample, write_features

if TYPE_CHECKING:
    from anndata import AnnData

    from stpath_runtime.slide import Slide
    from stpath_train.cohort import World

    Expression = npt.NDArray[np.floating[Any]]

MASKED = 0.95  # of the spots; the others are context, as in the published example
SHOWN = ("ERBB2", "COL1A1", "MZB1", "CD68")  # markers of cancer cells, fibroblasts, plasma cells and myeloid cells


def run_demo(out: Path) -> None:
    """Export the demo's checkpoint, predict the sample slide with and without context, score, draw, verify."""
    from stpath_train.cohort import NOTE, World
    from stpath_train.demo_checkpoint import SEED, held_out_slide
    from stpath_train.evaluation.imputation import masked_spots

    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    world = World.create(SEED)
    engine = _engine(out, world, seconds)
    simulated, counts = held_out_slide(world)
    masked = masked_spots(simulated.coords, MASKED)
    rest = np.setdiff1d(np.arange(len(simulated)), masked)
    write_features(load_sample(), simulated.features, out / "simulated_slide.h5")
    write_h5ad(_counts(simulated, counts, rest, world), out / "simulated_context.h5ad")

    slide = read_slide(out / "simulated_slide.h5", organ="Breast", technology="Visium")
    context = Context(rest, counts[rest], world.vocabulary.ensembl_ids)
    predictions = {}
    for name, given in {"prediction": None, "prediction_in_context": context}.items():
        start = time.perf_counter()
        with progress_bar(name.replace("_", " ")) as on_tile:
            adata = engine.predict(slide, context=given, embeddings=True, on_tile=on_tile)
        seconds[name.replace("_", " ")] = time.perf_counter() - start
        adata.obs["region"] = load_sample().regions
        adata.uns["stpath"]["note"] = NOTE
        write_h5ad(adata, out / f"{name}.h5ad")
        predictions[name] = adata

    truth = np.log1p(counts)
    start = time.perf_counter()
    expressions: dict[str, Expression] = _baselines(world, simulated)
    seconds["baselines"] = time.perf_counter() - start
    expressions["STPath, no context"] = predictions["prediction"].X
    expressions["STPath, 5% of spots as context"] = predictions["prediction_in_context"].X
    _draw(out, slide, truth, predictions, rest)
    _print_scores({name: (truth[masked], found[masked]) for name, found in expressions.items()}, len(slide))
    row = _compare_with_reference(engine, slide, predictions["prediction"])
    _print_summary(out, slide, engine, seconds, row)
    if not row["passed"]:
        raise ParityError(f"the demo's prediction is below the bar: {_verdict(row)}")


def _engine(out: Path, world: World, seconds: dict[str, float]) -> Engine:
    """The demo's engine, exported where it is not there yet."""
    from stpath_train.demo_checkpoint import PACKAGED

    from .exporter import export_engine

    path, genes = out / "engine", out / "genes.tsv.gz"
    if not path.exists():
        start = time.perf_counter()
        world.vocabulary.write(genes)
        with progress_bar("export the demo engine") as on_step:
            export_engine(PACKAGED, path, genes, on_step=on_step)
        seconds["export and proof"] = time.perf_counter() - start
    return Engine.load(path)


def _counts(slide: Slide, counts: npt.NDArray[np.int64], spots: npt.NDArray[np.int64], world: World) -> AnnData:
    """Raw counts of some spots, as `stpath predict --context` takes them."""
    import pandas as pd
    from anndata import AnnData

    obs, var = pd.DataFrame(index=np.array(slide.obs_names)[spots]), pd.DataFrame(index=list(world.vocabulary.symbols))
    return AnnData(X=counts[spots].astype(np.float32), obs=obs, var=var)


def _baselines(world: World, slide: Slide) -> dict[str, Expression]:
    """Expression [N, G] by what is fitted on the slides that the checkpoint was trained on."""
    from stpath_train.demo_checkpoint import SEED, SLIDES, VALIDATION, simulate_cohort
    from stpath_train.evaluation.baselines import fit_mean, fit_ridge

    features, expression = [], []
    with progress_bar("fit baselines on the simulated cohort") as on_slide:
        for name, _, of_slide, counts in simulate_cohort(world):
            if name not in VALIDATION:
                features.append(of_slide)
                expression.append(np.log1p(counts).astype(np.float32))
            if on_slide:
                on_slide(len(features), SLIDES)
    x, y = np.concatenate(features), np.concatenate(expression)
    fitted = {"mean expression": fit_mean(y), "ridge regression on features": fit_ridge(x, y, SEED)}
    return {name: predict(slide.features) for name, predict in fitted.items()}


def _draw(
    out: Path, slide: Slide, truth: Expression, predictions: Mapping[str, AnnData], rest: npt.NDArray[np.int64]
) -> None:
    """Maps of markers, truth over predictions, and the pathologist's regions beside clusters of the prediction."""
    from stpath_train.cohort import NOTE

    adata, in_context = predictions["prediction"], predictions["prediction_in_context"]
    column = {gene: list(adata.var_names).index(gene) for gene in SHOWN}
    panels = {f"{gene}: simulated truth": truth[:, column[gene]] for gene in SHOWN}
    panels |= {f"{gene}: predicted": adata.X[:, column[gene]] for gene in SHOWN}
    panels |= {f"{gene}: with 5% context": in_context.X[:, column[gene]] for gene in SHOWN}
    draw_maps(slide.coords, panels, out / "maps.png", f"Held-out slide, real layout and cell types ({NOTE})")


def _print_scores(scored: Mapping[str, tuple[Expression, Expression]], spots: int) -> None:
    """Print how well each predicts the masked spots: truth and prediction [M, G]."""
    from stpath_train.cohort import NOTE
    from stpath_train.evaluation.metrics import mean, pearson_by_gene, squared_error_by_gene

    truth = next(iter(scored.values()))[0]
    title = f"{truth.shape[1]} genes at {len(truth):,} of {spots:,} spots, held-out slide ({NOTE})"
    table = Table("predicted by", "Pearson, mean of genes", "RMSE, log1p counts", title=title)
    for name, (measured, predicted) in scored.items():
        pearson = float(mean(pearson_by_gene(measured, predicted)))
        error = float(np.sqrt(squared_error_by_gene(measured, predicted).mean()))
        table.add_row(name, "none: it is constant" if np.isnan(pearson) else f"{pearson:.3f}", f"{error:.3f}")
    Console(highlight=False).print(table)


def _compare_with_reference(engine: Engine, slide: Slide, adata: AnnData) -> dict[str, Any]:
    from stpath_train.checkpoint import load_checkpoint
    from stpath_train.demo_checkpoint import PACKAGED

    from .proof import Case, compare, reference

    case = Case("sample slide", slide, None, tuple(adata.var["gene_ids"]))
    exact = reference(load_checkpoint(PACKAGED).double(), case, engine.vocabulary)
    return {"case": case.name, "path": "stages", **compare((adata.obsm["stpath_embedding"], adata.X), exact)}


def _print_summary(out: Path, slide: Slide, engine: Engine, seconds: Mapping[str, float], row: dict[str, Any]) -> None:
    model = engine.manifest.model
    sizes = f"{model.n_layers} blocks of width {model.d_model}, {engine.manifest.precision}"
    written = ("simulated_slide.h5", "simulated_context.h5ad", "prediction.h5ad", "prediction_in_context.h5ad")
    table = Table(title="stpath demo", show_header=False)
    table.add_row("spots", f"{len(slide):,} (real layout, cell types and regions: human breast, Visium)")
    table.add_row("features, counts", "simulated from the cell types")
    table.add_row("model", f"trained on a simulated cohort; {sizes}")
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    table.add_row("parity", _verdict(row))
    table.add_row("written", ", ".join(str(out / name) for name in (*written, "maps.png")))
    Console(highlight=False).print(table)


def _verdict(row: dict[str, Any]) -> str:
    return (
        f"{'passed' if row['passed'] else 'FAILED'} against float64: relative L2 {row['relative_l2']:.1e} "
        f"(bar {row['bar_l2']:.0e}), lowest Pearson {row['pearson_min']:.7f}"
    )
