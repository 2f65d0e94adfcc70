"""Spatial maps of genes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..encoding.neighbors import usual_distance
from ..errors import GeneError, InstallError, PredictionError
from ..files import written_whole
from ..names import shown
from ..slides.vocabulary import nearest_names

if TYPE_CHECKING:
    from anndata import AnnData

MOST_COLUMNS = 4  # panels in a row
SMALLEST_DOT = 1.3  # points
PANEL_INCHES = 3.2
DOTS_PER_INCH = 110
UNITS = "log1p counts"
OVER_TISSUE = 0.75  # opacity of spots
Tissue = tuple[npt.NDArray[Any], float]  # a picture [h, w, 3], and how many of its pixels are one of the coordinates


def require_matplotlib() -> None:
    """Raise InputError, with what to install, where matplotlib is not."""
    if find_spec("matplotlib") is None:
        raise InstallError("plots need matplotlib; run: pip install 'stpath-engine[plot]'")


def plot_genes(adata: AnnData, genes: Sequence[str], path: Path, title: str = "", x: Any = None) -> None:
    """Draw a map of each gene of a prediction, and write it as PNG.

    Parameters
    ----------
    adata
        As `Engine.predict` returns it: X, `obsm["spatial"]`, var_names and `var["gene_ids"]`.
    genes
        Names among var_names or `var["gene_ids"]`.
    x
        [N, G], what stands for X where that is not in memory.

    Raises
    ------
    InputError
        If a gene is not in the prediction, its coordinates are not finite, or matplotlib is not installed.
    """
    if not np.isfinite(np.asarray(adata.obsm["spatial"], float)).all():
        raise PredictionError("the prediction's coordinates in obsm['spatial'] hold NaN or infinity; predict it again")
    columns = {name: i for i, name in enumerate(adata.var.get("gene_ids", adata.var_names))}
    columns |= {name: i for i, name in enumerate(adata.var_names)}
    missing = [gene for gene in genes if gene not in columns]
    if missing:
        shown = ", ".join(map(str, adata.var_names[:5]))
        raise GeneError(
            f"gene {missing[0]!r} is not in the prediction{nearest_names(missing[0], columns)}, which has "
            f"{adata.n_vars:,} genes ({shown}, ...); predict it first"
        )
    x = adata.X if x is None else x
    values = {gene: _dense(x[:, columns[gene]]) for gene in genes}
    draw_maps(np.asarray(adata.obsm["spatial"]), values, path, title, tissue=_tissue(adata))


def draw_maps(
    coords: npt.NDArray[Any],
    values: Mapping[str, npt.NDArray[Any]],
    path: Path,
    title: str = "",
    units: str = UNITS,
    tissue: Tissue | None = None,
) -> None:
    """Draw one map a value, all on the same spots [N, 2], and write them as PNG; y grows downwards, as in the slide.

    With a picture of the tissue it is drawn below, and first alone.
    """
    require_matplotlib()
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

    coords = coords.astype(float)
    span = np.ptp(coords, axis=0)
    diameter = _spot_diameter(coords, float(span.max()) or 1.0)
    # Room for whole spots, and a panel that is no thinner than a fifth of its length.
    room = np.maximum(diameter, (0.2 * span.max() - span) / 2)
    low, high = coords.min(axis=0) - room, coords.max(axis=0) + room
    width, height = high - low
    scale = PANEL_INCHES / np.sqrt(width * height)  # inches a unit: every panel has the same area
    count = len(values) + (tissue is not None)
    columns = _columns(count)
    rows = -(-count // columns)
    size = (columns * (scale * width + 0.8), rows * (scale * height + 0.4) + (0.4 if title else 0))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(
        textwrap.shorten(shown(title), max(20, int(size[0] * 11)), placeholder=" …"), fontsize=11, parse_math=False
    )
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    if tissue is not None:
        first = panels.pop(0)
        first.set_title("H&E", fontsize=11)
        _draw_tissue(first, tissue, low, high)
        figure.colorbar(ScalarMappable(), ax=first, fraction=0.06, pad=0.02, shrink=0.8).ax.set_visible(False)
    points = max(diameter * scale * 72, SMALLEST_DOT)
    for axes, (name, value) in zip(panels, values.items(), strict=False):
        bottom, top = np.percentile(value, [1, 99])
        if top - bottom < 1e-6:  # a gene that is the same everywhere
            bottom, top = bottom - 0.5, bottom + 0.5
        if tissue is not None:
            _draw_tissue(axes, tissue, low, high)
        drawn = axes.scatter(
            coords[:, 0], coords[:, 1], c=value, s=points**2, cmap="magma", vmin=bottom, vmax=top,
            linewidths=0, rasterized=True, alpha=1 if tissue is None else OVER_TISSUE,
        )  # fmt: skip
        axes.set_title(shown(name), fontsize=11, style="italic", parse_math=False)
        axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal")  # y grows downwards
        axes.set_axis_off()
        bar = figure.colorbar(drawn, ax=axes, fraction=0.06, pad=0.02, shrink=0.8)
        bar.ax.tick_params(labelsize=8)
        bar.ax.ticklabel_format(axis="y", useOffset=False)
        bar.outline.set_visible(False)
        bar.set_label(units, fontsize=8)
    for axes in panels[len(values) :]:
        axes.set_axis_off()
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, format="png", facecolor="white")


def _tissue(adata: AnnData) -> Tissue | None:
    """The tissue of a prediction from an image, and its pixels to one of level 0; None if there is none."""
    for library in adata.uns.get("spatial", {}).values():
        return np.asarray(library["images"]["hires"]), float(library["scalefactors"]["tissue_hires_scalef"])
    return None


def _draw_tissue(axes: Any, tissue: Tissue, low: npt.NDArray[Any], high: npt.NDArray[Any]) -> None:
    pixels, scale = tissue
    height, width = (side / scale for side in pixels.shape[:2])
    axes.imshow(pixels, extent=(0, width, height, 0))
    axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]), aspect="equal")
    axes.set_axis_off()


def _columns(panels: int) -> int:
    """Panels in a row: up to 4, so that the last row is as full as can be."""
    return panels if panels <= MOST_COLUMNS else min((4, 3), key=lambda columns: -panels % columns)


def _spot_diameter(coords: npt.NDArray[Any], span: float) -> float:
    """The usual distance between neighbouring spots, a little more, so that discs touch."""
    usual = usual_distance(coords)
    return min(1.08 * usual, span / 10) if usual else span / 20


def _dense(column: Any) -> npt.NDArray[Any]:
    dense = column.toarray() if hasattr(column, "toarray") else column
    return np.asarray(dense).ravel()
