"""Which tiles of a slide image are taken."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError
from ..slides.slide import PUBLISHED_MICRONS

PIECES = "pieces"  # of tissue: sections that no column names


@dataclass(frozen=True)
class TileSettings:
    """Which tiles of an image are taken."""

    mpp: float | None = None  #: um a pixel of level 0; None: as the file says
    pitch: float = float(PUBLISHED_MICRONS)  #: um from one tile to the next
    min_tissue: float = 0.15  #: the share of a tile that has to be tissue
    tissue: str | None = None  #: a file of outlines, or a mask; None: our mask
    spots: str | None = None  #: a file of spots to centre tiles on, instead of a grid
    sections: str | None = None  #: "pieces" of tissue, or a column of obs of the spots; None: one slide

    def check(self) -> None:
        """Check the values, and that they go together.

        Raises
        ------
        InputError
            If they do not.
        """
        if not 1 <= self.pitch <= 10_000:
            raise OptionError(f"--pitch {self.pitch:g}: give um from one tile to the next, from 1 to 10,000")
        if not 0 <= self.min_tissue <= 1:
            raise OptionError(f"--min-tissue {self.min_tissue:g}: give a share of the tile, from 0 to 1")
        if self.spots is not None and self.tissue is not None:
            raise OptionError("--spots and --tissue both say where tiles are taken; give one of them")
        if self.spots is not None and self.sections == PIECES:
            raise OptionError("--sections: with --spots name the column of obs that tells the section of each spot")
        if self.spots is None and self.sections not in (None, PIECES):
            raise OptionError(
                f"--sections {self.sections}: a column of obs, and there is no obs; give --spots with it, or "
                "--sections alone for the pieces of tissue"
            )
