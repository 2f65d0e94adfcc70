"""How the spots of a slide attend: to all spots or to the nearest, and which keys that gives each tile of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..manifest import ATTENTIONS, ModelConfig
from ..slides.context import ContextRows
from ..slides.slide import Slide
from .backend import Array, Workspace
from .neighbors import Plan, plan_blocks
from .sizes import BLOCK, DTYPES, PAD_KEYS


@dataclass(frozen=True)
class Attention:
    """To which spots a spot attends.

    Parameters
    ----------
    kind
        "global": every spot of the slide; "knn": the nearest.
    neighbors
        With "knn": how many spots, the spot itself included; 0 with "global".

    Examples
    --------
    >>> str(Attention("knn", 32))
    'knn:32'
    """

    kind: str
    neighbors: int = 0

    def __str__(self) -> str:
        return f"{self.kind}:{self.neighbors}" if self.kind == "knn" else self.kind

    @property
    def description(self) -> str:
        """In words, for messages."""
        return f"knn attention to {self.neighbors} spots" if self.kind == "knn" else "global attention"

    @classmethod
    def trained(cls, model: ModelConfig) -> Attention:
        """The attention that a model was trained with."""
        return cls(model.attention, model.neighbors)

    @classmethod
    def choose(cls, attention: str | Attention | None, neighbors: int | None, model: ModelConfig) -> Attention:
        """The attention for these arguments, checked; None and None mean as the model was trained.

        Parameters
        ----------
        attention
            "global", "knn", "knn:K" or an Attention.
        neighbors
            K, where `attention` is "knn" or None.

        Raises
        ------
        InputError
            If the kind is unknown, or the number of neighbours is missing, given twice or below 1.

        Examples
        --------
        >>> Attention.choose("knn:32", None, engine.manifest.model)
        Attention(kind='knn', neighbors=32)
        """
        kind, own = _parts(str(attention)) if attention is not None else (model.attention, None)
        if own is not None and neighbors is not None:
            raise OptionError(f"attention {attention} says how many neighbors: leave out neighbors ({neighbors!r})")
        k = neighbors if neighbors is not None else own
        if kind == "global":
            if k is not None:
                raise OptionError(f"global attention takes no neighbors ({k!r} given); give attention knn:K")
            return cls("global")
        if k is None:
            k = model.neighbors
            if k < 1:
                raise OptionError(
                    "attention knn needs the number of neighbors, such as knn:32: the model was trained globally and "
                    "has none"
                )
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise OptionError(f"neighbors must be a whole number from 1, not {k!r}")
        return cls("knn", int(k))


def _parts(text: str) -> tuple[str, int | None]:
    """The kind, and the number of neighbours where there is one, of "global", "knn" or "knn:K"."""
    match = re.fullmatch(r"(\w+)(?::(\d+))?", text, re.ASCII)
    if match is None or match[1] not in ATTENTIONS:
        raise OptionError(f"unknown attention {text!r}; known: global, knn and knn:K, such as knn:32")
    return match[1], int(match[2]) if match[2] is not None else None


Floats = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots of a slide, or of several one after the other, as the stages take them."""

    name: str  # what messages call them
    features: Floats  # [N, F]
    coords: npt.NDArray[np.float32]  # [N, 2], normalised for each slide on its own
    organ: npt.NDArray[np.int64]  # [N], tokens
    technology: npt.NDArray[np.int64]  # [N], tokens
    context: list[ContextRows]  # positions among all N spots
    of_one_slide: bool = True

    def __len__(self) -> int:
        return len(self.features)

    @property
    def copied_bytes(self) -> int:
        """Bytes of features that are copied from the slides for as long as the encoder runs."""
        return 0 if self.of_one_slide else self.features.nbytes

    @classmethod
    def of(cls, slides: Sequence[Slide], contexts: Sequence[ContextRows | None]) -> Spots:
        """Put slides, and the context of each, one after the other; the features of a single one are not copied."""
        counts = [len(slide) for slide in slides]
        starts = np.cumsum([0, *counts[:-1]])
        return cls(
            name=slides[0].name if len(slides) == 1 else f"{slides[0].name} and {len(slides) - 1} more",
            features=slides[0].features if len(slides) == 1 else np.concatenate([slide.features for slide in slides]),
            coords=np.concatenate([slide.normalized_coords() for slide in slides]).astype(np.float32),
            organ=np.repeat([slide.organ_token for slide in slides], counts),
            technology=np.repeat([slide.technology_token for slide in slides], counts),
            context=[
                ContextRows(rows.spots + start, rows.tokens, rows.log_counts)
                for rows, start in zip(contexts, starts, strict=True)
                if rows is not None and len(rows.spots)
            ],
            of_one_slide=len(slides) == 1,
        )


@dataclass(frozen=True, eq=False)
class Tile:
    """The inputs of a tile beside its x: the same in every layer."""

    rows: slice
    inputs: Mapping[str, Array]  # inputs of the block graphs other than x, k and v
    keys: npt.NDArray[np.int64] | None  # the rows of k and v that the tile is given; None means all


class Keys(Protocol):
    """Which spot each row of x holds, and how a tile of rows gets its keys."""

    graph: str  # the block graphs are named f"{graph}_{layer}"
    rows: int  # R, of x
    keys: int  # rows of k and v: R, plus padding
    unit: int  # tiles are multiples of this many rows
    keys_of_tile: int  # rows of k and v that every tile is given, whatever its size
    keys_of_row: int  # keys that a row of a tile attends to, masked ones included
    planning_bytes: int  # bytes that finding them took: the system may not have all of them back
    kept_bytes: int  # bytes of all tiles' inputs
    row_bytes: int  # what one row of a tile adds to the memory of a block

    def spots(self, rows: slice) -> slice | npt.NDArray[np.int64]:
        """The spots that these rows hold."""
        ...

    def of_spots(self, x: Floats) -> Floats:
        """The rows of x [R, d] in the order of the spots, [N, d]."""
        ...

    def tiles(self, rows: Sequence[slice], workspace: Workspace) -> list[Tile]:
        """The tiles of these rows, with their inputs in the workspace's memory."""
        ...


class AllSpots:
    """Global attention within one slide: rows are spots, and every tile takes all of them as keys.

    Keys are padded to a multiple of 8, which GPU kernels want, and the padding is masked.
    """

    graph = "block"
    unit = PAD_KEYS  # so that a tile's rows begin where memory is aligned

    def __init__(self, spots: Spots, model: ModelConfig, precision: str) -> None:
        self.rows = len(spots)
        self.keys = self.keys_of_row = self.keys_of_tile = -(-self.rows // PAD_KEYS) * PAD_KEYS
        self.planning_bytes = 0
        self.kept_bytes = self.rows * (2 + 3) * 4  # coordinates, as queries and as keys, and their bias
        # In float32: scores, bias and their sum for each head, distances and their parts.
        self.row_bytes = self.keys * (3 * model.n_heads + 4) * 4
        self._coords = spots.coords
        self._key_bias = np.zeros(self.keys, np.float32)
        # Half of the lowest number: a score added to it does not overflow.
        self._key_bias[self.rows :] = float(np.finfo(DTYPES[precision]).min) / 2

    def spots(self, rows: slice) -> slice:
        """The rows, unchanged: they are spots already."""
        return rows

    def of_spots(self, x: Floats) -> Floats:
        """The rows, unchanged: they are spots already."""
        return x

    def tiles(self, rows: Sequence[slice], workspace: Workspace) -> list[Tile]:
        """One tile for each slice, each with all keys."""
        key_coords = np.pad(self._coords, ((0, self.keys - self.rows), (0, 0)))
        shared = {
            "key_coords": workspace.keep("key_coords", key_coords),
            "key_bias": workspace.keep("key_bias", self._key_bias),
        }
        coords = [workspace.keep(f"coords {i}", self._coords[part]) for i, part in enumerate(rows)]
        return [Tile(part, {"coords": own, **shared}, None) for part, own in zip(rows, coords, strict=True)]


class NearestSpots:
    """KNN attention: rows are spots in block order, and a tile takes the rows that its blocks name."""

    graph, unit, keys_of_tile = "knn_block", BLOCK, 0

    def __init__(self, spots: Spots, model: ModelConfig, plan: Plan) -> None:
        self.rows = self.keys = len(plan.spot)
        self.keys_of_row = -(-int(np.diff(plan.key_start).max()) // PAD_KEYS) * PAD_KEYS
        # The mask of each key, and the index of each of a block's keys, among the slide's rows and among the tile's.
        self.kept_bytes = self.rows * (self.keys_of_row * (1 + 8 / BLOCK) + (2 + 3) * 8).__ceil__()
        self.planning_bytes = plan.planning_bytes
        # In float32: scores, bias and their sum, distances and their parts, and a block's keys shared by its rows.
        self.row_bytes = self.keys_of_row * ((3 * model.n_heads + 4) * 4 + 1 + 3 * model.d_model * 4 // BLOCK)
        self._plan = plan
        self._coords = spots.coords[plan.spot]

    def spots(self, rows: slice) -> npt.NDArray[np.int64]:
        """The spot of each row; a row that pads a block holds the last spot, and is nobody's key."""
        return self._plan.spot[rows]

    def of_spots(self, x: Floats) -> Floats:
        """Rows back in the order of the spots."""
        return x[self._plan.row]

    def tiles(self, rows: Sequence[slice], workspace: Workspace) -> list[Tile]:
        """Only the rows of k and v that the tile's blocks name, and which of them each block takes.

        Where the workspace passes all keys at no cost, blocks index into all rows.
        """
        coords, tiles = workspace.keep("coords", self._coords), []
        for i, part in enumerate(rows):
            tile = self._plan.tile(slice(part.start // BLOCK, part.stop // BLOCK))
            keys = None if workspace.takes_all_keys else tile.rows
            index = tile.rows[tile.key_index] if keys is None else tile.key_index
            inputs = {
                "coords": coords[part],
                "key_coords": coords if keys is None else self._coords[keys],
                "key_index": workspace.keep(f"key_index {i}", index),
                "mask": workspace.keep(f"mask {i}", tile.mask),
            }
            tiles.append(Tile(part, inputs, keys))
        return tiles

    def whole(self) -> dict[str, Floats]:
        """Coordinates and keys of all rows, for the fused graph."""
        blocks = self._plan.tile(slice(0, self._plan.blocks))
        return {"coords": self._coords, "key_index": blocks.rows[blocks.key_index], "mask": blocks.mask}


def keys_of(
    slides: Sequence[Slide], spots: Spots, model: ModelConfig, precision: str, attention: Attention
) -> AllSpots | NearestSpots:
    """The keys of slides whose spots are put one after the other; none of another slide is among a spot's."""
    neighbors = attention.neighbors
    if attention.kind == "global":
        if len(slides) == 1:
            return AllSpots(spots, model, precision)
        neighbors = max(len(slide) for slide in slides)  # no more than there are: then kNN is global attention
    return NearestSpots(spots, model, plan_blocks([slide.coords for slide in slides], neighbors))
