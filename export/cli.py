"""The commands `export`, `export-encoder`, `verify` and `demo` of `stpath`; torch is imported when one runs."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stpath_runtime.cli.options import Backend, Device, chosen_backend
from stpath_runtime.cli.options import Precision as RunPrecision
from stpath_runtime.errors import CheckpointError, OptionError
from stpath_runtime.manifest import FlowConfig, ModelConfig, is_encoder, is_flow
from stpath_runtime.progress import progress_bar, report_console
from stpath_train.cli import TRAIN, require

if TYPE_CHECKING:
    from stpath_train.model import STPath

LIBRARIES = ("torch", "torch_geometric", "onnx", "onnxscript", "safetensors")
ENCODER_LIBRARIES = ("torch", "timm", "torchvision", "onnx_ir", "onnxscript", "onnxruntime", "safetensors")


class Precision(StrEnum):
    """Type of an engine's weights."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


def export(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="stfm.pth, STFlow's, or a .safetensors file.")
    ],
    out: Annotated[Path, typer.Option(metavar="ENGINE", help="The engine folder to write.")],
    genes: Annotated[
        Path | None,
        typer.Option(
            metavar="VOCABULARY",
            help="The model's symbol2ensembl.json; left out: STPath's published one. Of STFlow its genes, a JSON list.",
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="Type of the weights.")] = Precision.FP32,
    device: Annotated[str, typer.Option(help="Where the proof runs: cpu or cuda:N; bf16 needs a GPU.")] = "cpu",
    config: Annotated[
        Path | None, typer.Option(metavar="config.json", help="Of STFlow: the arguments of its training run.")
    ] = None,
) -> None:
    """Export a checkpoint as an engine, and prove its parity before it is published."""
    require_torch()
    from .exporter import export_engine

    with progress_bar(f"export {checkpoint.name}") as on_step:
        report = export_engine(checkpoint, out, genes, precision.value, on_step, device, config)
    worst = max(row["relative_l2"] for row in report["cases"])
    typer.echo(
        f"{out}: {precision.value}, {len(report['cases'])} comparisons with float64 passed, relative L2 <= {worst:.1e}"
    )


def export_encoder(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="gigapath, uni, uni2-h, h-optimus-0, h-optimus-1, virchow2, h0-mini, hf-hub:OWNER/NAME, or a folder "
            "as the Hub has it.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="ENCODER", help="The folder to write.")],
    precision: Annotated[Precision, typer.Option(help="Type of products and attention.")] = Precision.FP32,
    engine: Annotated[
        Path | None,
        typer.Option(
            metavar="ENGINE", help="An STPath engine: what the precision changes in its predicted expression."
        ),
    ] = None,
) -> None:
    """Export a tile encoder of timm as an engine, and prove its parity before it is published."""
    require(ENCODER_LIBRARIES, "features,export")
    from stpath_runtime.engine import Engine

    from .encoders.exporter import export_encoder as run

    loaded = Engine.load(engine) if engine is not None else None
    with progress_bar(f"export {model}") as on_step:
        manifest = run(model, out, precision.value, loaded, on_step)
    report = manifest.parity
    last = report["parts"][-1]
    typer.echo(
        f"{out}: {manifest.encoder}, {precision.value}, {manifest.width:,} features of {manifest.size} x "
        f"{manifest.size} pixels; {len(report['parts'])} parts against float64 passed, features "
        f"{last['relative_l2']:.1e} (bar {last['bar_l2']:.1e})"
    )
    if (change := report.get("expression")) is not None:
        r = "-" if change["pearson_min"] is None else f"{change['pearson_min']:.5f}"
        typer.echo(f"expression by {engine}: relative L2 {change['relative_l2']:.1e}, lowest Pearson of a gene {r}")


def verify(
    engine: Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder, or a tile encoder's.")],
    checkpoint: Annotated[
        Path, typer.Option(metavar="CHECKPOINT", help="What it was made from: a checkpoint, or the encoder.")
    ],
    slide: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to compare on, too: features, or the inputs.npz of a report's bundle."),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a report: the error stage by stage, pictures, what repeats a failure."),
    ] = None,
    backend: Backend = "onnxruntime",
    device: Device = "cpu",
    precision: RunPrecision = None,
    config: Annotated[
        Path | None, typer.Option(metavar="config.json", help="Of STFlow: its training run's; left out: as the engine.")
    ] = None,
) -> None:
    """Repeat the proof of parity for an engine that exists, on a backend and in a precision that it can run."""
    require_torch()

    from stpath_runtime.cli.info import print_parity
    from stpath_runtime.engine import Engine
    from stpath_runtime.readers import read_slide

    from .bundle import read_case
    from .proof import prove, require_passed
    from .report import PAGE, require_folder, write_report

    backend = chosen_backend(engine, backend, device, precision)
    if is_encoder(engine):
        if slide is not None or report is not None:
            raise OptionError("--slide and --report are of STPath engines, not of tile encoders; leave them out")
        _verify_encoder(engine, str(checkpoint), backend, device, precision)
        return
    if is_flow(engine):
        if report is not None:
            raise OptionError(f"--report {report}: of STPath engines; {engine} is an STFlow engine: leave it out")
        _verify_flow(engine, checkpoint, config, slide, backend, device, precision)
        return
    if config is not None:
        raise OptionError(f"--config {config}: of STFlow engines; {engine} is an STPath engine: leave it out")
    if report is not None:
        require_folder(report)
    given = [] if slide is None else [read_case(slide) if slide.suffix == ".npz" else read_slide(slide)]
    model, digest = _reference(checkpoint, engine)
    with progress_bar(f"prove {engine.name}") as on_step:
        proof = prove(engine, model, given, backend=backend, device=device, precision=precision, on_step=on_step)
    print_parity(proof, report_console())
    if report is not None:
        options: dict[str, Path | str | None] = {"checkpoint": checkpoint, "slide": slide, "report": report}
        options |= {"backend": backend, "device": device, "precision": precision}
        source = {"name": checkpoint.name, "sha256": digest}
        with progress_bar(f"trace {engine.name}") as on_step:
            loaded = Engine.load(engine, backend=backend, device=device, precision=precision)
            said = write_report(report, loaded, model, given, proof, options, source, on_step)
        typer.echo(f"{report / PAGE}: {said}")
    require_passed(proof)


def _verify_encoder(encoder: Path, model: str, backend: str, device: str, precision: str | None) -> None:
    """Repeat the proof of a tile encoder: its whole graph, on a backend."""
    require(ENCODER_LIBRARIES, "features,export")
    from stpath_runtime.cli.info import print_parts

    from .encoders.proof import require_passed, verify

    with progress_bar(f"prove {encoder.name}") as on_step:
        report = verify(encoder, model, backend=backend, device=device, precision=precision, on_step=on_step)
    print_parts(report, report_console())
    require_passed(report)


def _verify_flow(
    engine: Path,
    checkpoint: Path,
    config: Path | None,
    slide: Path | None,
    backend: str,
    device: str,
    precision: str | None,
) -> None:
    """Repeat the proof of an STFlow engine."""
    from stpath_runtime.cli.info import print_parity
    from stpath_runtime.files import sha256
    from stpath_runtime.manifest import FlowManifest
    from stpath_runtime.readers import read_slide
    from stpath_train.flow_checkpoint import load_flow_checkpoint

    from .proof import require_passed
    from .stflow.proof import prove

    manifest = FlowManifest.read(engine)
    model, _ = load_flow_checkpoint(checkpoint, config, manifest.model)
    _require_same(model.config, manifest.model, checkpoint, engine, manifest.checkpoint["name"])
    _warn_of_another_file(checkpoint, sha256(checkpoint), engine, manifest.checkpoint["sha256"])
    given = [] if slide is None else [read_slide(slide)]
    with progress_bar(f"prove {engine.name}") as on_step:
        proof = prove(engine, model, given, backend=backend, device=device, precision=precision, on_step=on_step)
    print_parity(proof, report_console())
    require_passed(proof)


def _require_same(
    found: ModelConfig | FlowConfig, wanted: ModelConfig | FlowConfig, checkpoint: Path, engine: Path, made_from: str
) -> None:
    """Check that a checkpoint is of the model that an engine is of."""
    if found != wanted:
        theirs, ours = asdict(found), asdict(wanted)
        different = ", ".join(f"{key} {theirs[key]} against {ours[key]}" for key in ours if theirs[key] != ours[key])
        raise CheckpointError(
            f"{checkpoint}: another model than {engine}'s ({different}); that engine was made from {made_from}"
        )


def _warn_of_another_file(checkpoint: Path, digest: str, engine: Path, made_from: str) -> None:
    if digest != made_from:
        typer.echo(f"warning: {checkpoint} is not the file that {engine} was made from (SHA-256 differs)", err=True)


def _reference(checkpoint: Path, engine: Path) -> tuple[STPath, str]:
    """The model that an engine is held to, and the SHA-256 of its file."""
    from stpath_runtime.files import sha256
    from stpath_runtime.manifest import Manifest
    from stpath_train.checkpoint import load_checkpoint

    manifest = Manifest.read(engine)
    model = load_checkpoint(checkpoint)
    _require_same(model.config, manifest.model, checkpoint, engine, manifest.checkpoint["name"])
    digest = sha256(checkpoint)
    _warn_of_another_file(checkpoint, digest, engine, manifest.checkpoint["sha256"])
    return model, digest


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """Show what the model is for on the sample slide: export, predict in and out of context, score, verify, draw."""
    require_torch()
    require(TRAIN, "train")
    from .demo import run_demo

    run_demo(out)


def require_torch() -> None:
    """Raise InputError, with what to install, where a library of the exporter is not."""
    require(LIBRARIES, "export")
