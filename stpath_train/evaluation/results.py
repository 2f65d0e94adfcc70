"""What an evaluation found: files, and a table on the terminal.

DIR/
  results.json  the task, its protocols, the model, seed, versions, and the figures with their intervals
  results.csv   tidy: a row a gene, slide or fold, as the task has it
  *.png         pictures
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stpath_runtime.errors import OutputError
from stpath_runtime.files import require_writable, written_whole
from stpath_runtime.progress import report_console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS, TABLE = "results.json", "results.csv"
LIBRARIES = ("stpath-engine", "numpy", "scipy", "scikit-learn", "scanpy", "torch")
SIMULATED = "simulated"
DOTS_PER_INCH = 130
Row = dict[str, Any]


@dataclass(eq=False)
class Evaluation:
    """What a task found."""

    task: str
    protocols: dict[str, str]  #: name -> what is computed, and who published it
    figures: list[Row]  #: each with a protocol, a metric, its value and what it is over
    rows: list[Row]  #: of results.csv
    pictures: dict[str, Figure] = field(default_factory=dict)  #: by file name


def require_folder(out: Path) -> None:
    """Raise InputError, before the work, where the results cannot be written, or would stand beside other things."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"--out {out}: a file is there; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / RESULTS).is_file():
        raise OutputError(f"--out {out}: the folder holds something else; give a new one, or one of earlier results")
    require_writable(out / RESULTS)


def write_evaluation(found: Evaluation, out: Path, about: Row, simulated: bool) -> None:
    """Write the results; those of an earlier evaluation in the folder make room.

    Parameters
    ----------
    about
        The model, the store, the slides, the genes, the seed.
    simulated
        Whether slides are: then each picture's title, and the JSON, say so.
    """
    import pandas as pd

    _remove_earlier(out)
    for name, picture in found.pictures.items():
        if simulated:
            picture.suptitle(f"{picture.get_suptitle()} ({SIMULATED})", fontsize=12)
        with written_whole(out / name) as partial:
            picture.savefig(partial, dpi=DOTS_PER_INCH, format="png", facecolor="white")
    with written_whole(out / TABLE) as partial:
        pd.DataFrame(found.rows).to_csv(partial, index=False, errors="surrogateescape")
    note = {"note": SIMULATED} if simulated else {}
    report = {
        "task": found.task, **note, "protocols": found.protocols, "figures": found.figures, **about,
        "pictures": list(found.pictures), "versions": {name: version(name) for name in LIBRARIES},
    }  # fmt: skip
    with written_whole(out / RESULTS) as partial:
        partial.write_text(json.dumps(_plain(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def print_figures(found: Evaluation, simulated: bool) -> None:
    """Print the figures as a table."""
    from rich.table import Table

    console = report_console()
    table = Table(title=found.task + (f" ({SIMULATED})" if simulated else ""))
    columns = list(dict.fromkeys(name for row in found.figures for name in row if name not in ("low", "high")))
    for name in columns:
        table.add_column(name, justify="right" if isinstance(found.figures[0].get(name), int | float) else "left")
    for row in found.figures:
        table.add_row(*(_cell(row, name) for name in columns))
    console.print(table)


def _cell(row: Row, name: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if name not in ("value", "std"):
        return f"{value:g}"
    text = f"{value:.4f}" if np.isfinite(value) else "undefined"
    return f"{text} [{row['low']:.4f}, {row['high']:.4f}]" if name == "value" and "low" in row else text


def _remove_earlier(out: Path) -> None:
    """Remove the pictures of an earlier evaluation, which would stand beside those of this one."""
    try:
        earlier: Sequence[str] = json.loads((out / RESULTS).read_text(encoding="utf-8"))["pictures"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in earlier:
        (out / Path(name).name).unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is undefined (NaN) is null."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
