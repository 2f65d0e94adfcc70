"""From an image's features to the slide that STPath takes, and to the tissue that a prediction is drawn over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, warn
from ..readers import read_slide
from ..results.targets import slide_name
from ..slides.slide import Slide
from .encoder import Encoder
from .features import FeaturesJob, extract
from .picture import spatial_of
from .reading import is_image, open_image
from .settings import TileSettings
from .sources import is_patches
from .tissue import overview_of

FEATURES_ENDING = ".features.h5"
OnBatch = Callable[[FeaturesJob, int, int], None]


def needs_encoder(path: str | Path) -> bool:
    """Whether a file is a slide image or holds patches, of which features are to be made."""
    return is_image(path) or is_patches(Path(path))


def features_job(source: Path, result: Path, settings: TileSettings) -> FeaturesJob:
    """The job that makes the features of an image, kept beside its result."""
    return FeaturesJob(source, result.with_name(result.name.rsplit(".", 1)[0] + FEATURES_ENDING), settings)


class ImageSlides:
    """Slides of images in the order of the jobs; while one is used, the tiles of the next are read.

    Parameters
    ----------
    jobs
        Of `features_job`.
    """

    def __init__(self, jobs: Iterable[FeaturesJob], encoder: Encoder) -> None:
        self._tell: OnBatch | None = None
        self._stopping = False
        self._found = extract(jobs, encoder, on_batch=self._on_batch)

    def next(
        self, organ: str | None, technology: str | None, on_batch: OnBatch | None = None
    ) -> tuple[Slide, dict[str, Any]]:
        """The slide of the next image, and `uns["spatial"]` of its prediction, empty of patches.

        Its coordinates are the centres of its tiles, in pixels of level 0.

        Parameters
        ----------
        on_batch
            Called with the job, the number of its tiles that are done, and in all.

        Raises
        ------
        InputError
            If its features cannot be made, or the file of them is at fault.
        """
        self._tell = on_batch
        made = next(self._found)
        for warning in made.warnings:
            warn(warning)
        if made.error is not None:
            raise made.error
        source, settings = made.job.source, made.job.settings
        slide = read_slide(made.job.target, organ=organ, technology=technology)
        patch = slide.patch
        if not is_image(source) or patch is None or patch.level0_pixels is None:
            return slide, {}
        centres = np.asarray(slide.coords, np.float64) + patch.level0_pixels / 2
        slide = replace(slide, coords=centres, patch=replace(patch, centred=True), name=str(source))
        with open_image(source, settings.mpp) as image:
            overview = made.view.overview if made.view is not None else overview_of(image)
            spatial = spatial_of(overview, float(patch.level0_pixels), image.microns_a_pixel)
        return slide, {slide_name(source): spatial}

    def stop(self) -> None:
        """Let `next`, where another thread is in it, end after its batch; to be called before `close`."""
        self._stopping = True

    def close(self) -> None:
        """Stop reading ahead."""
        self._found.close()

    def _on_batch(self, job: FeaturesJob, done: int, total: int) -> None:
        if self._stopping:
            raise InterruptedError(f"{job.source}: stopped after {done:,} of {total:,} tiles")
        if self._tell is not None:
            self._tell(job, done, total)


def require_encoder(slides: Sequence[str | Path], encoder: str | None, settings: TileSettings) -> list[bool]:
    """Which of the slides need an encoder; checks that one is given where they do, and options of images only there.

    Raises
    ------
    InputError
        If the encoder is missing, or it or options of images are given for nothing.
    """
    needed = [needs_encoder(path) for path in slides]
    if any(needed):
        if encoder is None:
            path = slides[needed.index(True)]
            raise OptionError(
                f"{path}: a slide image or patches, and no features; give the tile encoder with --encoder"
            )
        return needed
    if encoder is not None:
        raise OptionError(f"--encoder {encoder}: there is no slide image and no patches file among the slides")
    for name, value in asdict(settings).items():
        if name != "sections" and value != getattr(TileSettings(), name):
            raise OptionError(
                f"--{name.replace('_', '-')} {value}: of slide images, and there is none among the slides"
            )
    return needed
