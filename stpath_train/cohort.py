"""A simulated cohort: features and counts of tissues that never were, both from the same cell-type fractions.

What is real: the genes' names, the markers of the nine cell types, and, on the sample slide, its layout and fractions.
All else is drawn here. Every figure made of it says so.

    fractions -> noisy impression of each spot -> features     what a pathologist might see
    fractions -> each patient's own signatures -> counts       what no image shows, and a few measured spots do

N spots, T = 9 cell types, G genes, F features, P programs of genes that vary together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stpath_runtime.slides.sample import CELL_TYPES
from stpath_runtime.slides.vocabulary import FIRST_GENE_TOKEN, GeneVocabulary

Floats = npt.NDArray[np.float64]

NOTE = "simulated features and counts"
N_GENES, N_FEATURES, N_PROGRAMS, N_IMPRESSIONS = 500, 1536, 6, 24
# Markers as single-cell atlases of breast use them, in the order of CELL_TYPES.
MARKERS = {
    "endothelial": "PECAM1 VWF CDH5 CLDN5 ENG EMCN ESAM RAMP2 PLVAP KDR",
    "cafs": "COL1A1 COL1A2 COL3A1 DCN LUM FAP PDGFRA POSTN FN1 SPARC",
    "pvl": "ACTA2 RGS5 PDGFRB MCAM TAGLN MYH11 NOTCH3 CSPG4 MYLK DES",
    "b_cells": "MS4A1 CD79A CD79B CD19 BANK1 CD22 BLK PAX5 FCRL1 VPREB3",
    "t_cells": "CD3D CD3E CD2 CD8A CD4 IL7R TRAC GZMK CCL5 LCK",
    "myeloid": "CD68 LYZ CD14 CD163 FCGR3A CSF1R AIF1 C1QA C1QB ITGAX",
    "normal_epithelial": "KRT14 KRT5 KRT17 KRT15 TP63 OXTR LTF ELF5 KIT SLPI",
    "plasmablasts": "MZB1 JCHAIN XBP1 SDC1 DERL3 PRDM1 TNFRSF17 FKBP11 SSR4 HERPUD1",
    "cancer_epithelial": "EPCAM ERBB2 ESR1 KRT8 KRT18 KRT19 MUC1 CDH1 GATA3 CD24",
}


@dataclass(frozen=True, eq=False)
class World:
    """What all slides of a cohort share."""

    vocabulary: GeneVocabulary
    signatures: Floats  #: [T, G] log of a cell type's mean counts
    programs: Floats  #: [P, G] genes that vary together, from place to place and from patient to patient
    impressions: Floats  #: [T, I] how fractions strike the eye
    mixing: tuple[Floats, Floats]  #: [I, 2I], [2I, F]: two layers from an impression to features

    @classmethod
    def create(cls, seed: int = 0) -> World:
        """Draw a world."""
        rng = np.random.default_rng(seed)
        vocabulary = demo_vocabulary()
        symbols = {symbol: column for column, symbol in enumerate(vocabulary.symbols)}
        shape = len(CELL_TYPES), len(symbols)
        signatures = rng.normal(0.3, 0.8, shape[1]) + rng.normal(0, 0.8, shape)
        for row, markers in enumerate(MARKERS.values()):
            columns = [symbols[name] for name in markers.split()]
            signatures[:, columns] = rng.normal(-1.2, 0.3, (shape[0], len(columns)))
            signatures[row, columns] = rng.normal(2.2, 0.4, len(columns))
        programs = rng.normal(0, 1, (N_PROGRAMS, shape[1])) * (rng.random((N_PROGRAMS, shape[1])) < 0.4)
        wide = 2 * N_IMPRESSIONS
        mixing = (
            rng.normal(0, 1, (N_IMPRESSIONS, wide)) / np.sqrt(N_IMPRESSIONS),
            rng.normal(0, 1, (wide, N_FEATURES)) / np.sqrt(wide),
        )
        return cls(vocabulary, signatures, programs, rng.normal(0, 1, (shape[0], N_IMPRESSIONS)), mixing)


def demo_vocabulary() -> GeneVocabulary:
    """The 500 real genes of the demo: the markers, and others that a seed draws from the published ones."""
    published = GeneVocabulary.published()
    markers = " ".join(MARKERS.values()).split()
    named = [
        symbol
        for symbol, species in zip(published.symbols, published.species, strict=True)
        if species == "Homo sapiens" and symbol.isalnum() and 3 <= len(symbol) <= 6 and symbol not in markers
    ]
    others = np.random.default_rng(0).choice(sorted(named), N_GENES - len(markers), replace=False)
    rows = np.sort(published.tokens([*markers, *others])) - FIRST_GENE_TOKEN
    return GeneVocabulary(
        [published.ensembl_ids[row] for row in rows],
        [published.symbols[row] for row in rows],
        [published.aliases[row] for row in rows],
        [published.species[row] for row in rows],
    )


def simulate_tissue(rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], Floats]:
    """A tissue on the hexagonal grid of Visium: coordinates [N, 2] in pixels, cell-type fractions [N, T]."""
    side = int(rng.integers(24, 41))
    row, column = np.divmod(np.arange(side * side), side)
    grid = np.stack([column + 0.5 * (row % 2), row * np.sqrt(3) / 2], axis=1)
    outline = _fields(rng, grid, 1, side / 4)[:, 0] - 1.5 * np.square((grid - grid.mean(axis=0)) / (side / 2)).sum(
        axis=1
    )
    grid = grid[outline > np.quantile(outline, 0.35)]
    usual = np.log([0.02, 0.12, 0.04, 0.03, 0.02, 0.09, 0.06, 0.12, 0.5])
    wealth = 2.2 * _fields(rng, grid, len(CELL_TYPES), rng.uniform(3, 8)) + usual + rng.normal(0, 1.0, len(CELL_TYPES))
    fractions = np.exp(wealth - wealth.max(axis=1, keepdims=True))
    return np.rint(grid * 200).astype(np.int64), fractions / fractions.sum(axis=1, keepdims=True)


def simulate_slide(
    world: World, coords: npt.NDArray[np.int64], fractions: npt.NDArray[np.floating], rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Simulate a slide of a new patient: features float32 [N, F] and counts [N, G].

    Parameters
    ----------
    coords
        [N, 2], pixels; spots 200 pixels apart.
    fractions
        [N, T], of the cell types.
    """
    impression = np.sqrt(fractions) @ world.impressions + rng.normal(0, 0.5, (len(coords), N_IMPRESSIONS))
    stain = rng.normal(0, 0.3, N_IMPRESSIONS)
    first, second = world.mixing
    features = np.tanh((impression + stain) @ first) @ second + rng.normal(0, 0.5, (len(coords), N_FEATURES))

    n_programs, n_types = len(world.programs), len(CELL_TYPES)
    patient = rng.normal(0, 0.5, (n_types, n_programs)) @ world.programs  # [T, G]: this patient's cells
    place = 0.25 * _fields(rng, coords / 200, n_programs, 6.0) @ world.programs  # [N, G]
    mean = fractions @ np.exp(np.clip(world.signatures + patient, -6, 5)) * np.exp(place)
    depth = rng.lognormal(0, 0.25, (len(coords), 1)) * rng.lognormal(0, 0.2)
    counts = rng.poisson(mean * depth * rng.gamma(8, 1 / 8, mean.shape))
    return features.astype(np.float32), counts


def _fields(rng: np.random.Generator, grid: Floats, n: int, length: float) -> Floats:
    """Smooth random fields on spots [N, 2], of mean 0 and spread 1: [N, n]; `length` in units of the grid."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    low = grid.min(axis=0)
    size = np.ceil(grid.max(axis=0) - low).astype(int) + 2
    fields = []
    for _ in range(n):
        smooth = gaussian_filter(rng.normal(size=size), length / 2, mode="wrap")
        fields.append(map_coordinates(smooth, (grid - low).T, order=1))
    found = np.stack(fields, axis=1)
    return (found - found.mean(axis=0)) / found.std(axis=0)
