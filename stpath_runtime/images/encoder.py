"""The tile encoder as an engine: tiles in, features out, in batches that suit the machine."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..backends import open_backend
from ..encoding.backend import Backend
from ..errors import BackendError, EncoderError, MemoryLimitError, OptionError, OutputError
from ..files import sha256, written_whole
from ..machine import available_on_host, cores, cpu_name
from ..manifest import ENCODER_GRAPH, ENCODER_MANIFEST, EncoderManifest

Tiles = npt.NDArray[np.uint8]  # [n, S, S, 3], RGB
Features = npt.NDArray[np.float32]  # [n, F]

MOST_TILES = 256  # of a batch, as TensorRT's plans take
SECONDS = 20.0  # of measuring, at most, beyond the batch that is being measured
GAIN = 1.05  # what the next size has to bring for larger ones to be tried
NEAR = 0.97  # of the best throughput: the smallest size that reaches it is taken
CONFIG = "config.json"  # of a model as the Hub has it
HUB_PREFIXES = ("hf-hub:", "hf_hub:")  # of the names that it has there
PLUGINS = "stpath.encoders"  # entry points of what loads encoders by name
BATCHES = "cache/batches.json"  # what was measured, in the encoder's folder


class Encoder(Protocol):
    """Anything that makes features of tiles: an engine, or timm's module in PyTorch."""

    name: str
    size: int  #: pixels of a side of the tiles that it takes
    width: int  #: F
    microns: float | None  #: of a side of the tissue that a tile shows, as it wants it; None: not known
    about: dict[str, str]  #: what a file of features says of how they were computed

    def batch(self) -> int:
        """Tiles at once."""
        ...

    def __call__(self, tiles: Tiles) -> Features:
        """Features [n, F] of tiles [n, S, S, 3]."""
        ...


class TileEncoder:
    """Runs a tile encoder's folder; make one with `TileEncoder.load`.

    Examples
    --------
    >>> with TileEncoder.load(encoder_path) as encoder:
    ...     features = encoder(np.zeros((2, encoder.size, encoder.size, 3), np.uint8))
    >>> features.shape == (2, encoder.width)
    True
    """

    def __init__(self, path: Path, manifest: EncoderManifest, backend: Backend, precision: str) -> None:
        self.path, self.manifest, self.backend, self.precision = path, manifest, backend, precision
        self.name, self.size, self.width = manifest.encoder, manifest.size, manifest.width
        self.microns: float | None = manifest.wanted.microns
        self._batch = 0
        self.about = {
            "encoder": manifest.encoder,
            "weights": f"sha256 {manifest.weights['sha256']}",
            "engine": sha256(path / ENCODER_MANIFEST),
            "preprocessing": f"{manifest.size} pixels, mean {_shown(manifest.mean)}, std {_shown(manifest.std)}",
            "precision": precision,
            "backend": f"{backend.name} on {backend.device.partition(':')[0]}",
        }

    def __repr__(self) -> str:
        return f"TileEncoder({str(self.path)!r}, {self.precision}, {self.backend.name} on {self.backend.device})"

    @classmethod
    def load(
        cls, path: str | Path, *, backend: str = "onnxruntime", device: str = "cpu", precision: str | None = None
    ) -> TileEncoder:
        """Load an encoder's folder, and check its manifest and the hash of every file.

        Parameters
        ----------
        backend, device, precision
            As `Engine.load` takes them.

        Raises
        ------
        InputError
            If the encoder is missing, damaged or newer than this package, the backend or device is not there, or it
            lacks the precision.
        """
        path = Path(path)
        manifest = EncoderManifest.read(path)
        manifest.check_files(path, afresh=False)
        opened = open_backend(backend, path, device, manifest.precision, precision)
        return cls(path, manifest, opened, precision or manifest.precision)

    def __call__(self, tiles: Tiles) -> Features:
        """Features of RGB tiles.

        Parameters
        ----------
        tiles
            uint8 [n, S, S, 3], S the encoder's size, each showing as much tissue as the manifest's `wanted` says.

        Returns
        -------
        array
            float32 [n, F].

        Raises
        ------
        InputError
            If the tiles have another shape or type, or what the backend gives is not finite.
        """
        tiles = np.asarray(tiles)
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[1:] != (self.size, self.size, 3):
            raise EncoderError(
                f"tiles are {tiles.dtype} {list(tiles.shape)}; {self.name} takes uint8 [n, {self.size}, {self.size}, 3]"
            )
        step = self._most()
        rows = [self._run(tiles[start : start + step]) for start in range(0, len(tiles), step)]
        features = np.concatenate(rows) if rows else np.empty((0, self.width), np.float32)
        if not np.isfinite(features).all():
            raise BackendError(f"{self!r}: gives numbers that are not finite; check it with stpath doctor {self.path}")
        return features

    def batch(self) -> int:
        """Tiles at once: what memory allows, and the smallest number that is as fast as larger ones, as measured here.

        It is measured once on a machine, and kept in the encoder's folder where that can be written.
        """
        if not self._batch:
            key, found = self._key(), self._kept()
            if key not in found:
                found[key] = self._measured()
                with suppress(OSError, OutputError), written_whole(self.path / BATCHES) as partial:
                    partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            self._batch = min(found[key], self._most())
        return self._batch

    def close(self) -> None:
        """Free what the encoder holds on its device; it cannot run afterwards."""
        self.backend.close()

    def __enter__(self) -> TileEncoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, tiles: Tiles) -> Features:
        (features,) = self.backend.run(ENCODER_GRAPH, {"tiles": np.ascontiguousarray(tiles)})
        return np.asarray(features, np.float32)

    def _most(self) -> int:
        """Tiles that a third of the free memory holds."""
        free = min(self.backend.available_memory(), available_on_host())
        most = free // (3 * 4 * self.manifest.activations)
        if most < 1:
            raise MemoryLimitError(
                f"{self.name}: one tile takes about {4 * self.manifest.activations / 2**20:,.0f} MiB, a third of what "
                f"is free at most; there are {free / 2**20:,.0f} MiB free: close other programs"
            )
        return int(min(most, MOST_TILES))

    def _measured(self) -> int:
        """Run growing batches until they bring nothing, time is up, or memory does not hold more."""
        most, seconds = self._most(), {}
        self._run(noise(1, self.size))  # loads the graph
        start = time.perf_counter()
        size = 1
        while size <= most:
            tiles = noise(size, self.size)
            tick = time.perf_counter()
            self._run(tiles)
            seconds[size] = (time.perf_counter() - tick) / size
            worse = size > 1 and seconds[size // 2] < GAIN * seconds[size]
            if (worse and size > 2) or time.perf_counter() - start > SECONDS:
                break
            size *= 2
        best = min(seconds.values())
        return min(size for size, each in seconds.items() if each * NEAR <= best)

    def _key(self) -> str:
        """What a measurement holds for."""
        facts = (cpu_name(), cores(), self.backend.name, self.backend.device, self.precision, self.about["engine"])
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _kept(self) -> dict[str, int]:
        """Earlier measurements; none where the file is missing or is not ours."""
        with suppress(OSError, ValueError):
            found = json.loads((self.path / BATCHES).read_text(encoding="utf-8"))
            if isinstance(found, dict) and all(type(n) is int and 0 < n <= MOST_TILES for n in found.values()):
                return found
        return {}


def load_encoder(
    name: str,
    weights: Path | None = None,
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    precision: str | None = None,
) -> Encoder:
    """An encoder's folder or, by its name, one of timm in PyTorch, where stpath-engine's extra `features` is installed.

    Parameters
    ----------
    weights
        Of a model of timm; None: from the Hugging Face Hub.
    backend, device, precision
        As `Engine.load` takes them; PyTorch has the device only.

    Raises
    ------
    InputError
        If there is no such encoder, or the options are not for it.
    """
    path = Path(name)
    if path.is_dir() or path.is_file():
        if weights is not None:
            raise OptionError(f"--weights {weights}: of a model of timm; {name} is a folder, which holds its own")
        if (path / CONFIG).is_file() and not (path / ENCODER_MANIFEST).is_file():
            raise EncoderError(
                f"{name}: an encoder as the Hub has it; make an engine of it: stpath export-encoder {name} --out "
                "ENCODER"
            )
        return TileEncoder.load(path, backend=backend, device=device, precision=precision)
    is_path = "/" in name and not name.startswith(HUB_PREFIXES)
    loaders = [] if is_path else list(entry_points(group=PLUGINS))
    if not loaders:
        raise EncoderError(
            f"{name}: no such folder; give that of an encoder: stpath export-encoder MODEL --out ENCODER"
        )
    if precision is not None or backend != "onnxruntime":
        option = f"--precision {precision}" if precision is not None else f"--backend {backend}"
        raise OptionError(
            f"{option}: {name!r} is no folder, so a model of timm, which PyTorch runs in float32; export it: stpath "
            f"export-encoder {name} --out ENCODER"
        )
    found: Encoder = loaders[0].load()(name, weights, device)
    return found


def require_width(name: str, width: int, expected: int, engine: str) -> None:
    """Check that an engine takes the features of an encoder: its name, and how wide they are.

    Raises
    ------
    InputError
        If they are of another width.
    """
    if width != expected:
        raise EncoderError(
            f"{name}: gives {width:,} features, and {engine} takes {expected:,}; give the encoder that "
            "its model was trained with"
        )


def noise(n: int, size: int) -> Tiles:
    """Tiles [n, size, size, 3] of noise from a seed, to measure on."""
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def _shown(values: Sequence[Any]) -> str:
    return " ".join(f"{value:g}" for value in values)
