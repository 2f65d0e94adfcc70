"""The files that the pages name, small: a model of random weights over the published genes, slides of random counts.

Names, sizes of features and layouts are those of the real ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from readers_helpers import TRIDENT_COORDS, make_table, make_tiles, write_spatialdata, write_trident
from scipy.sparse import csr_matrix

from helpers import CROP, write_slide
from stpath_export.encoders.exporter import publish_encoder
from stpath_export.exporter import export_engine
from stpath_runtime.manifest import ModelConfig
from stpath_runtime.slides.sample import load_sample
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.cohort import MARKERS
from stpath_train.prepare import prepare
from stpath_train.small_encoder import write_small_encoder
from stpath_train.sources import Layout

SPOTS, WIDTH = 64, 1536
GENES = " ".join(MARKERS.values()).split()
HEST = (
    "id,organ,st_technology,species,patient,disease_state,dataset_title\n"
    "INT2,Kidney,Visium,Homo sapiens,p1,Cancer,kidneys\n"
    "INT3,Kidney,Visium,Homo sapiens,p2,Healthy,kidneys\n"
    "TENX95,Breast,Xenium,Homo sapiens,p3,Cancer,breasts\n"
    "TENX96,Breast,Xenium,Homo sapiens,p4,Healthy,breasts\n"
)
SLIDES = ("INT2", "INT3", "TENX95", "TENX96")


def fill(folder: Path) -> None:
    """Make every file that a page may name."""
    vocabulary = GeneVocabulary.published()
    config = ModelConfig(
        d_model=16, n_heads=4, n_layers=1, d_mlp=32, n_features=WIDTH, n_tokens=vocabulary.n_tokens,
        n_organs=len(ORGANS), n_technologies=len(TECHNOLOGIES),
    )  # fmt: skip
    torch.save(seeded_checkpoint(config, 0).state_dict(), folder / "stfm.pth")
    export_engine(folder / "stfm.pth", folder / "engine")
    table = {symbol: gene for symbol, gene in zip(vocabulary.symbols, vocabulary.ensembl_ids, strict=True) if symbol}
    (folder / "symbol2ensembl.json").write_text(json.dumps(table))
    (folder / "panel.txt").write_text("\n".join(GENES[:20]))
    _write_hest(folder / "hest")
    _write_bench(folder / "hest-bench")
    _write_slides(folder)
    _write_images(folder)
    features = folder / "hest" / "features"
    prepare(folder / "hest", Layout.HEST, folder / "store", features=features, label="disease_state")
    metadata = folder / "hest" / "HEST_v1_1_0.csv"
    prepare(folder / "hest-bench", Layout.HEST_BENCH, folder / "bench", features=features, metadata=metadata)


def _slide(i: int) -> tuple[Slide, AnnData]:
    """A corner of the sample slide with random features, and random counts of its spots that differ by region."""
    sample, rng = load_sample(), np.random.default_rng(i)
    order = np.argsort(sample.coords.sum(axis=1) * (1, -1)[i % 2], kind="stable")[:SPOTS]
    named = ["AAACAAGTATCTCCCA-1", "AAACACCAATAACTGC-1", "AAACAGAGCGACTCCT-1"]
    barcodes = named + [b for b in np.array(sample.barcodes)[order] if b not in named][: SPOTS - len(named)]
    right = sample.coords[order, 0] > np.median(sample.coords[order, 0])
    features = rng.standard_normal((SPOTS, WIDTH), np.float32) + right[:, None]
    counts = rng.poisson(np.exp(rng.normal(0.5, 0.5, (2, len(GENES))))[right.astype(int)])
    where = np.where(right, "tumor", "stroma")
    obs = pd.DataFrame({"region": where, "annotation": where}, index=barcodes)
    adata = AnnData(csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=GENES))
    return Slide(sample.coords[order], features, barcodes), adata


def _write_images(folder: Path) -> None:
    """A slide image, a folder of one, the spots of one, and an encoder of random weights in the place of Gigapath's."""
    publish_encoder(write_small_encoder(folder / "weights.safetensors"), folder / "gigapath")
    (folder / "slides").mkdir()
    for name in ("slide.svs", "slides/a.svs"):
        shutil.copy(CROP, folder / name)
    rows = [
        f"{barcode},1,0,{i},{200 + 120 * (i // 8)},{200 + 100 * (i % 8)}"
        for i, barcode in enumerate(_slide(0)[0].obs_names)
    ]
    head = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"
    (folder / "tissue_positions.csv").write_text("\n".join([head, *rows]) + "\n")


def _write_hest(folder: Path) -> None:
    """HEST-1k of four slides, with features."""
    (folder / "st").mkdir(parents=True)
    (folder / "features").mkdir()
    (folder / "HEST_v1_1_0.csv").write_text(HEST)
    for i, name in enumerate(SLIDES):
        slide, adata = _slide(i)
        adata.write_h5ad(folder / "st" / f"{name}.h5ad")
        write_slide(slide, folder / "features" / f"{name}.h5")


def _write_bench(folder: Path) -> None:
    """The task IDC of HEST-bench on the same slides, two folds."""
    task = folder / "IDC"
    (task / "adata").mkdir(parents=True)
    (task / "splits").mkdir()
    (task / "var_50genes.json").write_text(json.dumps({"genes": GENES[:10]}))
    for i, name in enumerate(SLIDES):
        _slide(i)[1].write_h5ad(task / "adata" / f"{name}.h5ad")
    for fold, test in enumerate(SLIDES[:2]):
        for side, slides in (("test", [test]), ("train", [name for name in SLIDES if name != test])):
            rows = "".join(f"{name},patches/{name}.h5,adata/{name}.h5ad\n" for name in slides)
            (task / "splits" / f"{side}_{fold}.csv").write_text("sample_id,patches_path,expr_path\n" + rows)


def _write_slides(folder: Path) -> None:
    """Features of a slide as several tools write them, its counts, and a cohort."""
    slide, counts = _slide(0)
    write_slide(slide, folder / "INT2.h5")
    counts.write_h5ad(folder / "counts.h5ad")
    (folder / "cohort.csv").write_text("slide,organ,technology\nINT2.h5,Kidney,Visium\n")
    (folder / "features").mkdir()
    for i, name in enumerate(("INT2", "INT3", "TENX96")):
        write_slide(_slide(i)[0], folder / "features" / f"{name}.h5")
    trident = folder / "trident" / "20x_256px_32px_overlap" / "features_gigapath" / "INT2.h5"
    trident.parent.mkdir(parents=True)
    attributes = TRIDENT_COORDS | {"patch_size": 256, "patch_size_level0": 512, "overlap": 32}
    write_trident(trident, slide.features.astype(np.float16), slide.coords, attributes)
    tables = {"gigapath_tiles": make_table(range(SPOTS), slide.features)}
    write_spatialdata(folder / "slide.zarr", tables, {"tiles": make_tiles(slide.coords)})
