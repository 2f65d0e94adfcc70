"""What the model is for, on the sample slide: from a checkpoint to scores and maps.

The slide's layout, its cell-type fractions and the pathologist's regions are real; its features and counts are
simulated from the fractions, as those of the cohort that the checkpoint was trained on (`stpath_train.cohort`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from stpath_runtime.engine import Engine
from stpath_runtime.errors import ParityError
from stpath_runtime.files import written_whole
from stpath_runtime.progress import progress_bar, report_console
from stpath_runtime.readers import read_slide
from stpath_runtime.results.output import write_h5ad
from stpath_runtime.results.plot import draw_maps
from stpath_runtime.slides.context import Context, masked_spots
from stpath_runtime.slides.sample import load_sample, write_features
from stpath_runtime.slides.vocabulary import FIRST_GENE_TOKEN

if TYPE_CHECKING:
    from anndata import AnnData

    from stpath_runtime.slides.slide import Slide
    from stpath_train.cohort import World

    Expression = npt.NDArray[np.floating[Any]]

CROP = "CMU-1-Small-Region-crop.svs"
IMAGE_NOTE = "features by a small encoder of random weights, so the genes mean nothing"
SHARE = 0.05  # of the spots are context
SHOWN = ("ERBB2", "COL1A1", "MZB1", "CD68")  # markers of cancer cells, fibroblasts, plasma cells and myeloid cells
ALONE, EDGE, SPREAD = (
    "STPath, no context",
    "STPath, 5% of spots as context: the far edge",  # as in the published example
    "STPath, 5% of spots as context: spread",
)


def run_demo(out: Path) -> None:
    """Export the demo's checkpoint, predict the sample slide with and without context, score, draw, verify."""
    import pandas as pd

    from stpath_train.cohort import NOTE, World
    from stpath_train.demo_checkpoint import SEED, held_out_slide

    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    world, sample = World.create(SEED), load_sample()
    engine = _engine(out, world, seconds)
    simulated, counts = held_out_slide(world)
    chosen = _context_spots(simulated)
    write_features(sample, simulated.features, out / "simulated_slide.h5")
    write_h5ad(_counts(simulated, counts, chosen[SPREAD], world), out / "simulated_context.h5ad")

    slide = read_slide(out / "simulated_slide.h5", organ="Breast", technology="Visium")
    predictions = {}
    for name in (ALONE, EDGE, SPREAD):
        spots = chosen.get(name)
        context = None if spots is None else Context(spots, counts[spots], world.vocabulary.ensembl_ids)
        start = time.perf_counter()
        with progress_bar(name) as on_tile:
            predictions[name] = engine.predict(slide, context=context, embeddings=True, on_tile=on_tile)
        seconds["predict"] = time.perf_counter() - start
        predictions[name].obs["region"] = sample.regions
        predictions[name].uns["stpath"]["note"] = NOTE
    write_h5ad(predictions[ALONE], out / "prediction.h5ad")
    write_h5ad(predictions[SPREAD], out / "prediction_in_context.h5ad")

    truth = np.log1p(counts)
    start = time.perf_counter()
    expressions = _baselines(world, slide) | {name: adata.X for name, adata in predictions.items()}
    seconds["baselines"] = time.perf_counter() - start
    _draw_genes(out, slide, truth, expressions, world)
    _draw_regions(out, slide, sample.regions, predictions[ALONE])
    scored = np.setdiff1d(np.arange(len(slide)), np.concatenate(list(chosen.values())))  # known to none of them
    scores = _score(truth[scored], {name: found[scored] for name, found in expressions.items()})
    pd.DataFrame(scores, columns=["predicted by", "pearson", "rmse"]).to_csv(out / "scores.csv", index=False)
    _print_scores(scores, f"{truth.shape[1]} genes at {len(scored):,} spots of a held-out slide, {NOTE}")
    made = _from_image(out, engine, seconds)
    row = _compare_with_reference(engine, slide, predictions[ALONE])
    _print_summary(out, slide, engine, seconds, row, made)
    if not row["passed"]:
        raise ParityError(f"the demo's prediction is below the bar: {_verdict(row)}")


def _from_image(out: Path, engine: Engine, seconds: dict[str, float]) -> int:
    """Genes over the tissue of a crop of a real slide, by a tile encoder of random weights; returns its tiles."""
    from stpath_runtime.images.encoder import TileEncoder
    from stpath_runtime.images.features import FeaturesJob
    from stpath_runtime.images.slide import ImageSlides
    from stpath_runtime.results.plot import plot_genes
    from stpath_train.small_encoder import write_small_encoder

    from .encoders.exporter import publish_encoder

    start = time.perf_counter()
    if not (out / "encoder").exists():
        model = write_small_encoder(out / "encoder_weights.safetensors")
        with progress_bar("export a small tile encoder") as on_step:
            publish_encoder(model, out / "encoder", on_step=on_step)
    image = Path(str(files("stpath_runtime") / "data" / CROP))
    with TileEncoder.load(out / "encoder") as encoder:
        slides = ImageSlides([FeaturesJob(image, out / "image.features.h5")], encoder)
        slide, tissue = slides.next("Skin", None)
        slides.close()
    adata = engine.predict(slide, genes=SHOWN[:3], embeddings=True)
    adata.uns["spatial"] = tissue
    adata.uns["stpath"]["note"] = IMAGE_NOTE
    write_h5ad(adata, out / "image_genes.h5ad")
    plot_genes(adata, SHOWN[:3], out / "tissue_maps.png", title=f"A crop of a real slide: {IMAGE_NOTE}")
    seconds["image to genes"] = time.perf_counter() - start
    return len(slide)


def _context_spots(slide: Slide) -> dict[str, npt.NDArray[np.int64]]:
    """Two choices of a twentieth of the spots: those farthest from the rightmost, as published, and any, by a seed."""
    edge = np.setdiff1d(np.arange(len(slide)), masked_spots(slide.coords, 1 - SHARE))
    spread = np.random.default_rng(0).choice(len(slide), len(edge), replace=False)
    return {EDGE: edge, SPREAD: np.sort(spread)}


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


def _draw_genes(
    out: Path, slide: Slide, truth: Expression, expressions: Mapping[str, Expression], world: World
) -> None:
    """Maps of markers: the truth over the predictions."""
    from stpath_train.cohort import NOTE

    rows = {"simulated truth": truth, "predicted": expressions[ALONE], "5% spread as context": expressions[SPREAD]}
    columns = dict(zip(SHOWN, world.vocabulary.tokens(SHOWN) - FIRST_GENE_TOKEN, strict=True))
    panels = {f"{gene}, {row}": found[:, columns[gene]] for row, found in rows.items() for gene in SHOWN}
    draw_maps(slide.coords, panels, out / "maps.png", f"Held-out slide: real layout and cell types, {NOTE}")


def _draw_regions(out: Path, slide: Slide, regions: Sequence[str], adata: AnnData) -> None:
    """The pathologist's regions beside markers of cancer cells, fibroblasts and plasma cells, as predicted."""
    from stpath_train.cohort import NOTE
    from stpath_train.evaluation.plots import regions_and_genes

    genes = {f"{gene}, predicted": adata.obs_vector(gene) for gene in ("ERBB2", "COL1A1", "MZB1")}
    figure = regions_and_genes(
        f"A pathologist's regions, and the prediction ({NOTE})", slide.coords, np.array(regions), genes
    )
    with written_whole(out / "regions.png") as partial:
        figure.savefig(partial, dpi=110, format="png", facecolor="white")


def _score(truth: Expression, expressions: Mapping[str, Expression]) -> list[tuple[str, float, float]]:
    """Mean Pearson of the genes and RMSE of each prediction, of spots [M, G] that were context of none."""
    from stpath_train.evaluation.metrics import mean, pearson_by_gene, squared_error_by_gene

    rows = []
    for name, predicted in expressions.items():
        error = np.sqrt(squared_error_by_gene(truth, predicted).mean())
        rows.append((name, float(mean(pearson_by_gene(truth, predicted))), float(error)))
    return rows


def _print_scores(rows: Sequence[tuple[str, float, float]], what: str) -> None:
    table = Table("predicted by", "Pearson, mean of genes", "RMSE, log1p counts", title=what)
    for name, pearson, error in rows:
        table.add_row(name, "none: it is constant" if np.isnan(pearson) else f"{pearson:.3f}", f"{error:.3f}")
    report_console().print(table)


def _compare_with_reference(engine: Engine, slide: Slide, adata: AnnData) -> dict[str, Any]:
    from stpath_train.checkpoint import load_checkpoint
    from stpath_train.demo_checkpoint import PACKAGED

    from .proof import Case, compare, reference

    case = Case("sample slide", slide, None, tuple(adata.var["gene_ids"]))
    exact = reference(load_checkpoint(PACKAGED).double(), case, engine.vocabulary)
    return {"case": case.name, "path": "stages", **compare((adata.obsm["stpath_embedding"], adata.X), exact)}


def _print_summary(
    out: Path, slide: Slide, engine: Engine, seconds: Mapping[str, float], row: dict[str, Any], tiles: int
) -> None:
    model = engine.manifest.model
    sizes = f"{model.n_layers} blocks of width {model.d_model}, {engine.manifest.precision}"
    written = ["simulated_slide.h5", "simulated_context.h5ad", "prediction.h5ad", "prediction_in_context.h5ad"]
    table = Table(title="stpath demo", show_header=False)
    table.add_row("spots", f"{len(slide):,} (real layout, cell types and regions: human breast, Visium)")
    table.add_row("features, counts", "simulated from the cell types")
    table.add_row("model", f"trained on a simulated cohort; {sizes}")
    table.add_row("seconds", ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    table.add_row("parity", _verdict(row))
    table.add_row("image", f"{tiles} tiles of a crop of a real slide (H&E, CC0); {IMAGE_NOTE}")
    written += ["image.features.h5", "image.tiles.png", "image_genes.h5ad", "tissue_maps.png"]
    table.add_row("written", ", ".join(str(out / name) for name in (*written, "scores.csv", "maps.png", "regions.png")))
    look = " or ".join(str(out / name) for name in ("prediction.h5ad", "image_genes.h5ad"))
    table.add_row("look at it", f"stpath view {look} --engine {out / 'engine'}")
    report_console().print(table)


def _verdict(row: dict[str, Any]) -> str:
    return (
        f"{'passed' if row['passed'] else 'FAILED'} against float64: relative L2 {row['relative_l2']:.1e} "
        f"(bar {row['bar_l2']:.0e}), lowest Pearson {row['pearson_min']:.7f}"
    )
