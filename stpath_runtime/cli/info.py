"""The manifests of engines and tile encoders, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..manifest import EncoderManifest, FlowManifest, Manifest
from ..progress import report_console


def print_manifest(path: Path, manifest: Manifest | FlowManifest | EncoderManifest) -> None:
    """Print the manifest as a table."""
    from rich.table import Table

    if isinstance(manifest, EncoderManifest):
        rows = _of_encoder(path, manifest)
    elif isinstance(manifest, FlowManifest):
        rows = _of_flow(path, manifest)
    else:
        rows = _of_engine(path, manifest)
    console = report_console()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)


def _of_engine(path: Path, manifest: Manifest) -> dict[str, str]:
    model = manifest.model
    attention = model.attention + (f" to {model.neighbors} spots" if model.neighbors else "")
    return {**_of_model(path, manifest), "attention": attention, **_of_folder(path, manifest)}


def _of_flow(path: Path, manifest: FlowManifest) -> dict[str, str]:
    model = manifest.model
    return {
        **_of_model(path, manifest),
        "variant": f"STFlow as {manifest.variant}, {model.activation}, edges of width {model.d_edge}",
        "neighbors": f"{model.neighbors}, without the spot itself",
        "sampling": f"{model.steps} steps, from a start that is {model.start}",
        **_of_folder(path, manifest),
    }


def _of_model(path: Path, manifest: Manifest | FlowManifest) -> dict[str, str]:
    model, checkpoint = manifest.model, manifest.checkpoint
    return {
        "engine": str(path),
        "checkpoint": f"{checkpoint['name']} (sha256 {checkpoint['sha256'][:16]}…)",
        "model": f"{model.n_layers} layers, width {model.d_model}, {model.n_heads} heads",
        "genes": f"{manifest.n_genes:,}",
        "features": f"{model.n_features:,} ({manifest.encoder})",
    }


def _of_folder(path: Path, manifest: Manifest | FlowManifest) -> dict[str, str]:
    return {
        "precision": manifest.precision,
        "graphs": f"{sum(name.endswith('.onnx') for name in manifest.files)} ONNX, opset {manifest.opset}",
        "size": _size(path, manifest),
        "parity": _summary(manifest.parity),
        "created": manifest.created,
        "versions": _versions(manifest),
    }


def _of_encoder(path: Path, manifest: EncoderManifest) -> dict[str, str]:
    trained, wanted, weights = manifest.trained, manifest.wanted, manifest.weights
    return {
        "encoder": f"{manifest.encoder} ({path})",
        "weights": f"{weights['name']} (sha256 {weights['sha256'][:16]}…)",
        "licence": manifest.licence,
        "model": f"{manifest.architecture}, {manifest.depth} blocks, {manifest.operations / 1e9:,.1f} GFLOP a tile",
        "tiles": f"{manifest.size} x {manifest.size} pixels, RGB; mean {manifest.mean}, std {manifest.std}",
        "trained on": "not known"
        if trained is None
        else f"{trained.microns:g} um a tile, {trained.microns_a_pixel:g} um a pixel",
        "STPath wants": f"{wanted.microns:g} um a tile, {wanted.microns_a_pixel:g} um a pixel",
        "features": f"{manifest.width:,} ({manifest.pooling})",
        "precision": manifest.precision,
        "size": _size(path, manifest),
        "parity": _summary_of_parts(manifest.parity),
        "created": manifest.created,
        "versions": _versions(manifest),
    }


def _size(path: Path, manifest: Manifest | FlowManifest | EncoderManifest) -> str:
    size = sum((path / name).stat().st_size for name in manifest.files)
    return f"{size / 2**20:,.1f} MiB in {len(manifest.files)} files, hashes checked"


def _versions(manifest: Manifest | FlowManifest | EncoderManifest) -> str:
    return ", ".join(f"{name} {version}" for name, version in manifest.versions.items())


def print_parts(report: dict[str, Any], console: Any) -> None:
    """Print the parity report of a tile encoder, a line a part."""
    from rich.table import Table

    verdict = "passed" if report["passed"] else "FAILED"
    run = f"{report['backend']}, {report['precision']}"
    table = Table(title=f"Parity with timm in float64, {report['tiles']} tiles, {run}: {verdict}")
    for column in ("part", "relative L2", "bar", "alone", "largest error", ""):
        table.add_column(column, justify="left" if column in ("part", "") else "right")
    for row in report["parts"]:
        errors = (f"{row[name]:.1e}" for name in ("relative_l2", "bar_l2", "own_l2", "max_abs"))
        table.add_row(row["part"], *errors, "ok" if row["passed"] else "[red]FAILED[/]")
    console.print(table)


def _summary_of_parts(report: dict[str, Any]) -> str:
    parts = report.get("parts") or []
    if not parts:
        return "not proven"
    worst, last = max(parts, key=lambda row: row["relative_l2"] / row["bar_l2"]), parts[-1]
    return (
        f"{'passed' if report['passed'] else 'FAILED'}: {len(parts)} parts against timm in {report['reference']}, "
        f"worst {worst['part']} {worst['relative_l2']:.1e} (bar {worst['bar_l2']:.1e}), {last['part']} "
        f"{last['relative_l2']:.1e}; {report['backend']}"
    )


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
        embedding = f"{row['embedding_l2']:.1e}" if "embedding_l2" in row else "-"  # STFlow has none
        table.add_row(
            *(row["case"], row["path"], f"{row['genes']:,}", f"{row['relative_l2']:.1e}", f"{row['bar_l2']:.1e}"),
            *(
                embedding,
                pearson,
                "ok" if row["passed"] else "[red]FAILED[/]",
            ),
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
