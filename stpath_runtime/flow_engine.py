"""An STFlow engine, loaded: slides in, samples of their expression out, and how far they spread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from .checks import check_slide
from .engine import Engine
from .errors import EngineError, OptionError
from .machine import parse_bytes
from .manifest import FlowManifest
from .progress import OnTile
from .results.output import DEVIATION
from .results.prediction import Sampled, new_frame, provenance
from .slides.context import Context, ContextRows
from .slides.slide import Slide, by_section
from .stflow.geometry import Neighborhoods, checked_neighbors
from .stflow.sampler import sample
from .stflow.starts import checked_start, draw_start

if TYPE_CHECKING:
    from anndata import AnnData

Floats = npt.NDArray[np.float32]


class FlowEngine(Engine, manifest=FlowManifest):
    """Samples gene expression with an STFlow engine; `Engine.load` gives one where the folder is of that model.

    Examples
    --------
    >>> adata = Engine.load(flow_path).predict(flow_slide, samples=4)
    >>> adata.X.shape == adata.layers["std"].shape == (9, 50)
    True
    """

    manifest: FlowManifest  # type: ignore[assignment]  # of the other model

    def predict(  # type: ignore[override]  # another model is asked for other things
        self,
        slide: Slide,
        *,
        genes: Sequence[str] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
        start: npt.NDArray[Any] | None = None,
        neighbor_index: npt.NDArray[Any] | None = None,
        memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> AnnData:
        """A sample of a slide's expression, or the mean of several and their standard deviation.

        Parameters
        ----------
        genes
            Names of the model's genes; each is given once, in this order. None means all.
        steps
            Points of the time grid, from 2; the model is evaluated once less often. None means as it was trained, 5 as
            published.
        seed
            Of the starts, from 0; None means 0. A sample's start depends on it and on the sample's number alone, so
            that the first of many is the only one of another call.
        samples
            How many; None means 1.
        start
            The state to begin with, instead of a drawn one: log1p of counts, [N, G] in the order of the model's genes,
            or [samples, N, G].
        neighbor_index
            [N, min(k, N)], the neighbours of each spot, instead of the nearest others.
        memory
            What this may take beyond the features, in bytes or as text such as "8G"; None means half of what the
            device has available. The result does not depend on it.
        on_tile
            Called with (done, total) as the work goes on.

        Returns
        -------
        AnnData
            N spots: X float32, log1p of raw counts, and it may be negative; of several samples their mean, with their
            standard deviation (n - 1) in `layers["std"]`; obs_names the barcodes; `obsm["spatial"]` the coordinates;
            `uns["stpath"]` the provenance, in which `degenerate_frames` and `tied_neighbors` count the spots where a
            turned slide may give another result.

        Raises
        ------
        InputError
            If the features are not as wide as the engine expects, a gene is unknown, the steps are below 2 or the
            samples below 1, the seed is below 0, start or neighbours are of another shape, hold what is no number or
            are outside the slide, or the memory is too small for one tile.

        Examples
        --------
        >>> adata = flow_engine.predict(flow_slide, seed=7, samples=4)
        >>> adata.layers["std"].shape == adata.X.shape
        True
        """
        (prediction,) = self.predict_many(
            [slide],
            genes=genes,
            steps=steps,
            seed=seed,
            samples=samples,
            memory=memory,
            start=start,
            neighbor_index=neighbor_index,
            on_tile=on_tile,
        )
        return prediction.to_anndata()

    def predict_many(  # type: ignore[override]  # another model is asked for other things
        self,
        slides: Sequence[Slide],
        contexts: Sequence[Context | ContextRows | None] | None = None,
        *,
        genes: Sequence[str] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
        start: npt.NDArray[Any] | None = None,
        neighbor_index: npt.NDArray[Any] | None = None,
        memory: int | str | None = None,
        on_tile: OnTile | None = None,
    ) -> list[Sampled]:
        """Sample slides, one after the other; the parameters are those of `predict`, start and neighbours of one slide.

        Raises
        ------
        InputError
            What `predict` raises, and if a context is given: this model takes none.

        Examples
        --------
        >>> first, second = flow_engine.predict_many([flow_slide, flow_slide], genes=flow_engine.vocabulary.symbols[:2])
        >>> second.to_anndata().n_vars
        2
        """
        self.check_context(contexts is not None and any(context is not None for context in contexts))
        if len(slides) != 1 and not (start is None and neighbor_index is None):
            raise OptionError("start and neighbor_index are of one slide; predict each on its own")
        panel = self.vocabulary.panel(genes)
        chosen = self.options(steps=steps, seed=seed, samples=samples)
        size = parse_bytes(memory) if memory is not None else None
        for slide in slides:
            check_slide(slide, self.manifest)
        predictions = []
        for slide in slides:
            work = _Work(self, slide, chosen, start, neighbor_index)
            mean, deviation, facts = work.run(size, on_tile)
            columns = panel.tokens - 2
            frame = new_frame(slide, panel.names, panel.gene_ids, facts, None)
            if deviation is not None:
                frame.layers[DEVIATION] = deviation[:, columns]
            predictions.append(Sampled(frame, mean[:, columns]))
        return predictions

    def options(
        self,
        *,
        attention: object = None,
        neighbors: int | None = None,
        embeddings: bool | None = None,
        fill_context: bool = False,
        steps: int | None = None,
        seed: int | None = None,
        samples: int | None = None,
    ) -> dict[str, Any]:
        """The keywords of `predict_many` for what commands take for either model, checked.

        Raises
        ------
        InputError
            If one is of the other model, or out of range; the message names it.

        Examples
        --------
        >>> flow_engine.options(samples=16)
        {'steps': 5, 'seed': 0, 'samples': 16}
        """
        given = {"attention": attention, "neighbors": neighbors, "embeddings": embeddings, "fill_context": fill_context}
        asked = {name: value for name, value in given.items() if value is not None and value is not False}
        self._refuse(asked, "STPath", "STFlow")
        chosen = {
            "steps": self.manifest.model.steps if steps is None else steps,
            "seed": 0 if seed is None else seed,
            "samples": 1 if samples is None else samples,
        }
        for (name, value), least in zip(chosen.items(), (2, 0, 1), strict=True):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise OptionError(f"{name} must be a whole number from {least}, not {value!r}")
        return {name: int(value) for name, value in chosen.items()}

    def check_context(self, given: bool) -> None:
        """Refuse a context.

        Raises
        ------
        InputError
            If one is given.

        Examples
        --------
        >>> flow_engine.check_context(given=False)
        """
        if given:
            raise OptionError(f"context: of STPath engines; {self.path} is an STFlow engine, which takes none")

    def embed(self, *given: Any, **options: Any) -> NoReturn:
        """Not of this model.

        Raises
        ------
        InputError
            Always.

        Examples
        --------
        >>> flow_engine.embed(flow_slide)
        Traceback (most recent call last):
        ...
        stpath_runtime.errors.EngineError: ...: an STFlow engine, which has no embeddings, and no attention to choose
        """
        raise EngineError(f"{self.path}: an STFlow engine, which has no embeddings, and no attention to choose")

    decode = attention = embed


class _Work:
    """One slide, to be sampled."""

    def __init__(
        self,
        engine: FlowEngine,
        slide: Slide,
        chosen: dict[str, int],
        start: npt.NDArray[Any] | None,
        neighbor_index: npt.NDArray[Any] | None,
    ) -> None:
        self.engine, self.slide, self.chosen, self.model = engine, slide, chosen, engine.manifest.model
        n, genes = len(slide), self.model.n_genes
        self.start = checked_start(start, n, genes, chosen["samples"]) if start is not None else None
        self.neighbor_index = neighbor_index
        if neighbor_index is not None:
            if slide.sections is not None:
                raise OptionError("neighbor_index is of a slide without sections; predict each section on its own")
            self.neighbor_index = checked_neighbors(neighbor_index, n, self.model.neighbors)

    def run(self, memory: int | None, on_tile: OnTile | None) -> tuple[Floats, Floats | None, dict[str, Any]]:
        """Mean [N, G], standard deviation where there are several samples, and provenance."""
        n, genes, samples = len(self.slide), self.model.n_genes, self.chosen["samples"]
        mean = np.empty((n, genes), np.float32)
        deviation = np.empty((n, genes), np.float32) if samples > 1 else None
        degenerate = tied = 0
        sections = list(by_section(self.slide)) if self.slide.sections is not None else [(np.arange(n), self.slide)]
        for rows, section in sections:
            around = Neighborhoods.of(section.coords, self.model.neighbors, self.neighbor_index)
            found = sample(
                self.engine.backend,
                self.model,
                self.engine.precision,
                section.features,
                around,
                section.coords,
                partial(self._start, rows),
                samples,
                self.chosen["steps"],
                self.slide.name,
                memory,
                on_tile=on_tile,
            )
            mean[rows], spread = _moments(found)
            if deviation is not None:
                deviation[rows] = spread
            degenerate, tied = degenerate + around.degenerate, tied + around.tied
        engine, given = self.engine, self.start is not None
        facts = provenance(self.slide, engine.hash(), engine.manifest, engine.backend, engine.precision)
        facts |= {"model": engine.manifest.family, "variant": engine.manifest.variant, **self.chosen}
        facts |= {"start": "given" if given else self.model.start, "neighbors": self.model.neighbors}
        facts |= {"neighbors_given": self.neighbor_index is not None}
        return mean, deviation, facts | {"degenerate_frames": degenerate, "tied_neighbors": tied}

    def _start(self, rows: npt.NDArray[np.int64], number: int) -> Floats:
        """The start of a sample, at these spots."""
        if self.start is None:
            return draw_start(self.model, len(self.slide), self.chosen["seed"], number)[rows]
        start: Floats = self.start[number]
        return start[rows]


def _moments(samples: Iterator[Floats]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation (n - 1; 0 of one) of samples [N, G], which are not kept (Welford)."""
    mean = np.array(next(samples), np.float64)
    squares, n = np.zeros_like(mean), 1
    for n, each in enumerate(samples, 2):
        change = each - mean
        mean += change / n
        squares += change * (each - mean)
    return mean, np.sqrt(squares / max(1, n - 1))
