"""The report of a parity proof: what was compared, at which stage the error enters, and pictures of it.

DIR/
  report.html      a page that holds it all, pictures too
  report.json      every number of it, and those of the pictures
  stages.png       error by stage
  scatter.png      expression, engine against reference
  histogram.png    how often the expression is off by how much
  bundle/          where a comparison misses its bar: what repeats it (`stpath_export.bundle`)
"""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from stpath_runtime.engine import Engine
from stpath_runtime.errors import OutputError
from stpath_runtime.files import require_writable, written_whole
from stpath_runtime.measures.bench.machine import commit, machine, versions
from stpath_runtime.progress import OnTile
from stpath_runtime.results.plot import require_matplotlib
from stpath_runtime.slides.slide import Slide
from stpath_train.model import STPath

from .bundle import INPUTS, plain, write_bundle
from .figures import histogram_figure, scatter_figure, stages_figure
from .page import page
from .proof import KNN, LOW_DTYPES, Case, Report, all_cases, engine_paths, excess, reference
from .trace import Row, Trace, edges, trace_cases

PAGE, REPORT, BUNDLE = "report.html", "report.json", "bundle"
FIGURES = {"stages.png": stages_figure, "scatter.png": scatter_figure, "histogram.png": histogram_figure}
DOTS_PER_INCH = 110


def require_folder(out: Path) -> None:
    """Check, before the work, that a report can be written at `out`: nothing is there, or an earlier report alone.

    Raises
    ------
    InputError
        If something else is there, it cannot be written, or matplotlib is not installed.
    """
    require_matplotlib()
    if out.exists() and not out.is_dir():
        raise OutputError(f"--report {out}: a file is there; give a folder")
    others = {path.name for path in out.iterdir()} - {PAGE, REPORT, BUNDLE, *FIGURES} if out.exists() else set()
    if others:
        raise OutputError(
            f"--report {out}: the folder holds something else ({min(others)}); give a new one, or that of an earlier "
            "report"
        )
    require_writable(out)


def write_report(
    out: Path,
    engine: Engine,
    model: STPath,
    given: Sequence[Slide | Case],
    proof: Report,
    options: Mapping[str, Path | str | None],
    checkpoint: Mapping[str, str],
    on_step: OnTile | None = None,
) -> str:
    """Trace the stages of an engine, and write the report; an earlier one makes room when this one is whole.

    Traced are the slides that are given, else the largest of the grid with context; and what misses its bar by most.

    Parameters
    ----------
    proof
        What `prove` found.
    options
        Of the call of `stpath verify`.
    checkpoint
        Its name and sha256.
    on_step
        Called with (done, total) as the work goes on.

    Returns
    -------
    The verdict, in words.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    cases = all_cases(model, engine.vocabulary, given)
    failed = worst_failure(proof["cases"])
    traces = trace_cases(engine, model, chosen(cases, len(given), failed), on_step)
    said = verdict(proof["cases"], traces)
    about = {
        "command": _command(engine.path, options),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "engine": {"path": str(engine.path), "sha256": engine.hash(), "exported_with": engine.manifest.versions},
        "checkpoint": dict(checkpoint),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
    }
    facts: Row = {
        "passed": proof["passed"],
        "verdict": said,
        **about,
        "proof": proof,
        "traces": [_facts(trace) for trace in traces],
        "histogram_edges": edges().tolist(),
        "pictures": list(FIGURES),
    }
    if failed is not None:
        repeated = {**options, "slide": out / BUNDLE / INPUTS, "report": None}
        facts["repeat"] = _command(engine.path, repeated)
    with written_whole(out) as folder:
        folder.mkdir()
        title = f"{engine.path.name}: {proof['backend']}, {proof['precision']}" + (
            "" if given else " (slides of random features)"
        )
        for name, draw in FIGURES.items():
            draw(traces, title).savefig(folder / name, dpi=DOTS_PER_INCH, format="png", facecolor="white")
        facts = plain(facts)
        (folder / REPORT).write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        pictures = {name: (folder / name).read_bytes() for name in FIGURES}
        (folder / PAGE).write_text(page(facts, pictures), encoding="utf-8", errors="backslashreplace")
        if failed is not None:
            (folder / BUNDLE).mkdir()
            case = next(case for case in cases if case.name == failed["case"])
            outputs = _outputs(engine, model, case, failed["path"])
            write_bundle(folder / BUNDLE, case, outputs, failed, about | {"repeat": facts["repeat"]})
    return said


def worst_failure(rows: Sequence[Row]) -> Row | None:
    """The comparison that misses its bar by most; of a panel, where one does: all genes make a large bundle."""
    failed = [row for row in rows if not row["passed"]]
    fewest = min((row["genes"] for row in failed), default=0)
    return max((row for row in failed if row["genes"] == fewest), key=excess, default=None)


def chosen(cases: Sequence[Case], given: int, failed: Row | None) -> list[Case]:
    """The cases to trace: the last so many, which are given, else the largest with context; and the one that failed."""
    panels = [case for case in cases if case.genes is not None and case.context is not None]
    traced = list(cases[len(cases) - given :]) or [max(panels, key=lambda case: len(case.slide))]
    names = {case.name for case in traced}
    return traced + [case for case in cases if failed is not None and case.name == failed["case"] not in names]


def verdict(rows: Sequence[Row], traces: Sequence[Trace]) -> str:
    """What the proof found, and at which stage the error enters."""
    failed = [row for row in rows if not row["passed"]]
    if not failed:
        nearest = max(rows, key=excess)
        said = (
            f"All {len(rows)} comparisons keep to their bars; the nearest, {excess(nearest):.0%} of its bar, is "
            f"{nearest['case']} by the {nearest['path']}."
        )
    else:
        said = f"{len(failed)} of {len(rows)} comparisons miss their bar."
    entering = [(trace, row) for trace in traces if (row := trace.enters()) is not None]
    if entering:
        trace, row = entering[0]
        error, by_torch = (row[who]["own"]["relative_l2"] for who in ("engine", "pytorch"))
        stage = f"{_spoken(row['stage'])} ({row['output']})"
        return (
            f"{said} The error enters at {stage}: handed the reference's numbers, it errs {error:.1e} (bar "
            f"{row['own_bar']:.1e}, PyTorch {by_torch:.1e}), {trace.name}."
        )
    if not failed:
        return f"{said} No stage errs more than its bar on its own."
    paths = sorted({row["path"].split(", ", 1)[1] for row in failed})
    if "stages" not in paths:
        return f"{said} The stages that were traced keep to their bars: what fails is {' and '.join(paths)}."
    trace, row = max(((trace, row) for trace in traces for row in trace.rows), key=lambda pair: _times_torch(pair[1]))
    return (
        f"{said} No stage misses its bar on its own; furthest from PyTorch is {_spoken(row['stage'])} "
        f"({row['output']}), {_times_torch(row):.1f} times its error, {trace.name}."
    )


def _times_torch(row: Row) -> float:
    own = (row[who]["own"]["relative_l2"] for who in ("engine", "pytorch"))
    return float(next(own) / max(next(own), 1e-300))


def _spoken(stage: str) -> str:
    return stage.replace("_", " ")


def _command(engine: Path, options: Mapping[str, Path | str | None]) -> str:
    """A call of `stpath verify`; options that are None are left out."""
    given = ((f"--{option}", str(value)) for option, value in options.items() if value is not None)
    return shlex.join(["stpath", "verify", str(engine), *(word for pair in given for word in pair)])


def _facts(trace: Trace) -> Row:
    """A trace as the JSON has it: all but the values that only pictures show."""
    entering = trace.enters()
    return {
        "case": trace.case,
        "attention": trace.attention,
        "spots": trace.spots,
        "enters": entering["stage"] if entering is not None else None,
        "stages": trace.rows,
        "pearson": trace.pearson,
        "histograms": trace.histograms,
    }


def _outputs(engine: Engine, model: STPath, case: Case, path: str) -> dict[str, tuple[Any, Any]]:
    """(embedding, expression) of a comparison's three sides."""
    neighbors = KNN if path.startswith("knn") else None
    by_torch = copy.deepcopy(model).to(LOW_DTYPES.get(engine.precision, torch.float32))
    return {
        "reference": reference(copy.deepcopy(model).double(), case, engine.vocabulary, neighbors),
        "engine": next(found for name, found in engine_paths(engine, case, neighbors) if name == path),
        "pytorch": reference(by_torch, case, engine.vocabulary, neighbors),
    }
