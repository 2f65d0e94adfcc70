"""The page of a parity report: one file of HTML that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Row = dict[str, Any]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 72rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .8rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .5rem; border-bottom: 1px solid #d1d9e0; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
p { max-width: 52rem; margin: .5rem 0; }
.verdict { border-left: 5px solid; padding: .6rem 1rem; background: #f6f8fa; margin: 1rem 0; }
.passed { border-color: #1a7f37; } .failed { border-color: #cf222e; }
.verdict b { font-size: 1.1rem; } .passed b { color: #1a7f37; } .failed b { color: #cf222e; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: .6rem 0; }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #e4e8ec; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #8c959f; white-space: nowrap; }
th.over { text-align: center; border-bottom: 0; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.path { white-space: nowrap; }
td.miss { color: #cf222e; font-weight: 600; } tr.enters td { background: #ffebe9; }
img { max-width: 100%; display: block; margin: .8rem 0; }
code, pre { font: 13px/1.45 ui-monospace, monospace; }
pre { background: #f6f8fa; padding: .7rem 1rem; overflow-x: auto; }
.facts th { border-bottom: 1px solid #e4e8ec; }
details { margin: .6rem 0; } summary { cursor: pointer; }
"""
READING = """
<p>The reference is the model in PyTorch, in float64. Beside the engine stands PyTorch itself, in the engine's
precision: the error that it has too is the price of the precision. A stage has two errors. Its <b>own</b> error is
that of the stage alone, given the reference's numbers, rounded to the type that passes between the stages: where that
rises, the error enters. The <b>accumulated</b> error is that of the engine as it predicts. The bars of relative L2 are
1e-5 in float32, and in a lower precision twice PyTorch's error in the same way. Those of the
comparisons decide whether an engine passes; those of the stages say where to look.</p>
"""
OUTPUTS = {
    "gene_rows": "gene rows",
    "x": "x",
    "k": "k of the next block",
    "v": "v of the next block",
    "expression": "expression",
}
ABSOLUTE = {"mean": "mean", "p50": "50%", "p99": "99%", "p99.9": "99.9%", "max": "max = atol", "rtol": "rtol"}
WHO = {"engine": "engine", "pytorch": "PyTorch"}


def page(report: Row, pictures: Mapping[str, bytes]) -> str:
    """The page of a report, as `stpath_export.report` writes it into its JSON, with its pictures (PNG) in it."""
    proof, passed = report["proof"], report["passed"]
    title = f"Parity of {report['engine']['path']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="verdict {"passed" if passed else "failed"}"><b>{"Passed" if passed else "Failed"}</b>'
        f"<p>{escape(report['verdict'])}</p></div>",
        _facts(report),
        _failure(report) if not passed else "",
        "<h2>Error by stage</h2>",
        READING,
        _picture(pictures, "stages.png", "Relative L2 by stage, the worst of its outputs"),
        *(_stages(trace) for trace in report["traces"]),
        "<h2>Expression</h2>",
        _pearson(report["traces"]),
        _picture(pictures, "scatter.png", "Expression by the engine against the reference, and the difference"),
        _picture(pictures, "histogram.png", "How often the expression is off by how much"),
        "<h2>All comparisons</h2>",
        _proof(proof),
        "<h2>Versions</h2>",
        _versions(report),
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(part for part in parts if part) + "\n</body></html>\n"
    )


def _facts(report: Row) -> str:
    proof, machine = report["proof"], report["machine"]
    bars = "; ".join(
        f"{name.replace('relative_l2', 'relative L2').replace('pearson', 'Pearson r')}: "
        + (f"{bar:g}" if isinstance(bar, float) else bar)
        for name, bar in proof["bars"].items()
    )
    rows = {
        "engine": f"{report['engine']['path']} (sha256 of engine.json {report['engine']['sha256']})",
        "checkpoint": f"{report['checkpoint']['name']} (sha256 {report['checkpoint']['sha256']})",
        "runs on": f"{proof['backend']}, {proof['precision']}",
        "bars": bars,
        "machine": f"{machine['cpu']}, {machine['cores']} cores" + "".join(f"; {gpu}" for gpu in machine["gpus"]),
        "created": report["created"],
    }
    facts = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return f'<table class="facts">{facts}</table><pre>{escape(report["command"])}</pre>'


def _failure(report: Row) -> str:
    return (
        "<h2>Repeat it</h2><p>The folder <code>bundle</code> beside this page holds the comparison that misses its bar "
        "by most: its inputs, the outputs of the reference, the engine and PyTorch, versions and hashes. This repeats "
        f"it:</p><pre>{escape(report['repeat'])}</pre>"
    )


def _stages(trace: Row) -> str:
    rows, details = [], []
    for row in trace["stages"]:
        stage, output = row["stage"].replace("_", " "), OUTPUTS[row["output"]]
        cells = [_cell(stage), _cell(output)]
        for which in ("own", "accumulated"):
            for who in WHO:
                missed = who == "engine" and not row[f"{which}_passed"]
                cells.append(_number(row[who][which]["relative_l2"], missed))
            cells.append(_number(row[f"{which}_bar"]))
            details += [
                [_cell(stage), _cell(output), _cell(which), _cell(name)]
                + [_number(row[who][which][key]) for key in ("relative_l2", *ABSOLUTE)]
                for who, name in WHO.items()
            ]
        rows.append((cells, "enters" if not row["own_passed"] else ""))
    over = (
        '<tr><th></th><th></th><th class="over" colspan="3">own</th><th class="over" colspan="3">accumulated</th></tr>'
    )
    names = ["stage", "output", *(["engine", "PyTorch", "bar"] * 2)]
    every = ["stage", "output", "error", "of", "relative L2", *ABSOLUTE.values()]
    said = f"the error enters at {trace['enters'].replace('_', ' ')}" if trace["enters"] else "no stage misses its bar"
    return (
        f"<h3>{escape(trace['case'])}, {escape(trace['attention'])} attention: {said}</h3>"
        + _table(names, rows, numbers_from=2, over=over)
        + "<details><summary>Absolute errors: mean, quantiles, highest; and the tolerances that would have passed "
        "(atol with rtol 0, rtol with atol 0)</summary>"
        + _table(every, [(cells, "") for cells in details], numbers_from=4)
        + "</details>"
    )


def _pearson(traces: Sequence[Row]) -> str:
    rows = []
    for trace in traces:
        last = trace["stages"][-1]
        for who, name in WHO.items():
            pearson, error = trace["pearson"][who], last[who]["accumulated"]
            r = [_cell("-" if pearson.get(key) is None else f"{pearson[key]:.7f}", "n") for key in ("min", "p1", "p50")]
            genes = [_cell(f"{pearson[key]:,}", "n") for key in ("genes", "flat_genes")]
            errors = [_number(error[key]) for key in ("relative_l2", "p99.9", "max")]
            rows.append(([_cell(f"{trace['case']}, {trace['attention']}"), _cell(name), *genes, *r, *errors], ""))
    names = [
        "case",
        "by",
        "genes that vary",
        "flat",
        "lowest r",
        "1% of genes",
        "median r",
        "relative L2",
        "99.9%",
        "max",
    ]
    return (
        "<p>Pearson r is of a gene over the spots, engine or PyTorch against the reference. A gene that is flat, the "
        "same at all spots within rounding, has none.</p>" + _table(names, rows, numbers_from=2)
    )


def _proof(proof: Row) -> str:
    rows = []
    for row in proof["cases"]:
        pearson = "-" if row["pearson_min"] is None else f"{row['pearson_min']:.7f}"
        cells = [_cell(row["case"]), _cell(row["path"], "path"), _cell(f"{row['genes']:,}", "n")]
        cells += [_number(row[key]) for key in ("relative_l2", "bar_l2", "embedding_l2", "embedding_bar")]
        cells += [
            _cell(pearson, "n"),
            _number(row["max_abs"]),
            _cell(*(("ok",) if row["passed"] else ("FAILED", "miss"))),
        ]
        rows.append((cells, "" if row["passed"] else "enters"))
    names = ["case", "path", "genes", "relative L2", "bar", "embedding", "bar", "lowest r", "max", ""]
    return "<p>Slides named by spots, organ and technology are of random features on a hexagonal grid.</p>" + _table(
        names, rows, numbers_from=2
    )


def _versions(report: Row) -> str:
    exported, now = report["engine"]["exported_with"], report["versions"]
    rows = [
        ([_cell(name), _cell(now.get(name, "-")), _cell(exported.get(name, "-"))], "")
        for name in dict.fromkeys([*now, *exported])
    ]
    machine = report["machine"]
    system = f"{machine['system']}, Python {machine['python']}, {machine['memory_bytes'] / 2**30:,.0f} GiB of memory"
    features = f"; the CPU has {', '.join(machine['features'])}" if machine["features"] else ""
    code = f"; stpath-engine at commit {report['commit']}" if report["commit"] else ""
    said = f"<p>{escape(system + features + code)}</p>"
    return _table(["library", "here", "when the engine was exported"], rows) + said


def _picture(pictures: Mapping[str, bytes], name: str, what: str) -> str:
    data = base64.b64encode(pictures[name]).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(what)}">'


def _table(names: Sequence[str], rows: Iterable[tuple[list[str], str]], numbers_from: int = 99, over: str = "") -> str:
    """A table of cells; rows with their class."""
    head = "".join(f"<th{' class=n' if i >= numbers_from else ''}>{escape(name)}</th>" for i, name in enumerate(names))
    body = "\n".join(f"<tr{f' class={kind}' if kind else ''}>{''.join(cells)}</tr>" for cells, kind in rows)
    return f'<div class="wide"><table>{over}<tr>{head}</tr>\n{body}</table></div>'


def _cell(text: str, kind: str = "") -> str:
    return f"<td{f' class={kind}' if kind else ''}>{escape(text)}</td>"


def _number(value: float | None, missed: bool = False) -> str:
    """A figure; None was not finite."""
    shown = "not finite" if value is None else "0" if value == 0 else f"{value:.1e}"
    return f'<td class="n{" miss" if missed else ""}">{shown}</td>'
