"""Engines in LazySlide: its own calls, on any number of tiles.

    zs.tl.feature_extraction(wsi, TileModel("gigapath", name="gigapath"))
    zs.tl.feature_prediction(wsi, STPath("engine", organ="Kidney", genes=["GATA3"]))

Source of the interface: `FeaturePredictionModelProtocol` and `ImageModelProtocol` of lazyslide-models 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..checks import require_stpath
from ..engine import Engine
from ..errors import EncoderError
from ..images.encoder import TileEncoder, Tiles
from ..slides.slide import Slide


class _Model:
    """What LazySlide asks of every model."""

    model: Any
    name: str

    def get_transform(self) -> Callable[[Any], Any] | None:
        """What a tile goes through before the model; None: nothing."""
        return None

    def to(self, device: Any) -> _Model:
        """The same: an engine runs on the device that it was loaded on."""
        return self

    def try_compile(self, **options: Any) -> None:
        """Nothing is to be compiled."""


class STPath(_Model):
    """STPath by an engine, for `zs.tl.feature_prediction`: every tile of the slide in one call, however many.

    Parameters
    ----------
    engine
        An engine, or its folder.
    organ, technology
        Names, as `Slide` takes them; None means Others and unknown.
    genes
        Symbols, aliases or Ensembl ids, each a column of the result; None means all 38,982.
    attention, memory
        As `Engine.predict` takes them.
    features_model_name
        The table of features to take where LazySlide is not told one.

    Raises
    ------
    InputError
        If the engine is at fault, or a gene or name is unknown.
    """

    needs_coords = True
    whole_slide = True

    def __init__(
        self,
        engine: Engine | str | Path,
        *,
        organ: str | None = None,
        technology: str | None = None,
        genes: Sequence[str] | None = None,
        attention: str | None = None,
        memory: int | str | None = None,
        features_model_name: str = "gigapath",
    ) -> None:
        self.model = engine if isinstance(engine, Engine) else Engine.load(engine)
        require_stpath(self.model.path, self.model.manifest, "STPath in LazySlide")
        self.name, self.features_model_name = "stpath", features_model_name
        self._panel = self.model.vocabulary.panel(genes)
        self._all = genes is None
        Slide(np.zeros((1, 2)), np.zeros((1, 1)), organ=organ, technology=technology)  # a wrong name is named at once
        self._organ, self._technology = organ, technology
        self._attention, self._memory = attention, memory

    def predict(self, features: Any, coords: Any = None) -> dict[str, npt.NDArray[np.float32]]:
        """Predicted expression, log1p of raw counts, [N] for each gene.

        Parameters
        ----------
        features, coords
            [N, F] and [N, 2] of all tiles of a slide.

        Raises
        ------
        InputError
            As `Engine.predict`.
        """
        features = features.toarray() if hasattr(features, "toarray") else np.asarray(features)
        slide = Slide(np.asarray(coords), features, organ=self._organ, technology=self._technology, name="wsi")
        embedding = self.model.embed(slide, attention=self._attention, memory=self._memory)
        expression = self.model.decode(embedding, None if self._all else self._panel.gene_ids)
        names = self._panel.gene_ids if self._all else self._panel.names
        return dict(zip(names, np.ascontiguousarray(expression.T), strict=True))


class TileModel(_Model):
    """A tile encoder's engine, for `zs.tl.feature_extraction`.

    Tiles may be larger than the encoder takes (256 pixels): the middle is taken, and nothing is resized, so that 224
    pixels are at the scale that the tiles were cut at.

    Parameters
    ----------
    encoder
        A tile encoder, or its folder.
    name
        What LazySlide calls the features; None: the encoder's name.

    Raises
    ------
    InputError
        If the encoder is at fault.
    """

    def __init__(self, encoder: TileEncoder | str | Path, name: str | None = None) -> None:
        self.model = encoder if isinstance(encoder, TileEncoder) else TileEncoder.load(encoder)
        self.name = name or self.model.name

    def get_transform(self) -> Callable[[Any], Tiles]:
        """The middle of a tile, in whole numbers."""
        return self._middle

    def encode_image(self, image: Any) -> npt.NDArray[np.float32]:
        """Features [n, F] of tiles [n, S, S, 3], as `get_transform` gives them."""
        array = image.cpu().numpy() if hasattr(image, "cpu") else np.asarray(image)
        features: npt.NDArray[np.float32] = self.model(array)
        return features

    def _middle(self, tile: Any) -> Tiles:
        pixels = np.asarray(tile)
        size = self.model.size
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < size:
            raise EncoderError(
                f"a tile is {pixels.dtype} {list(pixels.shape)}; {self.name} takes uint8 [H, W, 3], H and W of {size} "
                "pixels or more"
            )
        top, left = ((side - size) // 2 for side in pixels.shape[:2])
        return np.ascontiguousarray(pixels[top : top + size, left : left + size])
