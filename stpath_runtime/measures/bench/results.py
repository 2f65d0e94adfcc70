"""What benchmarks found: rows of seconds, memory and parity, and the machine that they are of, as JSON."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import FileError
from ..output import written_whole
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

    seconds: tuple[float, ...] = ()  # of each round
    ratios: tuple[float, ...] = ()  # to the base row, which ran in the same rounds: pair by pair
    peak_bytes: int | None = None  # of a whole process that did nothing else
    relative_l2: float | None = None
    parity: str = ""  # what relative_l2 is against
    limit: float | None = None  # seconds that the machine's peaks would allow (stpath_runtime.bench.roofline)
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
        )
        return ", ".join(part for part in parts if part)


FIELDS = [f.name for f in fields(Row)]
IDENTITY = FIELDS[: FIELDS.index("seconds")]


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

    def write(self, path: Path) -> None:
        """Write them as JSON; median and spread of each row stand there, too, for other readers."""
        rows = [{**asdict(row), "median": row.median, "spread": row.spread} for row in self.rows]
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
            found = json.loads(path.read_text(encoding="utf-8"))
            rows, schema = found["rows"], found["schema"]
            if type(schema) is int and schema > SCHEMA:
                raise FileError(f"{path}: schema {schema} is newer than {SCHEMA}; upgrade stpath-engine")
            results = cls(**{**found, "rows": tuple(_row(row) for row in rows)})
            results._check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(
                f"{path}: not a result of stpath bench ({' '.join(str(error).split())}); give its bench.json"
            ) from error
        return results

    def _check(self) -> None:
        texts = (self.title, self.date, *self.hashes.values(), *self.versions.values())
        kinds = isinstance(self.machine, dict) and isinstance(self.peaks, dict) and self.schema == SCHEMA
        if not kinds or not all(isinstance(text, str) for text in texts):
            raise ValueError("a field is missing, or not what it can be")
        repeated = len(self.rows) - len({row.identity for row in self.rows})
        if repeated:
            raise ValueError(f"{repeated} of its rows stand twice")


def _row(found: dict[str, Any]) -> Row:
    """A row of a file, checked."""
    given = {name: value for name, value in found.items() if name not in ("median", "spread")}
    row = Row(**{**given, "seconds": tuple(given["seconds"]), "ratios": tuple(given["ratios"])})
    numbers = (*row.seconds, *row.ratios, *(n for n in (row.peak_bytes, row.relative_l2, row.limit) if n is not None))
    wrong = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n)]
    if wrong or any(n <= 0 for n in row.seconds):
        raise ValueError(f"row {row.what!r}: times and sizes must be numbers above 0")
    for name in IDENTITY:
        if type(getattr(row, name)) is not type(getattr(EMPTY, name)):
            raise ValueError(f"row {row.what!r}: {name} is {getattr(row, name)!r}")
    return row


EMPTY = Row("")


def describe(results: Results) -> str:
    """The machine and the libraries, in one line."""
    facts, memory = results.machine, results.machine.get("memory_bytes", 0)
    features = ", ".join(facts.get("features", [])) or "no AVX2"
    libraries = ", ".join(f"{name} {found}" for name, found in results.versions.items())
    gpus = "".join(f"; {gpu}" for gpu in facts.get("gpus", []))
    return f"{facts.get('cores')} cores of {facts.get('cpu')} ({features}), {memory / 2**30:.0f} GiB{gpus}; {libraries}"
