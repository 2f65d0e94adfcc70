"""Spatial maps of genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .output import written_whole

if TYPE_CHECKING:
    from anndata import AnnData

COLUMNS = 4  # panels in a row
PANEL_INCHES = 3.2
DOTS_PER_INCH = 110
UNITS = "log1p counts"


def require_matplotlib() -> None:
    """Raise InputError, with what to install, where matplotlib is not."""
    if find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib; run: pip install 'stpath-engine[plot]'")


def plot_genes(adata: AnnData, genes: Sequence[str], path: Path, title: str = "") -> None:
    """Draw a map of each gene of a prediction, and write it as PNG.

    Parameters
    ----------
    adata
        As `Engine.predict` returns it: X, `obsm["spatial"]`, var_names and `var["gene_ids"]`.
    genes
        Names among var_names or `var["gene_ids"]`.

    Raises
    ------
    InputError
        If a gene is not in the prediction, it has no coordinates, or matplotlib is not installed.
    """
    if "spatial" not in adata.obsm:
        raise InputError("the prediction has no obsm['spatial']; give a file that stpath predict wrote")
    columns = {name: i for i, name in enumerate(adata.var.get("gene_ids", adata.var_names))}
    columns |= {name: i for i, name in enumerate(adata.var_names)}
    missing = [gene for gene in genes if gene not in columns]
    if missing:
        shown = ", ".join(map(str, adata.var_names[:5]))
        raise InputError(
            f"gene {missing[0]!r} is not in the prediction, which has {adata.n_vars:,} genes ({shown}, ...); "
            "predict it first"
        )
    values = {gene: _dense(adata.X[:, columns[gene]]) for gene in genes}
    draw_maps(np.asarray(adata.obsm["spatial"]), values, path, title)


def draw_maps(
    coords: npt.NDArray[Any], values: Mapping[str, npt.NDArray[Any]], path: Path, title: str = "", units: str = UNITS
) -> None:
    """Draw one map a value, all on the same spots [N, 2], and write them as PNG; y grows downwards, as in the slide."""
    require_matplotlib()
    from matplotlib.figure import Figure

    span = np.maximum(np.ptp(coords.astype(float), axis=0), 1e-9)
    aspect = float(np.clip(span[1] / span[0], 0.4, 2.5))  # height over width of a panel
    columns = min(COLUMNS, len(values))
    rows = -(-len(values) // columns)
    head = 0.45 if title else 0.0
    size = (PANEL_INCHES * 1.22 * columns, PANEL_INCHES * aspect * rows + 0.35 * rows + head)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    diameter = _spot_diameter(coords, span) / float(span.max()) * PANEL_INCHES * 72 * min(1.0, max(aspect, 1.0))
    for axes, (name, value) in zip(panels, values.items(), strict=False):
        low, high = np.percentile(value, [1, 99])
        drawn = axes.scatter(
            coords[:, 0], coords[:, 1], c=value, s=diameter**2, cmap="magma", vmin=low, vmax=max(high, low + 1e-6),
            linewidths=0, rasterized=True,
        )  # fmt: skip
        axes.set_title(name, fontsize=11, style="italic")
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_axis_off()
        bar = figure.colorbar(drawn, ax=axes, shrink=0.75, pad=0.02)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        bar.set_label(units, fontsize=8)
    for axes in panels[len(values) :]:
        axes.set_axis_off()
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=DOTS_PER_INCH, format="png", facecolor="white")


def _spot_diameter(coords: npt.NDArray[Any], span: npt.NDArray[Any]) -> float:
    """The usual distance between neighbouring spots, so that discs touch but do not hide each other."""
    from scipy.spatial import KDTree

    if len(coords) < 2:
        return float(span.max()) / 20
    distance, _ = KDTree(coords.astype(float)).query(coords[:: max(1, len(coords) // 2000)].astype(float), k=2)
    return float(min(np.median(np.asarray(distance)[:, 1]) or span.max() / 100, span.max() / 10))


def _dense(column: Any) -> npt.NDArray[Any]:
    dense = column.toarray() if hasattr(column, "toarray") else column
    return np.asarray(dense).ravel()
