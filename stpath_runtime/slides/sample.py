"""The sample slide: real spots and cell-type fractions of a human breast cancer section.

3,798 spots of a 10x Visium section (block A, section 1; CC BY 4.0), with a pathologist's regions and the fractions of
nine cell types from deconvolution (the test data of stlearn, BSD). It has no pathology features and no counts: those
that stand for them are simulated, and every place that shows a number computed on them says so.
"""

from __future__ import annotations

import csv
import lzma
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..files import written_whole

SAMPLE = "human_breast_visium_spots.csv.xz"
PIXELS_PER_SPOT = 200  # 100 um between spots, at 0.5 um a pixel
CELL_TYPES = (
    *("endothelial", "cafs", "pvl", "b_cells", "t_cells", "myeloid", "normal_epithelial", "plasmablasts"),
    "cancer_epithelial",
)


@dataclass(frozen=True, eq=False)
class Sample:
    """The spots of the sample slide."""

    barcodes: list[str]
    coords: npt.NDArray[np.int64]  #: [N, 2], pixels
    regions: list[str]
    fractions: npt.NDArray[np.float32]  #: [N, 9], in the order of CELL_TYPES


def load_sample() -> Sample:
    """Read the sample slide's spots from the package."""
    raw = files("stpath_runtime").joinpath("data", SAMPLE).read_bytes()
    rows = list(csv.DictReader(lzma.decompress(raw).decode().splitlines()))
    # The hexagonal grid of Visium: columns are half a spot apart, rows sqrt(3) / 2.
    grid = np.array([(int(row["array_col"]) / 2, int(row["array_row"]) * np.sqrt(3) / 2) for row in rows])
    return Sample(
        barcodes=[row["barcode"] for row in rows],
        coords=np.rint(grid * PIXELS_PER_SPOT).astype(np.int64),
        regions=[row["region"] for row in rows],
        fractions=np.array([[float(row[name]) for name in CELL_TYPES] for row in rows], np.float32),
    )


def write_features(sample: Sample, features: npt.NDArray[np.float32], path: Path) -> None:
    """Write a features file as HEST has it: `embeddings`, `coords` and `barcodes`."""
    import h5py

    with written_whole(path) as partial, h5py.File(partial, "w") as file:
        file.attrs["note"] = "simulated features: a noisy mixture of cell-type fractions"
        file["embeddings"] = features
        file["coords"] = sample.coords
        file["barcodes"] = np.array([[barcode.encode()] for barcode in sample.barcodes])
