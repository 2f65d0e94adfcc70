"""An engine's manifest, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..manifest import Manifest
from ..progress import report_console


def print_manifest(path: Path, manifest: Manifest) -> None:
    """Print the manifest as a table."""
    from rich.table import Table

    model, checkpoint = manifest.model, manifest.checkpoint
    size = sum((path / name).stat().st_size for name in manifest.files)
    rows = {
        "engine": str(path),
        "checkpoint": f"{checkpoint['name']} (sha256 {checkpoint['sha256'][:16]}…)",
        "model": f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads",
        "genes": f"{model.n_tokens - 2:,}",
        "features": f"{model.n_features:,} ({manifest.encoder})",
        "attention": model.attention + (f" to {model.neighbors} spots" if model.neighbors else ""),
        "precision": manifest.precision,
        "graphs": f"{sum(name.endswith('.onnx') for name in manifest.files)} ONNX, opset {manifest.opset}",
        "size": f"{size / 2**20:,.1f} MiB in {len(manifest.files)} files, hashes checked",
        "parity": _summary(manifest.parity),
        "created": manifest.created,
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    console = report_console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)


def print_parity(report: dict[str, Any], console: Any) -> None:
    """Print a parity report, a line a case."""
    from rich.table import Table

    verdict = "passed" if report["passed"] else "FAILED"
    run = f"{report['backend']}, {report['precision']}"
    table = Table(title=f"Parity with the float64 reference, {run}: {verdict}")
    for column in ("case", "path", "genes", "relative L2", "bar", "embedding", "lowest Pearson", ""):
        table.add_column(column, justify="left" if column in ("case", "path", "") else "right")
    for row in report["cases"]:
        pearson = "-" if row["pearson_min"] is None else f"{row['pearson_min']:.7f}"
        table.add_row(
            *(row["case"], row["path"], f"{row['genes']:,}", f"{row['relative_l2']:.1e}", f"{row['bar_l2']:.1e}"),
            *(f"{row['embedding_l2']:.1e}", pearson, "ok" if row["passed"] else "[red]FAILED[/]"),
        )
    console.print(table)


def _summary(report: dict[str, Any]) -> str:
    cases = report.get("cases") or []
    if not cases:
        return "not proven"
    worst = max(cases, key=lambda row: row["relative_l2"] / row["bar_l2"])
    pearson = min((row["pearson_min"] for row in cases if row["pearson_min"] is not None), default=None)
    lowest = "" if pearson is None else f", lowest Pearson {pearson:.7f}"
    verdict = "passed" if report["passed"] else "FAILED"
    return (
        f"{verdict}: {len(cases)} comparisons with the {report['reference']} reference, worst relative L2 "
        f"{worst['relative_l2']:.1e} (bar {worst['bar_l2']:.1e}){lowest}; {report['backend']}"
    )
