"""Maps of slides of any shape."""

from __future__ import annotations

import numpy as np
import pytest
from anndata import AnnData

from stpath_runtime import InputError
from stpath_runtime.results.plot import _columns, plot_genes

SHAPES = {
    "one spot": [[5, 5]],
    "two spots": [[0, 0], [1000, 0]],
    "row": [[i * 200, 0] for i in range(30)],
    "column": [[0, i * 200] for i in range(30)],
    "one place": [[3, 3]] * 4,
    "grid": [[i % 20, i // 20] for i in range(400)],
    "far away": [[10**9 + i, 10**9] for i in range(4)],
}


def prediction(coords, genes=("A", "B")) -> AnnData:
    adata = AnnData(np.random.default_rng(0).random((len(coords), len(genes))).astype(np.float32))
    adata.var_names = list(genes)
    adata.var["gene_ids"] = [f"ENSG{i}" for i in range(len(genes))]
    adata.obsm["spatial"] = np.array(coords)
    return adata


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_shows_its_spots(shape, tmp_path):
    from matplotlib import image

    plot_genes(prediction(SHAPES[shape]), ["A", "ENSG1"], tmp_path / "p.png", title="p")
    picture = image.imread(tmp_path / "p.png")[..., :3]
    left = picture[:, : picture.shape[1] // 3]  # of the first panel, without its colour bar
    assert (left.std(axis=2) > 0.05).mean() > 1e-3, "no coloured dot in sight"
    assert max(picture.shape[:2]) < 4000


def test_a_picture_of_the_tissue_lies_below(tmp_path):
    """The middle of the tissue is green: its own panel shows that, and the genes' around their spots."""
    from matplotlib import image

    adata = prediction([[50, 50], [150, 50], [50, 150], [150, 150]])
    tissue = np.full((20, 20, 3), 255, np.uint8)
    tissue[8:12, 8:12] = (0, 200, 0)
    scales = {"tissue_hires_scalef": 0.1, "spot_diameter_fullres": 40.0}
    adata.uns["spatial"] = {"slide": {"images": {"hires": tissue}, "scalefactors": scales}}
    plot_genes(adata, ["A"], tmp_path / "p.png")
    picture = image.imread(tmp_path / "p.png")[..., :3]
    green = (picture[..., 1] > 0.7) & (picture[..., 0] < 0.1) & (picture[..., 2] < 0.1)
    middle = picture.shape[1] // 2
    alone, below = green[:, :middle], green[:, middle:]
    assert alone.any()
    assert 0.3 < below.sum() / alone.sum() <= 1.1
    rows, columns = np.nonzero(alone)
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 2, "the tissue is stretched"


def test_names_are_no_formulas(tmp_path):
    plot_genes(prediction(SHAPES["grid"], ["$A_{x$"]), ["$A_{x$"], tmp_path / "p.png", title="$bad_{ " + "long " * 99)
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (4, 4), (5, 3), (6, 3), (7, 4), (8, 4), (9, 3), (12, 4)])
def test_panels_fill_their_rows(panels, columns):
    assert _columns(panels) == columns


def test_faults(tmp_path):
    with pytest.raises(InputError, match="'C' is not in the prediction"):
        plot_genes(prediction(SHAPES["grid"]), ["C"], tmp_path / "p.png")
    with pytest.raises(InputError, match="NaN"):
        plot_genes(prediction([[0.0, np.nan]]), ["A"], tmp_path / "p.png")
    assert list(tmp_path.iterdir()) == []
