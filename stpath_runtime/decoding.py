"""Genes added to a prediction, from the embedding that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .checks import check_embedding, require_made_by, require_stpath
from .engine import Engine
from .errors import PredictionError, warn
from .progress import OnTile
from .readers import opened
from .readers.zarrs import ZarrSource
from .results.output import SHAPES, TABLE, Format
from .results.prediction import EMBEDDING, Prediction
from .results.reading import open_prediction

if TYPE_CHECKING:
    import pandas as pd

OURS = ("uns/stpath", "uns/spatial", "uns/spatialdata_attrs", f"tables/{TABLE}", f"shapes/{SHAPES}", "var/gene_ids")
DROPPED = ("uns", "layers", "raw", "obsp", "varm", "varp")  # groups that are not kept when a prediction is rewritten


def add_genes(
    engine: Engine,
    prediction: Path,
    genes: Sequence[str] | None,
    target: Path,
    form: Format,
    dtype: npt.DTypeLike,
    on_tile: OnTile | None = None,
) -> tuple[int, int, int]:
    """Add genes to a prediction: the head decodes them from the embedding [N, d] that it keeps.

    The genes that it already has come first, unchanged; those that it lacks are added in the order given. `target` may
    be the prediction itself, unless other programs have added to it.

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
        If the prediction has no embedding, is another engine's, or a gene is unknown; or if it would be rewritten
        without something that it holds.
    """
    import pandas as pd
    from anndata import AnnData

    require_stpath(engine.path, engine.manifest, "stpath decode")
    with open_prediction(prediction, pictures=True) as (found, x):
        if target == prediction:
            _require_nothing_lost(prediction, found.var.columns)
        embedding = found.obsm.get(EMBEDDING)
        if embedding is None:
            raise PredictionError(f"{prediction}: keeps no embedding; predict it again with --embeddings")
        require_made_by(engine.path, engine.hash(), found.uns["stpath"], prediction)
        embedding = check_embedding(embedding, f"{prediction}: obsm[{EMBEDDING!r}]", engine.manifest)
        panel = engine.vocabulary.panel(genes)
        ids = np.array(panel.gene_ids)
        kept = _gene_ids(engine, prediction, found.var)
        lacking = ~np.isin(ids, kept)
        added = pd.DataFrame({"gene_ids": ids[lacking]}, index=pd.Index(panel.names, dtype=object)[lacking])
        if len(added) and found.uns["stpath"].get("context_filled"):
            warn(
                f"{prediction}: its context spots hold measured values (--fill-context); those of the added genes are "
                "predicted there, too"
            )
        genes_of = pd.concat([pd.DataFrame({"gene_ids": kept}, index=found.var_names), added])
        frame = AnnData(obs=found.obs, var=genes_of, obsm=dict(found.obsm), uns=dict(found.uns))
        written = Prediction(engine.backend, engine.precision, frame, embedding, panel.tokens[lacking], earlier=x)
        written.write(target, form, dtype, on_tile)
    return frame.n_obs, len(added), found.n_vars


def _gene_ids(engine: Engine, prediction: Path, var: pd.DataFrame) -> list[str]:
    """The Ensembl ids of a prediction's genes; by their names, where joining predictions dropped the ids."""
    if "gene_ids" in var:
        return [str(gene) for gene in var["gene_ids"]]
    tokens = [engine.vocabulary.find(str(name)) for name in var.index]
    if unknown := [name for name, token in zip(var.index, tokens, strict=True) if token is None]:
        raise PredictionError(
            f"{prediction}: var has no gene_ids, and {len(unknown):,} of its names are not known to the engine, the "
            f"first is {unknown[0]!r}; predict it again"
        )
    return engine.vocabulary.gene_ids([token for token in tokens if token is not None])


def _require_nothing_lost(prediction: Path, columns: Iterable[str]) -> None:
    """Refuse to rewrite a file that holds more than stpath wrote, or is of a kind that stpath does not write."""
    with opened(prediction, "a prediction") as source:
        zarr = isinstance(source, ZarrSource)
        if zarr and not prediction.is_dir():
            raise PredictionError(f"{prediction}: an archive, which cannot be rewritten; give --out, a .zarr or .h5ad")
        spatial = zarr and "tables" in source.names()
        at = f"tables/{TABLE}/" if spatial else ""
        held = [f"{group}/{name}" for group in DROPPED for name in source.names(f"{at}{group}")]
        held += [f"{kind}/{name}" for kind in source.names() if spatial for name in source.names(kind)]
    held += [f"var/{column}" for column in columns]
    if more := [name for name in held if name not in OURS]:
        raise PredictionError(
            f"{prediction}: holds what stpath did not write and would not keep ({', '.join(more[:3])}"
            f"{', ...' if len(more) > 3 else ''}); give --out, another file"
        )
