"""The engine beside PyTorch on one GPU: parity, latency and memory, by number of spots; JSON and PNG, named by the GPU.

    python benchmarks/gpu.py                                   # a GPU, the published sizes, everything, in 9 minutes
    python benchmarks/gpu.py --device cpu --spots 500 --knn-spots 500 --rounds 2
                                                               # the same code on the CPU: a dry run, and marked so

First what the device does at most: matrix products in each type, copies. Then parity of every variant on a small slide
with measured expression. Then the sizes: each variant is held to the float64 reference before it is timed. A call
starts with the features in host memory and ends with the expression of 50 genes there or, where a row says "device",
starts with the features and the plan of neighbours on the device and leaves the expression there. Calls are warm,
synchronised, and the variants take turns; the first call of each, which compiles and loads, stands beside them.
Results are written after each slide, so that what breaks off leaves what it found. Weights (where no checkpoint is
given) and features are random: the figures tell speed, not accuracy on tissue.
"""

from __future__ import annotations

import copy
import platform
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

import published
import tile_encoder
from gpu_report import Row, print_rows, write_report
from stpath_export.proof import random_slide
from stpath_runtime import Context, Engine, Slide
from stpath_runtime.files import sha256
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.measures.bench import alone, roofline
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint
from stpath_train.inputs import knn_blocks, slide_inputs
from stpath_train.literal import literal_forward
from stpath_train.model import ContextTokens, KeyBlocks, SpatialAttention, STPath
from variants import WRONG

K = 32
GENES = 50
LITERAL_UP_TO = 5_000  # spots: the literal formula holds [N, N, 4, 3] numbers
REFERENCE_UP_TO = {"global": 20_000, "knn": 200_000}  # spots: float64 takes its time, and its memory
SMALL = 37  # spots of the slide that parity is told on, with context
SIDE = 8_192  # of the matrices whose product is timed; 512 for a dry run
COPIED = 4 << 30  # bytes; 64 MiB for a dry run
TILES = 64  # that the tile encoder takes at once
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LIBRARIES = ("torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "numpy", "stpath-engine")
RESULTS = Path(__file__).parent / "results"
# Past the limit PyTorch would go on without compiling, and not say so.
torch._dynamo.config.recompile_limit = 64
torch._dynamo.config.fail_on_recompile_limit_hit = True
Call = Callable[[], np.ndarray | torch.Tensor]  # expression [N, GENES], float32 if it is on the host


def main(
    device: Annotated[str, typer.Option(help="cuda:N, or cpu for a dry run.")] = "cuda:0",
    spots: Annotated[str, typer.Option(metavar="N,N,...", help="Global attention.")] = "400,2500,6400,12100,19600",
    knn_spots: Annotated[str, typer.Option(metavar="N,N,...", help="KNN attention.")] = "19600,200000,1000000",
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each variant.")] = 20,
    minutes: Annotated[float, typer.Option(help="No slide is begun later than this.")] = 9,
    checkpoint: Annotated[Path | None, typer.Option(help="Left out: the published sizes, seeded weights.")] = None,
    engine: Annotated[list[Path] | None, typer.Option(help="Its engines; left out: exported, of each type.")] = None,
    backend: Annotated[str, typer.Option(help="What runs the engines.")] = "onnxruntime",
    depth: Annotated[int, typer.Option(help="Blocks of the tile encoder; 0: none is measured.")] = 40,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print, and write the results."""
    warnings.simplefilter("ignore")
    until = time.monotonic() + 60 * minutes
    checkpoint = checkpoint or published.checkpoint()
    model = load_checkpoint(checkpoint)
    report = _machine(device) | {
        "checkpoint": sha256(checkpoint),
        "genes": GENES,
        "neighbors": K,
        "rounds": rounds,
        "peaks": _peaks(device),
        "failed": {},
    }
    Console().print(report["peaks"])
    engines = _engines(engine, backend, device, report["failed"])
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        rows.extend(found)
        print_rows(report, found)
        write_report(report, rows, out)

    width = model.config.n_features
    for attention in ("global", "knn"):
        add(measure(model, engines, random_slide(SMALL, width, 0), attention, device, rounds=0, context=5))
    sizes = [("global", int(word)) for word in spots.split(",")] + [("knn", int(word)) for word in knn_spots.split(",")]
    for attention, n in sorted(sizes, key=lambda size: size[1]):
        if time.monotonic() > until:
            report["failed"][f"{attention}, {n:,} spots"] = f"not begun in {minutes:g} minutes"
            continue
        add(measure(model, engines, random_slide(n, width, n), attention, device, rounds))
    if depth:
        add(measure_tiles(depth, device, rounds))
    for attention, n in (max(sizes, key=lambda size: size[1] * (size[0] == kind)) for kind in ("global", "knn")):
        if time.monotonic() < until:
            add([_alone(each, attention, n, device) for each in engines])
    Console().print(*write_report(report, rows, out))


def measure(
    model: STPath, engines: list[Engine], slide: Slide, attention: str, device: str, rounds: int, context: int = 0
) -> list[Row]:
    """All variants on one slide: each checked and its memory watched, then all timed in turn."""
    known = _context(model, slide, context) if context else None
    exact = _reference(model, slide, attention, device, known)
    variants = list(_variants(model, engines, slide, attention, device, known))
    keys = roofline.keys_of_a_spot(slide.coords, attention, K)
    operations = roofline.encoder_operations(model.config, len(slide), keys)
    operations += roofline.decoder_operations(model.config, len(slide), GENES)
    for row, _ in variants:
        row.operations, row.context = operations, context
    return _measured(variants, exact, device, rounds)


def _measured(
    variants: list[tuple[Row, Callable[[], Call]]], exact: np.ndarray | None, device: str, rounds: int
) -> list[Row]:
    ready: list[tuple[Row, Call]] = []
    for row, make in variants:
        try:
            _free(device)  # what variants before it left in caches is not this one's
            call = make()
            start = time.perf_counter()
            found = _on_host(call())  # compiles and loads
            row.first = (time.perf_counter() - start) * 1e3
            row.relative_l2 = None if exact is None else relative_l2(found, exact)
            if not np.isfinite(found).all() or (exact is not None and not row.relative_l2 <= WRONG[row.precision]):
                row.failed = f"wrong: relative L2 {row.relative_l2 or np.nan:.1e}, above {WRONG[row.precision]:.0e}"
                continue  # a wrong result has no speed
            row.peak_bytes = _peak_of_torch(call, device)
            ready.append((row, call))
        except Exception as error:  # out of memory, or not to be had here: a result too
            row.failed = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            _free(device)
    for _ in range(rounds):
        for row, call in ready:
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            row.milliseconds.append((time.perf_counter() - start) * 1e3)
    _free(device)
    return [row for row, _ in variants]


def measure_tiles(depth: int, device: str, rounds: int) -> list[Row]:
    """A tile encoder of Gigapath's sizes, random weights, by timm in PyTorch: random tiles that are on the device."""
    import timm

    sizes = tile_encoder.SMALL if device == "cpu" else tile_encoder.GIGAPATH
    count = 2 if device == "cpu" else TILES
    with torch.device(device), torch.inference_mode():
        torch.manual_seed(0)
        model = timm.create_model(tile_encoder.ARCHITECTURE, pretrained=False, num_classes=0, depth=depth, **sizes)
        for name, weights in model.eval().named_parameters():
            if "gamma" in name:  # as 1e-5 would make every block the identity
                weights.uniform_(0.5, 1.5)
        tiles = torch.randn(count, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            model(tiles[:1])
        exact = copy.deepcopy(model).double()(tiles.double()).cpu().numpy()
    variants = []
    for precision, dtype in DTYPES.items():
        if device == "cpu" and precision != "fp32":
            continue  # as above
        for compiled in (False, True):
            name = "tile encoder, timm, " + ("compiled" if compiled else "eager")
            row = Row(name, "", precision, count, "device", operations=float(counter.get_total_flops() * count))
            variants.append((row, partial(_tiles, model, tiles, dtype, compiled)))
    return _measured(variants, exact, device, rounds)


def _tiles(model: torch.nn.Module, tiles: torch.Tensor, dtype: torch.dtype, compiled: bool) -> Call:
    own = copy.deepcopy(model).to(dtype)
    forward, given = (torch.compile(own) if compiled else own), tiles.to(dtype)

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return forward(given)

    return call


def _variants(
    model: STPath, engines: list[Engine], slide: Slide, attention: str, device: str, context: Context | None
) -> Iterator[tuple[Row, Callable[[], Call]]]:
    """What is measured, and what makes each ready."""
    n, on = len(slide), (slide, attention, device, context)
    if attention == "global" and n <= LITERAL_UP_TO:
        yield Row("literal formula", attention, "fp32", n), partial(_literal, model, slide, device, context)
    compiles = context is None  # with context it would be compiled once more
    for precision, dtype in DTYPES.items():
        if device == "cpu" and precision != "fp32":
            continue  # PyTorch's lower precisions on a CPU are no one's choice
        ways: dict[str, dict[str, bool]] = {"eager": {}}
        if compiles:
            ways["compiled"] = {"compiled": True}
        if attention == "global":
            # On a CPU the kernel refuses, and the row says so.
            ways["Triton kernel"] = {"compiled": compiles and device != "cpu", "fused": True}
        if attention == "global" and compiles:
            ways["FlexAttention"] = {"compiled": True, "flex": True}
        for name, how in ways.items():
            yield Row(f"PyTorch, {name}", attention, precision, n), partial(_torch, model, *on, dtype, **how)
        for name in ways.keys() & {"compiled", "Triton kernel"}:
            row = Row(f"PyTorch, {name}", attention, precision, n, "device")
            yield row, partial(_torch, model, *on, dtype, **ways[name], resident=True)
    for engine in engines:
        row = Row(f"engine, {engine.backend.name}", attention, engine.precision, n)
        yield row, partial(_engine, engine, slide, attention, context)


def _engine(engine: Engine, slide: Slide, attention: str, context: Context | None) -> Call:
    how = {"attention": "knn", "neighbors": K} if attention == "knn" else {"attention": "global"}
    names = engine.vocabulary.ensembl_ids[:GENES]
    if context is not None:  # by the names that this engine's vocabulary has
        context = replace(context, genes=engine.vocabulary.ensembl_ids[: context.counts.shape[1]])
    return lambda: engine.decode(engine.embed(slide, context=context, **how), names)


def _torch(
    model: STPath,
    slide: Slide,
    attention: str,
    device: str,
    context: Context | None,
    dtype: torch.dtype,
    compiled: bool = False,
    flex: bool = False,
    fused: bool = False,
    resident: bool = False,
) -> Call:
    """The collapsed model; unless `resident`, neighbours and blocks are found in the call, as the engine does."""
    forward = _forward(model, device, dtype, compiled, flex, fused)
    tokens = torch.arange(2, 2 + GENES, device=device)
    vocabulary = _any_vocabulary(model)

    def given() -> dict[str, Any]:
        inputs: dict[str, Any] = slide_inputs(slide, vocabulary, context, dtype=dtype)
        if attention == "knn":
            inputs["blocks"] = knn_blocks([slide.coords], K)
        return {name: _moved(part, device) for name, part in inputs.items()}

    there = given() if resident else None

    def call() -> np.ndarray | torch.Tensor:
        with torch.inference_mode():
            found = forward(**(there or given()), token_ids=tokens)
            return found if resident else _on_host(found)

    return call


@cache
def _forward(model: STPath, device: str, dtype: torch.dtype, compiled: bool, flex: bool, fused: bool) -> Any:
    """The model on the device; made once, as compiling takes longer than all calls do."""
    own = copy.deepcopy(model).to(device, dtype).fuse_attention(fused)
    for block in own.blocks if flex else ():
        block.attn.__class__ = FlexSpatialAttention
    return torch.compile(own, dynamic=True) if compiled else own


def _literal(model: STPath, slide: Slide, device: str, context: Context | None) -> Call:
    own = copy.deepcopy(model).to(device)
    vocabulary = _any_vocabulary(model)

    def call() -> np.ndarray:
        inputs = slide_inputs(slide, vocabulary, context)
        inputs = {name: _moved(part, device) for name, part in inputs.items()}
        with torch.inference_mode(), torch.device(device):
            return literal_forward(own, **inputs)[1][:, 2 : 2 + GENES].cpu().numpy()

    return call


def _moved(part: Any, device: str) -> Any:
    """An input of the model on the device."""
    if isinstance(part, ContextTokens):
        return ContextTokens(*(getattr(part, each.name).to(device) for each in fields(part)))
    if isinstance(part, KeyBlocks):
        return KeyBlocks(*(each.to(device) for each in part))
    return part.to(device) if torch.is_tensor(part) else part


def _on_host(found: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(found, np.ndarray):
        return found
    return (found if found.dtype == torch.float64 else found.float()).cpu().numpy()


def _reference(model: STPath, slide: Slide, attention: str, device: str, context: Context | None) -> np.ndarray | None:
    """The collapsed model in float64."""
    if len(slide) > REFERENCE_UP_TO[attention]:
        return None
    expression = _torch(model, slide, attention, device, context, torch.float64)()
    _free(device)
    return expression


def _context(model: STPath, slide: Slide, spots: int) -> Context:
    """Counts of a few genes at the first spots."""
    genes = _any_vocabulary(model).ensembl_ids[:GENES]
    return Context(np.arange(spots), np.random.default_rng(0).poisson(3, (spots, GENES)).astype(np.float32), genes)


def _engines(paths: list[Path] | None, backend: str, device: str, failed: dict[str, str]) -> list[Engine]:
    """Those given or, of each type, one made here; what fails is noted."""
    found = []
    precisions = [precision for precision in DTYPES if (precision, device) != ("bf16", "cpu")]
    for what in paths or precisions:
        try:
            path = what if isinstance(what, Path) else published.engine(what)
            found.append(Engine.load(path, backend=backend, device=device))
        except Exception as error:
            failed[f"engine {what}, {backend}"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
            Console().print(failed)
    return found


def _peaks(device: str) -> dict[str, float]:
    """Operations a second of matrix products in each type, and bytes a second that copies read and write."""
    side, copied = (SIDE, COPIED) if device != "cpu" else (512, 64 << 20)

    def best(work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(6):
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    peaks = {}
    for precision, dtype in DTYPES.items():
        a, b = torch.randn(2, side, side, device=device).to(dtype)
        peaks[precision] = 2 * side**3 / best(partial(torch.mm, a, b))
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    peaks["bytes"] = 2 * copied / best(partial(target.copy_, source))
    return peaks


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


def _alone(engine: Engine, attention: str, spots: int, device: str) -> Row:
    """The first call of a fresh process that does nothing else, and the device memory that it takes in all."""
    row = Row(f"engine, {engine.backend.name}, a fresh process", attention, engine.precision, spots)
    neighbors = K if attention == "knn" else None
    task = alone.Task(str(engine.path), spots, GENES, attention, neighbors, engine.backend.name, device)
    try:
        before = _used(device)
        with _peak(device) as peak:
            found = alone.run_alone(task)
        row.first = (found.load + found.encode + found.decode) * 1e3
        row.peak_bytes = None if before is None else peak[0] - before
    except Exception as error:
        row.failed = f"{type(error).__name__}: {error}"
    return row


def _peak_of_torch(call: Call, device: str) -> int | None:
    """Bytes that PyTorch allocates in a call beyond those that it has; None on a CPU, which it does not count."""
    if device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    _synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


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


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


def _free(device: str) -> None:
    if device != "cpu":
        _synchronize(device)
        torch.cuda.empty_cache()


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


if __name__ == "__main__":
    typer.run(main)
