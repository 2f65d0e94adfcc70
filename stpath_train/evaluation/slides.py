"""The slides of an evaluation: which they are, what was measured on them, and what a pathologist marked.

N spots of a slide, G genes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stpath_runtime.errors import EvaluationError
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import nearest_names
from stpath_train.store import Store, open_slide

if TYPE_CHECKING:
    from anndata import AnnData

NAMED = 5  # genes that a message names
FEWEST_SPOTS = 3  # of a slide whose spots are correlated


def read_each(store: Store, slides: Sequence[str], on_slide: OnTile | None) -> Iterator[tuple[str, AnnData, Slide]]:
    """Each slide in turn: its name, what was measured on it, and what a model is given of it."""
    for done, name in enumerate(slides):
        adata = store.read(name)
        yield name, adata, store.as_slide(adata, name)
        if on_slide is not None:
            on_slide(done + 1, len(slides))


def require_slides(store: Store, slides: Sequence[str], fewest: int = FEWEST_SPOTS) -> None:
    """Raise InputError where there is no slide, one is not of the store, or has too few spots."""
    if not slides:
        raise EvaluationError(f"{store.path}: no test slide; prepare some, or name them with --slides")
    store.require_slides(slides)
    for slide in slides:
        if store.records[slide].spots < fewest:
            spots = store.records[slide].spots
            raise EvaluationError(f"slide {slide}: {spots} spots, too few to evaluate; give slides of {fewest} or more")


def require_genes(store: Store, slides: Sequence[str], genes: Sequence[str]) -> None:
    """Raise InputError where a gene is unknown, or was not measured on a slide; the message names both."""
    tokens = store.vocabulary.tokens(genes)
    for slide in slides:
        found = np.isin(tokens, open_slide(store, slide).tokens)
        missing = [gene for gene, there in zip(genes, found, strict=True) if not there]
        if missing:
            more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
            raise EvaluationError(
                f"slide {slide}: {len(missing):,} of {len(genes):,} genes were not measured on it: "
                f"{', '.join(missing[:NAMED])}{more}; leave out those genes, or the slide (--slides)"
            )


def measured_expression(store: Store, adata: AnnData, slide: str, genes: Sequence[str]) -> npt.NDArray[np.float32]:
    """The measured expression of genes, log1p of raw counts, [N, G].

    Raises
    ------
    InputError
        If a gene was not measured on the slide.
    """
    require_genes(store, [slide], genes)
    column = {token: i for i, token in enumerate(adata.var["token"])}
    columns = [column[token] for token in store.vocabulary.tokens(genes)]
    measured: npt.NDArray[np.float32] = store.log_counts(adata, slide)[:, columns].toarray()
    return measured


def marks(store: Store, slide: str, column: str) -> npt.NDArray[np.str_]:
    """An obs column of a slide as text, [N]: what a pathologist marked; "" where a spot is not marked.

    Raises
    ------
    InputError
        If the slide has no such column; the message gives the nearest.
    """
    import h5py
    from anndata.io import read_elem

    with h5py.File(store.slide_path(slide), "r") as file:
        obs = read_elem(file["obs"])
    if column not in obs:
        held = f"it has {', '.join(map(str, obs.columns))}" if len(obs.columns) else "it has none"
        raise EvaluationError(
            f"slide {slide}: no obs column {column!r}{nearest_names(column, map(str, obs.columns))}; {held}; name "
            "another (--regions), or the slides that have it (--slides)"
        )
    found: npt.NDArray[np.str_] = obs[column].astype("string").fillna("").to_numpy(str)
    return found


def simulated(store: Store, slides: Sequence[str]) -> bool:
    """Whether any slide's source says that it is simulated."""
    return any("simulated" in store.records[slide].source.casefold() for slide in slides)
