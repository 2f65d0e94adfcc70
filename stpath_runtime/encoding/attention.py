"""How the spots of a slide attend: to all spots, or to the nearest."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..errors import OptionError
from ..manifest import ATTENTIONS, ModelConfig


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
