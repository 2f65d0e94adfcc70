"""Genes added to a prediction, from the embedding that it keeps."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .engine import Engine
from .errors import InputWarning, PredictionError
from .output import SHAPES, TABLE, Format
from .prediction import EMBEDDING, Prediction
from .progress import OnTile
from .readers import open_prediction
from .readers.opening import opened
from .readers.zarrs import ZarrSource

WRITTEN = ("uns/stpath", "uns/spatialdata_attrs", f"tables/{TABLE}", f"shapes/{SHAPES}", "var/gene_ids")
LOST = ("uns", "layers", "raw", "obsp", "varm", "varp")  # groups of which nothing else is kept


def add_genes(
    engine: Engine,
    prediction: Path,
    genes: Sequence[str] | None,
    target: Path,
    form: Format,
    dtype: npt.DTypeLike,
    on_tile: OnTile | None = None,
) -> tuple[int, int, int]:
    """Write a prediction with further genes, which the head decodes from its embedding [N, d].

    The genes that it has come first, with their values as they are; of the genes asked for, those that it lacks are
    added, in their order. `target` may be the prediction itself, unless it holds what others have added to it.

    Parameters
    ----------
    genes
        Symbols, aliases or Ensembl ids; None means all.

    Returns
    -------
    tuple of int
        The numbers of spots, of genes added and of genes kept.

    Raises
    ------
    InputError
        If the prediction has no embedding, is another engine's, or a gene is unknown; or if it would be written anew
        without something that it holds.
    """
    import pandas as pd
    from anndata import AnnData

    with open_prediction(prediction) as (found, x):
        if target == prediction:
            _require_nothing_lost(prediction, found.var.columns)
        made_by, embedding = found.uns["stpath"].get("engine"), found.obsm.get(EMBEDDING)
        if embedding is None:
            raise PredictionError(f"{prediction}: keeps no embedding; predict it again with --embeddings")
        if made_by != engine.hash():
            raise PredictionError(
                f"{prediction}: predicted by another engine ({str(made_by)[:12]}…, not {engine.path}, "
                f"{engine.hash()[:12]}…); give that one, or predict it again with this one"
            )
        embedding = engine.check_embedding(embedding, f"{prediction}: obsm[{EMBEDDING!r}]")
        names, tokens = engine.panel(genes)
        ids = np.array(engine.vocabulary.gene_ids(tokens))
        lacking = ~np.isin(ids, found.var["gene_ids"])
        added = pd.DataFrame({"gene_ids": ids[lacking]}, index=pd.Index(names, dtype=object)[lacking])
        if len(added) and found.uns["stpath"].get("context_filled"):
            warnings.warn(
                f"{prediction}: its context spots hold measured values (--fill-context); those of the added genes are "
                "predicted there, too",
                InputWarning,
                stacklevel=2,
            )
        genes_of = pd.concat([found.var[["gene_ids"]], added])
        frame = AnnData(obs=found.obs, var=genes_of, obsm=dict(found.obsm), uns=dict(found.uns))
        Prediction(engine, frame, embedding, tokens[lacking], earlier=x).write(target, form, dtype, on_tile)
    return frame.n_obs, len(added), found.n_vars


def _require_nothing_lost(prediction: Path, columns: Iterable[str]) -> None:
    """Refuse to write anew a file that holds more than stpath wrote, or is of a kind that stpath does not write."""
    with opened(prediction, "a prediction") as source:
        zarr = isinstance(source, ZarrSource)
        if zarr and not prediction.is_dir():
            raise PredictionError(f"{prediction}: an archive, which is not written anew; give --out, a .zarr or .h5ad")
        spatial = zarr and "tables" in source.names()
        at = f"tables/{TABLE}/" if spatial else ""
        held = [f"{group}/{name}" for group in LOST for name in source.names(f"{at}{group}")]
        held += [f"{kind}/{name}" for kind in source.names() if spatial for name in source.names(kind)]
    held += [f"var/{column}" for column in columns]
    if more := [name for name in held if name not in WRITTEN]:
        raise PredictionError(
            f"{prediction}: holds what stpath did not write and would not keep ({', '.join(more[:3])}"
            f"{', ...' if len(more) > 3 else ''}); give --out, another file"
        )
