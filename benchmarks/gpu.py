"""The engine beside PyTorch on one GPU: parity, latency and memory, by number of spots; JSON and PNG, named by the GPU.

    python benchmarks/gpu.py                                      # a GPU, the published sizes, everything
    python benchmarks/gpu.py --device cpu --spots 500 --rounds 2  # the same code on the CPU: a dry run, and marked so

Each variant is held to the float64 reference before it is timed. A call starts with the features in host memory and
ends with the expression of 50 genes there; it is warm, synchronised, and the median of many, the variants in turn.
Weights (where no checkpoint is given) and features are random: the figures tell speed, not accuracy on tissue.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import flex_attention

from stpath_export.exporter import export_engine
from stpath_export.proof import prove, random_slide, require_passed
from stpath_runtime import Engine, ParityError, Slide
from stpath_runtime.files import sha256, written_whole
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from stpath_train.inputs import knn_blocks, slide_inputs
from stpath_train.literal import literal_forward
from stpath_train.model import PUBLISHED_SIZES, KeyBlocks, SpatialAttention, STPath
from variants import WRONG

K = 32
GENES = 50
LITERAL_UP_TO = 5_000  # spots: the literal formula holds [N, N, 4, 3] numbers
REFERENCE_UP_TO = 20_000  # spots, global: float64 takes its time
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LIBRARIES = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "stpath-engine")
RESULTS = Path(__file__).parent / "results"
# Past the limit PyTorch would go on without compiling, and not say so.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True
Call = Callable[[], np.ndarray]  # expression [N, GENES], float32


@dataclass
class Row:
    """One variant at one number of spots."""

    variant: str
    attention: str
    precision: str
    spots: int
    relative_l2: float | None = None  # of the expression, against float64; None: no reference of that size
    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None  # of device memory in one call above that before the variant was made
    failed: str = ""

    @property
    def median(self) -> float | None:
        """Milliseconds of a call."""
        return statistics.median(self.milliseconds) if self.milliseconds else None


def main(
    device: Annotated[str, typer.Option(help="cuda:N, or cpu for a dry run.")] = "cuda:0",
    spots: Annotated[str, typer.Option(metavar="N,N,...")] = "500,2000,5000,20000,100000",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")] = 30,
    checkpoint: Annotated[Path | None, typer.Option(help="Left out: the published sizes, seeded weights.")] = None,
    genes: Annotated[Path | None, typer.Option(help="Its vocabulary; left out: the published one.")] = None,
    engine: Annotated[list[Path] | None, typer.Option(help="Its engines; left out: exported, of each type.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the engines.")] = "onnxruntime",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print, and write the results."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = checkpoint or _seeded(Path(folder))
        model = load_checkpoint(checkpoint)
        engines = engine or _exported(checkpoint, genes, Path(folder), device)
        for path in engine or ():  # those that are exported here are proven as they are
            require_passed(prove(path, model, device=device, backend=backend))
        loaded = [Engine.load(path, backend=backend, device=device) for path in engines]
        rows = []
        for n in (int(word) for word in spots.split(",")):
            slide = random_slide(n, model.config.n_features, n)
            for attention in ("global", "knn"):
                rows += measure(model, loaded, slide, attention, device, rounds)
                _print(rows[-1].spots, [row for row in rows if row.spots == n and row.attention == attention])
        report = {
            **_machine(device),
            "checkpoint": sha256(checkpoint),
            "genes": GENES,
            "neighbors": K,
            "rounds": rounds,
        }
        _write(report, rows, out)


def measure(model: STPath, engines: list[Engine], slide: Slide, attention: str, device: str, rounds: int) -> list[Row]:
    """All variants on one slide: each checked and its memory watched, then all timed in turn."""
    exact = _reference(model, slide, attention, device)
    rows: list[Row] = []
    ready: list[tuple[Row, Call]] = []
    for row, make in _variants(model, engines, slide, attention, device):
        rows.append(row)
        try:
            _free(device)  # what variants before it left in caches is not this one's
            before = _used(device)
            call = make()
            found = call()  # compiles and loads
            row.relative_l2 = None if exact is None else relative_l2(found, exact)
            if row.relative_l2 is not None and not row.relative_l2 <= WRONG[row.precision]:  # NaN is wrong, too
                row.failed = f"wrong: relative L2 {row.relative_l2:.1e}, above {WRONG[row.precision]:.0e}"
                continue  # a wrong result has no speed
            with _peak(device) as peak:
                call()
            row.peak_bytes = None if before is None else peak[0] - before
            ready.append((row, call))
        except Exception as error:  # out of memory, or not to be had here: a result too
            row.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            _free(device)
    for _ in range(rounds):
        for row, call in ready:
            start = time.perf_counter()
            call()
            row.milliseconds.append((time.perf_counter() - start) * 1e3)
    _free(device)
    return rows


def _variants(
    model: STPath, engines: list[Engine], slide: Slide, attention: str, device: str
) -> Iterator[tuple[Row, Callable[[], Call]]]:
    """What is measured, and what makes each ready."""
    n = len(slide)
    if attention == "global" and n <= LITERAL_UP_TO:
        yield Row("literal formula", attention, "fp32", n), lambda: _literal(model, slide, device)
    for precision, dtype in DTYPES.items():
        if device == "cpu" and precision != "fp32":
            continue  # PyTorch's lower precisions on a CPU are no one's choice
        yield (
            Row("PyTorch, eager", attention, precision, n),
            lambda dtype=dtype: _torch(model, slide, attention, device, dtype),
        )
        yield (
            Row("PyTorch, compiled", attention, precision, n),
            lambda dtype=dtype: _torch(model, slide, attention, device, dtype, compiled=True),
        )
        if attention == "global":
            yield (
                Row("PyTorch, FlexAttention", attention, precision, n),
                lambda dtype=dtype: _torch(model, slide, attention, device, dtype, compiled=True, flex=True),
            )
            yield (
                Row("PyTorch, Triton kernel", attention, precision, n),  # on a CPU it refuses, and the row says so
                lambda dtype=dtype: _torch(
                    model, slide, attention, device, dtype, compiled=device != "cpu", fused=True
                ),
            )
    for engine in engines:
        precision = engine.manifest.precision
        name = f"engine, {engine.backend.name}"
        yield Row(name, attention, precision, n), lambda engine=engine: _engine(engine, slide, attention)


def _engine(engine: Engine, slide: Slide, attention: str) -> Call:
    how = {"attention": "knn", "neighbors": K} if attention == "knn" else {"attention": "global"}
    names = engine.vocabulary.ensembl_ids[:GENES]
    return lambda: engine.decode(engine.embed(slide, **how), names)


def _torch(
    model: STPath,
    slide: Slide,
    attention: str,
    device: str,
    dtype: torch.dtype,
    compiled: bool = False,
    flex: bool = False,
    fused: bool = False,
) -> Call:
    """The collapsed model; neighbours and blocks are found in the call, as the engine does."""
    own = copy.deepcopy(model).to(device, dtype).fuse_attention(fused)
    for block in own.blocks if flex else ():
        block.attn.__class__ = FlexSpatialAttention
    tokens = torch.arange(2, 2 + GENES, device=device)
    forward = torch.compile(own, dynamic=True) if compiled else own
    vocabulary = _any_vocabulary(model)

    def call() -> np.ndarray:
        inputs: dict[str, Any] = slide_inputs(slide, vocabulary, dtype=dtype)
        if attention == "knn":
            inputs["blocks"] = KeyBlocks(*(part.to(device) for part in knn_blocks([slide.coords], K)))
        inputs = {name: part.to(device) if torch.is_tensor(part) else part for name, part in inputs.items()}
        with torch.inference_mode():
            return forward(**inputs, token_ids=tokens).float().cpu().numpy()

    return call


def _literal(model: STPath, slide: Slide, device: str) -> Call:
    own = copy.deepcopy(model).to(device)
    vocabulary = _any_vocabulary(model)

    def call() -> np.ndarray:
        inputs = slide_inputs(slide, vocabulary)
        inputs = {name: part.to(device) if torch.is_tensor(part) else part for name, part in inputs.items()}
        with torch.inference_mode(), torch.device(device):
            return literal_forward(own, **inputs)[1][:, 2 : 2 + GENES].cpu().numpy()

    return call


def _reference(model: STPath, slide: Slide, attention: str, device: str) -> np.ndarray | None:
    """The collapsed model in float64."""
    if attention == "global" and len(slide) > REFERENCE_UP_TO:
        return None
    expression = _torch(model, slide, attention, device, torch.float64)().astype(np.float64)
    _free(device)
    return expression


class FlexSpatialAttention(SpatialAttention):
    """Global attention by FlexAttention, which computes the distances in its kernel and keeps no scores.

    A class of its own: torch.compile notices another class, and does not notice that a method was patched.
    """

    def _attend_to_all(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, coords: torch.Tensor) -> torch.Tensor:
        weight = self.edge_bias[0].weight  # [H, 3]; on a CPU, PyTorch 2.13 compiles no view of it, nor of coords

        def biased(score, batch, head, row, column):
            dx, dy = coords[row, 0] - coords[column, 0], coords[row, 1] - coords[column, 1]
            return score + weight[head, 2] * torch.sqrt(dx * dx + dy * dy)

        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))  # [1, H, N, d/H]
        return flex_attention(q, k, v, score_mod=biased)[0].transpose(0, 1)


def _any_vocabulary(model: STPath) -> GeneVocabulary:
    """A vocabulary for slides without context, which names no gene."""
    return GeneVocabulary([f"ENSG{i:011d}" for i in range(model.config.n_tokens - 2)], [], [])


def _used(device: str) -> int | None:
    """Bytes of device memory that are taken, by whomever; None on a CPU."""
    if device == "cpu":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


@contextmanager
def _peak(device: str) -> Iterator[list[int]]:
    """The most device memory that is taken in the block, by whichever library: looked at every millisecond."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            most[0] = max(most[0], _used(device) or 0)
            time.sleep(1e-3)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _free(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _seeded(folder: Path) -> Path:
    save_checkpoint(seeded_checkpoint(PUBLISHED_SIZES, 0), folder / "checkpoint.safetensors")
    return folder / "checkpoint.safetensors"


def _exported(checkpoint: Path, genes: Path | None, folder: Path, device: str) -> list[Path]:
    for precision in DTYPES:
        if (precision, device) == ("bf16", "cpu"):
            continue  # proven on a GPU alone
        try:
            export_engine(checkpoint, folder / precision, genes, precision, device=device)
        except ParityError as error:  # a result, too
            Console().print(f"{precision}: {error}")
    return [path for precision in DTYPES if (path := folder / precision).is_dir()]


def _machine(device: str) -> dict[str, Any]:
    def known(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    dry = device == "cpu"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "dry_run": dry,
        "device": platform.processor() or platform.machine() if dry else torch.cuda.get_device_name(device),
        "free_bytes": None if dry else torch.cuda.mem_get_info(device)[0],
        "cuda": torch.version.cuda,
        "versions": {name: found for name in LIBRARIES if (found := known(name))},
        "commit": commit,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _print(n: int, rows: list[Row]) -> None:
    table = Table(title=f"{n:,} spots, {rows[0].attention}" + (f" {K}" if rows[0].attention == "knn" else ""))
    for column in ("variant", "precision", "median, ms", "spread", "peak memory, GB", "relative L2"):
        table.add_column(column, justify="left" if column in ("variant", "precision") else "right")
    for row in rows:
        if row.failed:
            table.add_row(row.variant, row.precision, row.failed)
            continue
        spread = f"{min(row.milliseconds):.1f} to {max(row.milliseconds):.1f}"
        memory = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}"
        error = "-" if row.relative_l2 is None else f"{row.relative_l2:.1e}"
        table.add_row(row.variant, row.precision, f"{row.median:.1f}", spread, memory, error)
    Console(width=None if Console().is_terminal else 140).print(table)


def _write(report: dict[str, Any], rows: list[Row], out: Path) -> None:
    name = ("dry-run-" if report["dry_run"] else "") + "-".join(report["device"].lower().split())
    out.mkdir(parents=True, exist_ok=True)
    with written_whole(out / f"{name}.json") as partial:
        table = [{**asdict(row), "median": row.median} for row in rows]
        partial.write_text(json.dumps({**report, "rows": table}, indent=1) + "\n")
    with written_whole(out / f"{name}.png") as partial:
        _plot(report, rows, partial)
    Console().print(out / f"{name}.json", out / f"{name}.png")


def _plot(report: dict[str, Any], rows: list[Row], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    title = f"{report['device']}: {GENES} genes, features on the host, random weights and features"
    figure.suptitle(("Dry run, no GPU. " if report["dry_run"] else "") + title)
    panels = figure.subplots(1, 2, sharey=True)
    names = list(dict.fromkeys((row.variant, row.precision) for row in rows))
    for axes, attention in zip(panels, ("global", "knn"), strict=True):
        for variant, precision in names:
            points = [
                (row.spots, row.median)
                for row in rows
                if (row.variant, row.precision, row.attention) == (variant, precision, attention) and row.milliseconds
            ]
            if points:
                style = "o-" if precision == "fp32" else "s--"
                color = f"C{[v for v, _ in names].index(variant)}"
                axes.plot(*zip(*points, strict=True), style, color=color, label=f"{variant}, {precision}")
        axes.set(xscale="log", yscale="log", xlabel="spots", title=attention + (f" {K}" if attention == "knn" else ""))
        axes.grid(alpha=0.3, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("milliseconds a slide")
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    typer.run(main)
