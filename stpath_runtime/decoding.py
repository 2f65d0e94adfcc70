"""Genes added to a prediction, from the embedding that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from .engine import Engine
from .errors import InputError
from .output import Format
from .prediction import EMBEDDING, Prediction
from .progress import OnTile
from .readers import open_prediction


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
    added, in their order. `target` may be the prediction itself.

    Parameters
    ----------
    genes
        Symbols, aliases or Ensembl ids; None means all.

    Returns
    -------
    The numbers of spots, of genes added and of genes kept.

    Raises
    ------
    InputError
        If the prediction has no embedding, is another engine's, or a gene is unknown.
    """
    import pandas as pd
    from anndata import AnnData

    with open_prediction(prediction) as (found, x):
        made_by, embedding = found.uns["stpath"].get("engine"), found.obsm.get(EMBEDDING)
        if embedding is None:
            raise InputError(f"{prediction}: keeps no embedding; predict it again with --embeddings")
        if made_by != engine.hash():
            raise InputError(
                f"{prediction}: predicted by another engine ({str(made_by)[:12]}…, not {engine.path}, "
                f"{engine.hash()[:12]}…); give that one, or predict it again with this one"
            )
        embedding = engine.check_embedding(embedding, f"{prediction}: obsm[{EMBEDDING!r}]")
        names, tokens = engine.panel(genes)
        ids = np.array(engine.vocabulary.gene_ids(tokens))
        lacking = ~np.isin(ids, found.var["gene_ids"])
        added = pd.DataFrame({"gene_ids": ids[lacking]}, index=pd.Index(names, dtype=object)[lacking])
        frame = AnnData(obs=found.obs, var=pd.concat([found.var, added]), obsm=dict(found.obsm), uns=dict(found.uns))
        Prediction(engine, frame, embedding, tokens[lacking], earlier=x).write(target, form, dtype, on_tile)
    return frame.n_obs, len(added), found.n_vars
