"""What features are made of: the tiles of a slide image, or the patches that HEST has cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..errors import EncoderError, FileError, ImageError, InputError
from ..readers import BARCODES
from ..slides.slide import PUBLISHED_MICRONS
from .encoder import Encoder, Tiles
from .grid import Grid, grid_at, grid_over
from .reading import SlideImage, is_image, open_image
from .settings import PIECES, TileSettings
from .tiles import TileReader
from .tissue import Overview, Tissue, find_tissue, overview_of, read_tissue

TARGET_MAGNIFICATION = 10.0  # over um a pixel: what microscopes call 20x is 0.5 um a pixel


@dataclass(frozen=True, eq=False)
class View:
    """An image as people look at it: small, with its tissue and the tiles that were taken."""

    overview: Overview
    tissue: Tissue | None  #: None where tiles are at given spots
    grid: Grid


class TileSource(Protocol):
    """Tiles of one slide by number, and what a file of their features holds beside them."""

    path: Path
    total: int
    view: View | None

    def read(self, start: int, stop: int) -> Tiles:
        """Tiles [n, S, S, 3] from one number to another."""
        ...

    def write(self, file: Any) -> str:
        """Write all but the features to an HDF5 file; returns the name that the features are to have."""
        ...


def identity(path: Path, settings: TileSettings) -> str:
    """What a file's tiles depend on: it and the files of its settings by name, size and time, and the settings."""
    if not is_image(path):
        return json.dumps(_version(path))
    files = {name: _version(Path(value)) for name in ("tissue", "spots") if (value := getattr(settings, name))}
    return json.dumps({"image": _version(path), **asdict(settings), **files})


@contextmanager
def open_source(path: Path, encoder: Encoder, settings: TileSettings) -> Iterator[TileSource]:
    """Open a slide image or a patches file, and choose its tiles.

    Raises
    ------
    InputError
        If it cannot be read, shows no tissue, or its tiles are not what the encoder takes.
    """
    if not is_image(path):
        with _open_patches(path, encoder) as source:
            yield source
        return
    settings.check()
    with open_image(path, settings.mpp) as image:
        yield ImageTiles(image, encoder, settings)


class ImageTiles:
    """The tiles of an open slide image."""

    def __init__(self, image: SlideImage, encoder: Encoder, settings: TileSettings) -> None:
        self.path, self._image = image.path, image
        self._microns = encoder.microns or float(PUBLISHED_MICRONS)
        self._reader = TileReader.of(image, self._microns, encoder.size)
        self.view: View | None
        self.view = view = _view(image, self._reader.side, settings)
        self.grid, self.total = view.grid, len(view.grid)

    def read(self, start: int, stop: int) -> Tiles:
        """As `TileSource.read`; an error names the tile."""
        tiles = np.empty((stop - start, self._reader.size, self._reader.size, 3), np.uint8)
        for number in range(start, stop):
            x, y = self.grid.corners[number].tolist()
            try:
                tiles[number - start] = self._reader.read(x, y)
            except InputError as error:
                raise ImageError(f"{error} (tile {number + 1:,} of {self.total:,}, at ({x:,}, {y:,}))") from error
        return tiles

    def write(self, file: Any) -> str:
        """As TRIDENT writes them: the corners as `coords`, with attributes that tell the scale."""
        grid, microns_a_pixel = self.grid, self._image.microns_a_pixel
        file["coords"] = grid.corners
        size = self._reader.size
        wanted = self._microns / size
        file["coords"].attrs.update(
            {
                "patch_size": size,
                "patch_size_level0": grid.side,
                "level0_magnification": TARGET_MAGNIFICATION / microns_a_pixel,
                "target_magnification": TARGET_MAGNIFICATION / wanted,
                "overlap": max(0, round((grid.side - grid.pitch) * microns_a_pixel / wanted)) if grid.pitch else 0,
                "name": self.path.name.rsplit(".", 1)[0],
                "level0_width": self._image.levels[0].size[0],
                "level0_height": self._image.levels[0].size[1],
                "microns_a_pixel": microns_a_pixel,
            }
        )
        for name, values in (("barcodes", grid.names), ("section", grid.sections)):
            if values is not None:
                file[name] = np.array([value.encode() for value in values])
        return "features"


class _PatchTiles:
    """The centres of the patches of a file of HEST."""

    view: View | None = None

    def __init__(self, path: Path, file: Any, size: int) -> None:
        self.path, self._file, self._size, self.total = path, file, size, len(file["img"])

    def read(self, start: int, stop: int) -> Tiles:
        images = self._file["img"]
        top, left = (round((side - self._size) / 2) for side in images.shape[1:3])
        try:
            tiles: Tiles = images[start:stop, top : top + self._size, left : left + self._size]
        except OSError as error:
            raise FileError(
                f"{self.path}: patches {start} to {stop} cannot be read ({error}); download it again"
            ) from error
        return tiles

    def write(self, file: Any) -> str:
        file["coords"] = self._file["coords"][()]
        for name in BARCODES:
            if name in self._file and "barcodes" not in file:
                file["barcodes"] = self._file[name][()]
        return "embeddings"


@contextmanager
def _open_patches(path: Path, encoder: Encoder) -> Iterator[_PatchTiles]:
    import h5py

    check_patches(path, encoder.size)
    if encoder.microns is not None and encoder.microns != PUBLISHED_MICRONS:
        raise EncoderError(
            f"{path}: patches of HEST show {PUBLISHED_MICRONS} um, and {encoder.name} takes tiles of "
            f"{encoder.microns:g} um"
        )
    with h5py.File(path, "r") as file:
        yield _PatchTiles(path, file, encoder.size)


def check_patches(path: Path, size: int) -> int:
    """The number of patches in a patches file of HEST: `img` uint8 [N, H, W, 3], `coords`, and perhaps `barcode`.

    Raises
    ------
    InputError
        If it is missing, damaged or no patches file, or its patches are smaller than the encoder takes.
    """
    import h5py

    if not path.is_file():
        what = "a folder, not a" if path.is_dir() else "no such"
        raise FileError(f"{path}: {what} patches file or slide image")
    if not h5py.is_hdf5(path):
        raise FileError(
            f"{path}: neither a slide image by its name (such as .svs, .ndpi or .tiff) nor a patches file, which is "
            f"HDF5"
        )
    try:
        with h5py.File(path, "r") as file:
            if "img" not in file or "coords" not in file:
                held = ", ".join(sorted(file)) or "nothing"
                raise FileError(f"{path}: not a patches file; expected datasets 'img' and 'coords', found: {held}")
            images, rows = file["img"], {name: len(file[name]) for name in ("coords", *BARCODES) if name in file}
            shape, dtype = images.shape, images.dtype
    except (OSError, TypeError, AttributeError) as error:
        raise FileError(f"{path}: cannot be read as HDF5 ({error}); download it again") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < size or shape[0] == 0:
        raise FileError(
            f"{path}: img is {dtype} {list(shape)}; expected uint8 [N, H, W, 3], H and W of {size} pixels or more"
        )
    for name, count in rows.items():
        if count != shape[0]:
            raise FileError(f"{path}: {shape[0]:,} images but {count:,} rows of {name!r}; download it again")
    return int(shape[0])


def is_patches(path: Path) -> bool:
    """Whether a file holds patches, as HEST's do."""
    import h5py

    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return "img" in file


def _view(image: SlideImage, side: int, settings: TileSettings) -> View:
    overview, size, microns = overview_of(image), image.levels[0].size, image.microns_a_pixel
    if settings.spots is not None:
        return View(overview, None, grid_at(settings.spots, side, size, settings.sections, image.path))
    tissue = (
        read_tissue(settings.tissue, overview, microns)
        if settings.tissue is not None
        else find_tissue(overview, microns)
    )
    if not tissue.count:
        raise ImageError(
            f"{image.path}: no tissue in it by its colours (the mask is of the saturation); say where it is with "
            "--tissue, GeoJSON or a mask"
        )
    grid = grid_over(tissue, side, settings.pitch / microns, settings.min_tissue, size, settings.sections == PIECES)
    if not len(grid):
        raise ImageError(
            f"{image.path}: no tile of {side * microns:.0f} um is tissue by {settings.min_tissue:.0%} or more; lower "
            "--min-tissue, or say where the tissue is with --tissue"
        )
    return View(overview, tissue, grid)


def _version(path: Path) -> Sequence[Any]:
    stat = path.stat() if path.exists() else None
    return [path.name, stat.st_size, stat.st_mtime_ns] if stat else [path.name]
