"""What benchmarks found: rows of seconds, memory and parity, and the machine that they are of, as JSON."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import FileError
from ...files import written_whole
from ...records import record
from .machine import commit, machine, versions

SCHEMA = 1
WIDE = 0.5  # (slowest - fastest) / median, from which a row's spread is too wide to compare it


@dataclass(frozen=True)
class Row:
    """One thing measured at one size: what it is, which tells it from other rows, and what was found."""

    what: str  # such as encode, decode, load, first call
    variant: str = "engine"  # or what else computes the same
    backend: str = ""  # of an engine
    device: str = "cpu"
    precision: str = "fp32"
    attention: str = ""  # global or knn; empty where it does not matter
    neighbors: int = 0
    spots: int = 0
    genes: int = 0
    context: int = 0  # spots with measured expression
    tile: int = 0  # rows of a block's tile; 0: as many as the engine takes by itself
    tiles: int = 0  # of an image, at once

    seconds: tuple[float, ...] = ()  # of each round
    ratios: tuple[float, ...] = ()  # to the base row, which ran in the same rounds: pair by pair
    peak_bytes: int | None = None  # of a whole process that did nothing else
    relative_l2: float | None = None
    parity: str = ""  # what relative_l2 is against
    limit: float | None = None  # seconds that the machine's peaks would allow (stpath_runtime.measures.bench.roofline)
    note: str = ""
    failed: str = ""  # why there are no numbers

    @property
    def identity(self) -> tuple[str | int, ...]:
        """What tells a row from others, and finds it again in other results."""
        return tuple(getattr(self, name) for name in IDENTITY)

    @property
    def median(self) -> float | None:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def spread(self) -> float | None:
        """(slowest - fastest) / median; None where there is one round or none."""
        if len(self.seconds) < 2:
            return None
        return (max(self.seconds) - min(self.seconds)) / statistics.median(self.seconds)

    @property
    def too_wide(self) -> bool:
        """Whether the rounds differ so much that something else ran beside them."""
        return self.spread is not None and self.spread > WIDE

    @property
    def roofline(self) -> float | None:
        """The share of what the machine's peaks allow; above 1 they were measured too low, and tell nothing."""
        return self.limit / self.median if self.limit is not None and self.median else None

    @property
    def by(self) -> str:
        """What did it: the variant, or the backend of an engine, and the precision."""
        name = f"{self.variant}, {self.backend}" if self.backend else self.variant
        name += f" on {self.device}" if self.device != "cpu" else ""
        return f"{name}, {self.precision}" if self.precision else name

    @property
    def setting(self) -> str:
        """On what: spots, attention, genes, context and tile, as far as they matter."""
        attention = f"{self.attention} {self.neighbors}" if self.neighbors else self.attention
        parts = (
            f"{self.spots:,} spots" if self.spots else "",
            attention,
            f"{self.genes:,} genes" if self.genes else "",
            f"context of {self.context:,} spots" if self.context else "",
            f"tiles of {self.tile:,}" if self.tile else "",
            f"{self.tiles:,} tiles" if self.tiles else "",
        )
        return ", ".join(part for part in parts if part)


FIELDS = [f.name for f in fields(Row)]
IDENTITY = FIELDS[: FIELDS.index("seconds")]
COMPUTED = ("median", "spread")


@dataclass(frozen=True)
class Results:
    """The rows of one run of benchmarks, and all that their numbers depend on."""

    title: str
    rows: tuple[Row, ...]
    hashes: dict[str, str] = field(default_factory=dict)  # engine and checkpoint -> SHA-256
    peaks: dict[str, Any] = field(default_factory=dict)  # gflops, gbytes, by: what the machine does at most
    machine: dict[str, Any] = field(default_factory=machine)
    versions: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=commit)
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA

    def seconds_of_backends(self) -> dict[tuple[str, str], dict[str, float]]:
        """Of each device and precision, what backends took to encode: the geometric mean over all that each ran.

        Rows whose spread is too wide tell nothing, and one backend alone cannot be compared.
        """
        medians: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        for row in self.rows:
            if row.what == "encode" and row.backend and row.median is not None and not row.too_wide:
                of_backend = medians.setdefault((row.device, row.precision), {}).setdefault(row.backend, {})
                of_backend[row.setting] = row.median
        found = {}
        for way, backends in medians.items():
            shared = set.intersection(*(set(settings) for settings in backends.values()))
            if len(backends) > 1 and shared:
                found[way] = {
                    name: statistics.geometric_mean(settings[each] for each in shared)
                    for name, settings in backends.items()
                }
        return found

    def write(self, path: Path) -> None:
        """Write them as JSON; median and spread of each row stand there, too, for other readers."""
        rows = [asdict(row) | {name: getattr(row, name) for name in COMPUTED} for row in self.rows]
        with written_whole(path) as partial:
            partial.write_text(json.dumps({**asdict(self), "rows": rows}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote.

        Raises
        ------
        FileError
            If it is missing, not such a file, or one of a newer version.
        """
        if not path.is_file():
            raise FileError(f"{path}: no such file; give what stpath bench wrote, bench.json")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
                raise ValueError("it has no rows")
            schema = content.get("schema")
            if type(schema) is int and schema > SCHEMA:
                raise FileError(f"{path}: schema {schema} is newer than {SCHEMA}; upgrade stpath-engine")
            results = record(cls, {**content, "rows": [_without_computed(row) for row in content["rows"]]})
            results._check()
        except (ValueError, RecursionError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(
                f"{path}: not a result of stpath bench ({' '.join(str(error).split())}); give its bench.json"
            ) from error
        return results

    def _check(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema}, not {SCHEMA}")
        for index, row in enumerate(self.rows):
            if any(seconds <= 0 for seconds in row.seconds):
                raise ValueError(f"rows[{index}].seconds must be above 0")
        repeated = len(self.rows) - len({row.identity for row in self.rows})
        if repeated:
            raise ValueError(f"{repeated} of its rows appear twice")


def _without_computed(row: object) -> object:
    """A row of a file, without the columns that `Results.write` computes for other readers."""
    return {name: value for name, value in row.items() if name not in COMPUTED} if isinstance(row, dict) else row


EMPTY = Row("")


def describe(results: Results) -> str:
    """The machine and the libraries, in one line."""
    facts, memory = results.machine, results.machine.get("memory_bytes", 0)
    features = ", ".join(facts.get("features", [])) or "no AVX2"
    libraries = ", ".join(f"{name} {found}" for name, found in results.versions.items())
    gpus = "".join(f"; {gpu}" for gpu in facts.get("gpus", []))
    return f"{facts.get('cores')} cores of {facts.get('cpu')} ({features}), {memory / 2**30:.0f} GiB{gpus}; {libraries}"
