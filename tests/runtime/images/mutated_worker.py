"""Reads mutated slide images, a line before and after each, so that its parent can tell which one it died of.

    python mutated_worker.py ORIGINALS SCRATCH FIRST STEP LAST

A case is all in its number: the original, the mutation and its places.
"""

from __future__ import annotations

import faulthandler
import random
import sys
import warnings
from pathlib import Path

from stpath_runtime.errors import InputError
from stpath_runtime.images.encoder import noise
from stpath_runtime.images.settings import TileSettings
from stpath_runtime.images.sources import open_source

HEADER = 4_096  # bytes, where most of what a file says of itself stands; of TIFF as much at its end


class Eight:
    """An encoder that takes tiles and makes nothing of them."""

    name, size, width, microns, about = "none", 224, 8, 112.0, {}

    def batch(self) -> int:
        return 8

    def __call__(self, tiles):
        return noise(len(tiles), 8)


def mutated(content: bytes, number: int) -> bytes:
    rng, data = random.Random(number), bytearray(content)
    kind = number % 5
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:  # bits of anything
        for _ in range(rng.choice((1, 10, 200))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:  # of the header
        for _ in range(rng.choice((1, 3, 20))):
            at = rng.randrange(min(HEADER, len(data)))
            data[at if rng.random() < 0.5 else len(data) - 1 - at] = rng.randrange(256)
    elif kind == 3:  # a stretch of nothing
        start = rng.randrange(len(data))
        data[start : start + rng.choice((16, 4_096, len(data)))] = bytes(len(data[start : start + 4_096]))
    else:  # a stretch that is elsewhere
        start, other, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((4, 64, 2_048))
        data[start : start + length] = data[other : other + length]
    return bytes(data)


def main(originals: Path, scratch: Path, first: int, step: int, last: int) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    found = sorted(originals.iterdir())
    for number in range(first, last, step):
        original = found[number % len(found)]
        path = scratch / f"{number}{original.suffix}"
        path.write_bytes(mutated(original.read_bytes(), number))
        print(number, original.name, flush=True)  # noqa: T201
        settings = TileSettings(mpp=0.5 if original.suffix == ".png" else None)
        try:
            with open_source(path, Eight(), settings) as source:
                for start in range(0, min(source.total, 24), 8):
                    source.read(start, min(start + 8, source.total))
            outcome = "read"
        except InputError as error:
            outcome = "refused" if "\n" not in str(error).strip() else "refused in several lines"
        path.unlink()
        print(number, outcome, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
