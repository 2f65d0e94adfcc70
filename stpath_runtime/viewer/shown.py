"""A prediction that is looked at: its spots, its genes by name, and the numbers behind them.

With the engine that predicted it, all genes come from the embeddings that the file keeps; without, those that it holds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import check_embedding, require_made_by
from ..encoding.neighbors import usual_distance
from ..engine import Engine
from ..errors import GeneError, PredictionError
from ..images.reading import open_image
from ..results.output import DEVIATION
from ..results.prediction import CONTEXT, EMBEDDING
from ..results.reading import open_prediction
from ..slides.vocabulary import FIRST_GENE_TOKEN, GeneVocabulary, nearest_names
from .head import Head
from .statistics import Embedded
from .stored import Columns
from .tissue import OfPrediction, OfSlide, Tissue

SPREAD = " (std)"  # ends the name of a gene whose standard deviation is shown


@dataclass(frozen=True, eq=False)
class Genes:
    """Genes by their names: symbols, aliases and Ensembl ids."""

    names: Sequence[str]  # [G], to show
    vocabulary: GeneVocabulary  # in the same order
    at: Path  # what messages name

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int:
        """The position of a gene.

        Raises
        ------
        GeneError
            If there is none of this name; the message gives the nearest.
        """
        token = self.vocabulary.find(name)
        if token is None:
            raise GeneError(f"{self.at}: no gene {name!r}{nearest_names(name, self._all)}")
        return token - FIRST_GENE_TOKEN

    def search(self, text: str, limit: int) -> list[str]:
        """Names that begin with the text, then those that hold it, in any case; symbols before aliases before ids."""
        wanted = text.casefold()
        begin: list[str] = []
        hold: list[str] = []
        for name, folded in self._folded:
            if folded.startswith(wanted):
                begin.append(name)
                if len(begin) == limit:
                    return begin
            elif wanted in folded and len(hold) < limit:
                hold.append(name)
        return (begin + hold)[:limit]

    @cached_property
    def _all(self) -> list[str]:
        known = self.vocabulary
        aliases = (alias for names in known.aliases for alias in names)
        return [name for name in dict.fromkeys((*known.symbols, *aliases, *known.ensembl_ids)) if name]

    @cached_property
    def _folded(self) -> list[tuple[str, str]]:
        return [(name, name.casefold()) for name in self._all]


@dataclass(frozen=True, eq=False)
class Shown:
    """A prediction of N spots and the G genes that can be shown."""

    path: Path
    coords: npt.NDArray[np.float32]  # [N, 2], pixels of level 0
    spot_names: Sequence[str]  # [N]
    genes: Genes
    expression: Embedded | Columns
    facts: dict[str, Any]  # the provenance, uns["stpath"]
    context: npt.NDArray[np.bool_] | None  # [N], which spots' expression was measured
    tissue: Tissue | None  # below the spots
    microns_a_pixel: float | None  # of level 0
    deviation: npt.NDArray[np.floating] | None = None  # [N, G], of the samples whose mean the expression is

    def __len__(self) -> int:
        return len(self.coords)

    def values(self, name: str) -> tuple[str, npt.NDArray[np.float32]]:
        """A gene's shown name and its values [N]; of "GENE (std)" the standard deviation of its samples.

        Raises
        ------
        GeneError
            If there is none of this name; the message gives the nearest.
        """
        if self.deviation is not None and name.endswith(SPREAD):
            gene = self.genes.find(name.removesuffix(SPREAD))
            return self.genes.names[gene] + SPREAD, np.asarray(self.deviation[:, gene], np.float32)
        gene = self.genes.find(name)
        return self.genes.names[gene], self.expression.gene(gene)

    def search(self, text: str, limit: int) -> list[str]:
        """What `Genes.search` finds and, of samples, the standard deviation of each."""
        if self.deviation is None:
            return self.genes.search(text, limit)
        found = self.genes.search(text.casefold().removesuffix(SPREAD), limit)
        return [each for name in found for each in (name, name + SPREAD)][:limit]

    @cached_property
    def spot(self) -> dict[str, Any]:
        """How a spot is drawn, in pixels of level 0: its side, the pitch, whether it is round, and where its middle is.

        A file that tells the size of its patches has their corners of the lowest x and y, unless it says otherwise.
        """
        patch = self.facts.get("patch", {})
        side, pitch = patch.get("level0_pixels"), usual_distance(self.coords) or 1.0
        known = isinstance(side, int | float | np.number) and side > 0
        offset = float(side) / 2 if known and not patch.get("centred") else 0.0
        return {
            "side": min(float(side), pitch) if known else 0.9 * pitch,
            "pitch": pitch,
            "round": not known,
            "offset": offset,
        }

    @property
    def decoded(self) -> bool:
        """Whether genes come from embeddings, so that all are there."""
        return isinstance(self.expression, Embedded)

    def require_unchanged(self) -> None:
        """Refuse to go on where the file is another one by now.

        Raises
        ------
        PredictionError
            If it has changed or gone since it was opened.
        """
        if _state(self.path) != self._opened:
            raise PredictionError(f"{self.path}: changed or gone since it was opened; view it again")

    @cached_property
    def _opened(self) -> tuple[int, ...]:
        return _state(self.path)


@contextmanager
def open_shown(path: Path, engine: Engine | None = None, image: Path | None = None) -> Iterator[Shown]:
    """Open a prediction to look at it; its file stays open meanwhile.

    Parameters
    ----------
    engine
        What predicted it, for all genes; None: the genes whose values it holds.
    image
        The slide image, to show below; None: the picture that the prediction keeps, if it does.

    Raises
    ------
    InputError
        If the file is missing, damaged or no prediction, another engine predicted it, a coordinate is not finite, or it
        has neither embeddings for the engine nor genes, or its spots are beyond the image.
    """
    with (
        open_prediction(path, mapped=[EMBEDDING], pictures=image is None, deviations=True) as (frame, x),
        ExitStack() as opened,
    ):
        coords = np.asarray(frame.obsm["spatial"])
        if coords.ndim != 2 or coords.shape[1] != 2 or not np.isfinite(coords.astype(np.float64)).all():
            bad = int((~np.isfinite(coords.astype(np.float64)).all(axis=1)).argmax()) if coords.ndim == 2 else 0
            raise PredictionError(f"{path}: obsm['spatial'] has no two finite numbers at spot {bad}; predict it again")
        embedding, facts = frame.obsm.get(EMBEDDING), dict(frame.uns.get("stpath", {}))
        if engine is not None and embedding is not None:
            require_made_by(engine.path, engine.hash(), facts, path)
            embedding = check_embedding(embedding, f"{path}: obsm[{EMBEDDING!r}]", engine.manifest)
            names = engine.vocabulary.names(engine.vocabulary.all_tokens().tolist())
            genes = Genes(names, engine.vocabulary, engine.path)
            expression: Embedded | Columns = Embedded(embedding, partial(Head.of, engine))
        else:
            genes, expression = _stored_genes(frame.var, path), Columns(x)
        if not len(genes):
            raise PredictionError(f"{path}: holds no gene; give --engine, and predict with --embeddings")
        context = np.asarray(frame.obs[CONTEXT], bool) if CONTEXT in frame.obs else None
        spots = [str(name) for name in frame.obs_names]
        places = coords.astype(np.float32)
        tissue: Tissue | None
        microns: float | None
        if image is not None:
            slide = opened.enter_context(open_image(image))
            tissue, microns = Tissue(OfSlide(slide)), slide.microns_a_pixel
            _require_within(places, tissue.size, path, image)
        else:
            tissue, microns = kept_picture(frame.uns.get("spatial")), _microns(facts.get("patch", {}))
        deviation = frame.layers.get(DEVIATION)
        shown = Shown(path, places, spots, genes, expression, facts, context, tissue, microns, deviation)
        assert shown._opened  # looked at now
        yield shown


def kept_picture(spatial: Any) -> Tissue | None:
    """The picture of the tissue in `uns["spatial"]`, as stpath and readers of Visium keep it; None if there is none."""
    libraries = list(spatial.values()) if isinstance(spatial, dict) else []
    if len(libraries) != 1 or not isinstance(libraries[0], dict):
        return None
    images, scales = libraries[0].get("images", {}), libraries[0].get("scalefactors", {})
    pixels, scale = np.asarray(images.get("hires", ())), scales.get("tissue_hires_scalef")
    if pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not scale or not 0 < float(scale) <= 100:
        return None
    if pixels.dtype.kind == "f":  # scanpy keeps 0 to 1
        pixels = (np.clip(pixels, 0, 1) * 255).round()
    return Tissue(OfPrediction(np.ascontiguousarray(pixels[:, :, :3], np.uint8), 1 / float(scale)))


def _require_within(coords: npt.NDArray[np.float32], size: tuple[int, int], path: Path, image: Path) -> None:
    """Refuse an image that the spots are not of: some stick out of it."""
    outside = int(((coords < 0) | (coords > np.array(size, np.float32))).any(axis=1).sum())
    if outside > len(coords) // 100:
        low, high = coords.min(axis=0), coords.max(axis=0)
        raise PredictionError(
            f"{path}: {outside:,} of {len(coords):,} spots are outside of {image}, which is {size[0]:,} x {size[1]:,} "
            f"pixels (the spots: {low[0]:,.0f} to {high[0]:,.0f} and {low[1]:,.0f} to {high[1]:,.0f}); give the image "
            "that they were predicted from, at its full size"
        )


def _microns(patch: dict[str, Any]) -> float | None:
    """Um a pixel of level 0, from what is known of the patches."""
    try:
        pixels, magnification, of_level0 = (float(patch[name]) for name in ("pixels", "magnification", "level0_pixels"))
    except (KeyError, TypeError, ValueError):
        return None
    return pixels * 10 / magnification / of_level0 if min(pixels, magnification, of_level0) > 0 else None


def _stored_genes(var: Any, path: Path) -> Genes:
    """The genes of a file: by the names of its columns, and by Ensembl ids where it has them."""
    names = [str(name) for name in var.index]
    ids = [str(gene) for gene in var["gene_ids"]] if "gene_ids" in var else names
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise PredictionError(f"{path}: genes of the same name ({', '.join(repeated[:3])}); make them unique first")
    if len(set(ids)) != len(ids):
        ids = names
    return Genes(names, GeneVocabulary(ids, names, [()] * len(names)), path)


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file does; of a zarr store, its folder's."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    return stat.st_size, stat.st_ino, stat.st_mtime_ns
