"""Which tiles are taken: a square grid over tissue, or one at each given spot."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import FileError, ImageError, SlideError
from ..names import delimiter_of
from ..readers import read_spots
from ..slides.slide import first_repeated
from .tissue import Tissue

POSITIONS = (".csv", ".tsv", ".txt")
COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")


@dataclass(frozen=True, eq=False)
class Grid:
    """Tiles of an image, in pixels of level 0."""

    corners: npt.NDArray[np.int64]  #: [N, 2], x and y of the top left
    side: int
    pitch: float  #: from one to the next; 0 where they are at given spots
    names: list[str] | None = None  #: of given spots
    sections: list[str] | None = None  #: the piece of tissue, or section, of each

    @property
    def centres(self) -> npt.NDArray[np.float64]:
        """[N, 2], x and y."""
        middles: npt.NDArray[np.float64] = self.corners.astype(np.float64) + self.side / 2
        return middles

    def __len__(self) -> int:
        return len(self.corners)


def grid_over(tissue: Tissue, side: int, pitch: float, least: float, size: tuple[int, int], sections: bool) -> Grid:
    """A square grid from the tissue's corner: the tiles of which at least a share is tissue, row by row.

    A tile that would reach beyond the image is left out.

    Parameters
    ----------
    side, pitch
        Of tiles, and from one to the next, in pixels of level 0.
    least
        The share of a tile that has to be tissue, from 0 to 1; with 0 any tissue will do.
    size
        Of level 0.
    sections
        Whether each piece of tissue is a section of its own; a tile belongs to the piece that covers most of it.
    """
    columns, rows = (np.flatnonzero(tissue.pieces.any(axis=axis)) for axis in (0, 1))
    left, top = columns[0] * tissue.scale, rows[0] * tissue.scale
    right = min((columns[-1] + 1) * tissue.scale, size[0])
    bottom = min((rows[-1] + 1) * tissue.scale, size[1])
    xs, ys = (np.arange(low, max(high, low + 1), pitch) for low, high in ((left, right), (top, bottom)))
    corners = np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2)  # x runs fastest
    corners = np.floor(corners + 0.5).astype(np.int64)
    covered = _covered(tissue.pieces > 0, corners, side, tissue.scale)
    kept = (covered >= least) & (covered > 0) & (corners + side <= np.array(size)).all(axis=1)
    corners = corners[kept]
    names = None
    if sections:
        pieces = (tissue.pieces[part] for part in _windows(corners, side, tissue.scale))
        names = [f"section {np.bincount(found[found > 0]).argmax()}" for found in pieces]
    return Grid(corners, side, pitch, sections=names)


def _covered(
    mask: npt.NDArray[np.bool_], corners: npt.NDArray[np.int64], side: int, scale: float
) -> npt.NDArray[np.float64]:
    """The share [N] of each tile that a mask covers, by sums over rectangles of its pixels."""
    sums = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), np.int32)
    sums[1:, 1:] = mask
    for axis in (0, 1):
        np.cumsum(sums, axis=axis, out=sums)
    low, high = _spans(corners, side, scale)
    area = (high - low).prod(axis=1)
    (left, top), (right, bottom) = (np.clip(ends, 0, mask.shape[::-1]).T for ends in (low, high))
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    found: npt.NDArray[np.float64] = inside / area
    return found


def _spans(
    corners: npt.NDArray[np.int64], side: int, scale: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The pixels of a mask that each tile covers: from and to, [N, 2], x and y."""
    low = np.floor(corners / scale + 0.5).astype(np.int64)
    return low, np.maximum(np.floor((corners + side) / scale + 0.5).astype(np.int64), low + 1)


def _windows(corners: npt.NDArray[np.int64], side: int, scale: float) -> Iterator[tuple[slice, slice]]:
    """The same as rows and columns, tile by tile."""
    for (left, top), (right, bottom) in zip(*_spans(corners, side, scale), strict=True):
        yield slice(max(0, top), bottom), slice(max(0, left), right)


def grid_at(spots: str | Path, side: int, size: tuple[int, int], sections: str | None, image: Path) -> Grid:
    """Tiles centred on given spots.

    Parameters
    ----------
    spots
        An AnnData with obsm["spatial"], or a positions file of Visium (of its spots those in tissue), in pixels of
        level 0.
    sections
        The column of obs that names the section of each spot; None: they are of one.

    Raises
    ------
    InputError
        If the file is no such file, or a spot is outside of the image.
    """
    spots = Path(spots)
    if not spots.exists():
        raise FileError(f"--spots {spots}: no such file; expected an AnnData or a positions file of Visium")
    named: list[str] | None = None
    if spots.suffix.lower() in POSITIONS:
        if sections is not None:
            raise SlideError(f"--sections {sections}: {spots} has no such column; give an AnnData with it in obs")
        centres, names = _positions(spots)
    else:
        centres, names, named = read_spots(spots, sections)
    if not names:
        raise SlideError(f"--spots {spots}: there are no spots in it")
    if len(set(names)) < len(names):
        raise SlideError(f"--spots {spots}: spot {first_repeated(names)!r} appears twice; make the names distinct")
    outside = np.flatnonzero(((centres < 0) | (centres >= np.array(size))).any(axis=1))
    if len(outside):
        x, y = centres[outside[0]]
        raise ImageError(
            f"--spots {spots}: {len(outside):,} of {len(centres):,} spots are outside of {image} ({size[0]:,} x "
            f"{size[1]:,} pixels), such as {names[outside[0]]} at ({x:,.0f}, {y:,.0f}); give pixels of its level 0"
        )
    corners = np.floor(centres - side / 2 + 0.5).astype(np.int64)
    return Grid(corners, side, 0.0, names=names, sections=named)


def _positions(path: Path) -> tuple[npt.NDArray[np.float64], list[str]]:
    """Centres [N, 2] and barcodes of the spots in tissue of tissue_positions.csv or tissue_positions_list.csv."""
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    lines = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text)) if row]
    head: Sequence[str] = [name.strip() for name in lines[0]] if lines else []
    if "barcode" not in head:  # Space Ranger before 2.0 writes no header
        head = COLUMNS
    elif lines:
        lines = lines[1:]
    if not set(COLUMNS) <= set(head) or not lines:
        raise FileError(f"--spots {path}: not a positions file of Visium; expected the columns {', '.join(COLUMNS)}")
    try:
        rows = [dict(zip(head, line, strict=True)) for line in lines]
        kept = [row for row in rows if int(row["in_tissue"]) == 1]
        centres = np.array([[float(row["pxl_col_in_fullres"]), float(row["pxl_row_in_fullres"])] for row in kept])
    except ValueError as error:
        raise FileError(f"--spots {path}: not a positions file of Visium ({error})") from error
    if not kept:
        raise FileError(f"--spots {path}: no spot is in tissue (in_tissue is 1 for none)")
    return centres, [row["barcode"] for row in kept]
