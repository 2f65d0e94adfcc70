"""TensorRT plans of an engine: for which shapes they are built, what they are built from, and the check of both.

    ENGINE/plans/tensorrt-10.14.1.48-sm_90/     one folder for each TensorRT and each generation of GPUs
        plans.json                              what they are, and the hash of each plan and of what it was built from
        tokens.plan, embed.plan, block_1.plan, ...
        timing.cache                            what TensorRT measured while it built

A plan is no file of the engine: the manifest does not know it, and the engine is the same with and without plans.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ..encoding.sizes import (
    BLOCK,
    DECODED_ROWS,
    GENES_AT_ONCE,
    MOST_ELEMENTS,
    MOST_ROWS,
    PAD_KEYS,
    SAMPLES_AT_ONCE,
    USUAL_KEYS,
)
from ..errors import InstallError, OptionError, PlanError
from ..files import sha256
from ..manifest import (
    ENCODER_GRAPH,
    WEIGHTS,
    EncoderManifest,
    FlowConfig,
    FlowManifest,
    Manifest,
    ModelConfig,
    graph_files,
    read_manifest,
)
from ..records import record

SCHEMA = 1
FOLDER = "plans"
SIDECAR = "plans.json"
TIMING_CACHE = "timing.cache"
LIBRARIES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}  # backend, and the module that it imports
INSTALL = {
    "tensorrt": "run: pip install 'stpath-engine[tensorrt]'; if its libraries do not come from your package index, add "
    "--extra-index-url https://pypi.nvidia.com, or use NVIDIA's TensorRT container",
    "tensorrt_rtx": "run: pip install 'stpath-engine[tensorrt-rtx]'",
}
# TensorRT picks the kernels that are fastest at one shape, and runs them on all of the range. Shapes of usual slides:
USUAL_SPOTS = 4_992  # of a Visium slide
USUAL_GENES, USUAL_DECODED = 8_192, 2_048  # of a tile of all genes
USUAL_CONTEXT = 1_000  # genes
USUAL_TILES, MOST_TILES = 64, 256  # of a batch of a tile encoder

Axis = int | tuple[int, int, int]  # fixed, or the least, usual and largest size
Range = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # the least, usual and largest shape


@dataclass(frozen=True)
class Plan:
    """The entry of one plan in plans.json."""

    sha256: str
    onnx: str  # SHA-256 of the graph that it was built from
    seconds: float  # that the build took
    ranges: dict[str, tuple[tuple[int, ...], ...]]  # input -> Range


@dataclass(frozen=True)
class Plans:
    """The contents of plans.json."""

    schema: int
    library: str  # of LIBRARIES
    version: str  # of the library
    target: str  # the generation of GPUs, such as "sm_90"
    gpu: str  # the GPU on which they were built; "" where there was none
    max_spots: int
    created: str  # ISO 8601, UTC
    weights: str  # SHA-256 of the weights that the graphs share
    plans: dict[str, Plan]  # by graph

    def write(self, folder: Path) -> None:
        """Write plans.json."""
        (folder / SIDECAR).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plans:
        """Read plans.json.

        Raises
        ------
        ValueError
            If it is not there, damaged, or of another schema.
        """
        try:
            plans = record(cls, json.loads((folder / SIDECAR).read_text(encoding="utf-8")))
        except (OSError, RecursionError) as error:
            raise ValueError(str(error)) from error
        if plans.schema != SCHEMA:
            raise ValueError(f"schema {plans.schema}, this version reads {SCHEMA}")
        for graph, plan in plans.plans.items():
            for name, shapes in plan.ranges.items():
                if len(shapes) != 3 or len({len(shape) for shape in shapes}) != 1:
                    raise ValueError(f"plans[{graph!r}].ranges[{name!r}] is not a least, usual and largest shape")
        return plans

    def seconds(self) -> float:
        """How long they took to build."""
        return float(sum(plan.seconds for plan in self.plans.values()))

    def ranges(self, graph: str) -> dict[str, Range]:
        """The shapes that a graph's inputs may have."""
        return {name: (least, usual, largest) for name, (least, usual, largest) in self.plans[graph].ranges.items()}


def import_tensorrt(library: str) -> ModuleType:
    """The module of that name.

    Raises
    ------
    InputError
        If it is not installed, or its libraries do not load.
    """
    try:
        return import_module(library)
    except (ImportError, OSError, RuntimeError) as error:
        raise InstallError(f"{LIBRARIES[library]} cannot be imported ({error}); {INSTALL[library]}") from error


def quiet_logger(trt: ModuleType) -> Any:
    """A logger of TensorRT that prints nothing and keeps the errors, as `errors`."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def last_error(log: Any) -> str:
    """TensorRT's last error, in one line."""
    return " ".join(str(log.errors[-1]).split()) if log.errors else "no reason given"


def stage_graphs(model: ModelConfig) -> list[str]:
    """The graphs that plans are built from: the stages, not the fused ones, which hold all scores at once."""
    names = [name.removesuffix(".onnx") for name in graph_files(model.n_layers)]
    return [name for name in names if not name.startswith("fused")]


def planned(manifest: Manifest | FlowManifest | EncoderManifest, max_spots: int) -> dict[str, dict[str, Range]]:
    """The graphs that plans are built from, and the shapes of their inputs.

    Raises
    ------
    InputError
        As `input_ranges`.
    """
    if isinstance(manifest, EncoderManifest):
        size = manifest.size
        return {ENCODER_GRAPH: {"tiles": _range(((1, USUAL_TILES, MOST_TILES), size, size, 3))}}
    if isinstance(manifest, FlowManifest):
        return flow_ranges(manifest.model, max_spots)
    return {graph: input_ranges(graph, manifest.model, max_spots) for graph in stage_graphs(manifest.model)}


def input_ranges(graph: str, model: ModelConfig, max_spots: int) -> dict[str, Range]:
    """The shapes that each input of a stage may have: those of the encoder's tiles, with at most `max_spots` keys.

    Raises
    ------
    InputError
        If a tensor would have more elements than TensorRT can count.
    """
    # The scores of a tile, and the keys of its blocks, are the largest tensors.
    most = MOST_ELEMENTS // (MOST_ROWS * max(model.n_heads, model.d_model // BLOCK)) // BLOCK * BLOCK
    if not 1 <= max_spots <= most:
        raise OptionError(
            f"--max-spots {max_spots:,}: give 1 to {most:,}; larger slides run by kNN attention, in tiles"
        )
    spots = -(-max_spots // BLOCK) * BLOCK  # kNN keys come in eights, and rows in blocks
    head, knn = graph == "head", graph.startswith("knn_block")
    d, blocks = model.d_model, (1, MOST_ROWS // BLOCK, MOST_ROWS // BLOCK)
    rows = (BLOCK if knn else 1, MOST_ROWS, MOST_ROWS)
    # Blocks index their keys among all rows of a slide: only k and v themselves grow with the slide.
    keys = (1, USUAL_SPOTS, MOST_ELEMENTS // d // BLOCK * BLOCK) if knn else (1, min(USUAL_SPOTS, spots), spots)
    keys_of_block = (PAD_KEYS, min(USUAL_KEYS, spots), spots)
    most_genes = min(GENES_AT_ONCE, model.n_tokens) if head else model.n_tokens
    genes = (1, min(USUAL_GENES if head else USUAL_CONTEXT, most_genes), most_genes)
    axes: dict[str, tuple[Axis, ...]] = {
        "values": (rows, genes),
        "token_ids": (genes,),
        "features": (rows, model.n_features),
        "organ": (rows,),
        "technology": (rows,),
        "gene_rows": (rows, d),
        "gene_row": (rows,),
        "x": (rows, d),
        "coords": (rows, 2),
        "k": (keys, d),
        "v": (keys, d),
        "key_coords": (keys, 2),
        "key_bias": (keys,),
        "key_index": (blocks, keys_of_block),
        "mask": (blocks, BLOCK, keys_of_block),
        "embedding": ((1, USUAL_DECODED, DECODED_ROWS), d),
    }
    return {name: _range(axes[name]) for name in _inputs(graph)}


def flow_ranges(model: FlowConfig, max_spots: int) -> dict[str, dict[str, Range]]:
    """The graphs of an STFlow engine, and the shapes that each input may have: slides of at most `max_spots`.

    Raises
    ------
    InputError
        If a tensor would have more elements than TensorRT can count.
    """
    d, most = model.d_model, MOST_ELEMENTS // (SAMPLES_AT_ONCE * max(model.d_model, model.n_genes))
    if not 1 <= max_spots <= most:
        raise OptionError(f"--max-spots {max_spots:,}: give 1 to {most:,}")
    rows, slide = (1, MOST_ROWS, MOST_ROWS), (1, min(USUAL_SPOTS, max_spots), max_spots)
    near, samples = (1, model.neighbors, model.neighbors), (1, 1, SAMPLES_AT_ONCE)
    axes: dict[str, tuple[Axis, ...]] = {
        "features": (rows, model.n_features),
        "frames": (rows, near, 3),
        "tokens": (slide, d),
        "h": (slide, samples, d),
        "y": (slide, samples, model.n_genes),
        "keys": ((1, 2 * MOST_ROWS, MOST_ROWS * (model.neighbors + 1)),),
        "neighbors": (rows, near),
        "edges": (rows, near, model.d_edge),
        "time": (1,),
        "total": (rows, samples, model.n_genes),
        "state": (rows, samples, model.n_genes),
        "rate": (1,),
    }
    ends = {"image": ["features"]}
    for layer in range(1, model.n_layers + 1):
        first, last = layer == 1, layer == model.n_layers
        ends[f"edges_{layer}"] = ["frames"]
        ends[f"layer_{layer}"] = ["tokens" if first else "h", "y", "keys", "neighbors", "edges"]
        ends[f"layer_{layer}"] += ["time" if first else "total"] + ["state", "rate"] * last
    return {graph: {name: _range(axes[name]) for name in names} for graph, names in ends.items()}


def _inputs(graph: str) -> list[str]:
    kind = graph.rstrip("0123456789")
    return {
        "tokens": "values token_ids",
        "embed": "features organ technology gene_rows gene_row",
        "block_": "x coords k v key_coords key_bias",
        "knn_block_": "x coords k v key_coords key_index mask",
        "head": "embedding token_ids",
    }[kind].split()


def _range(axes: tuple[Axis, ...]) -> Range:
    least, usual, largest = zip(*((axis,) * 3 if isinstance(axis, int) else axis for axis in axes), strict=True)
    return least, usual, largest


def plans_folder(engine: Path, library: str, version: str, target: str) -> Path:
    """Where the plans of a TensorRT and a generation of GPUs are."""
    return engine / FOLDER / f"{library}-{version}-{target}"


def check_plans(engine: Path, library: str, version: str, target: str, fix: str) -> Plans:
    """The plans of an engine for a TensorRT and a generation of GPUs, each checked against its hash.

    Parameters
    ----------
    fix
        The command that builds them, for messages.

    Raises
    ------
    InputError
        If there are none, or they are damaged, or of another TensorRT, GPU or graph; the message names both sides.
    """
    folder = plans_folder(engine, library, version, target)
    wanted = f"{LIBRARIES[library]} {version} on {target}"
    if not folder.is_dir():
        others = ", ".join(sorted(path.parent.name for path in (engine / FOLDER).glob(f"[!.]*/{SIDECAR}"))) or "none"
        raise PlanError(f"{engine}: no plans for {wanted}; it has {others}; {fix}")
    try:
        plans = Plans.read(folder)
    except ValueError as error:
        raise PlanError(f"{folder / SIDECAR}: damaged ({error}); {fix}") from error
    if (plans.library, plans.version, plans.target) != (library, version, target):
        built = f"{LIBRARIES.get(plans.library, plans.library)} {plans.version} on {plans.target}"
        raise PlanError(f"{folder}: built for {built}, and this is {wanted}; {fix}")
    _check_sources(engine, folder, plans, fix)
    for graph, plan in plans.plans.items():
        path = folder / f"{graph}.plan"
        if not path.is_file():
            raise PlanError(f"{path}: missing; {fix}")
        if sha256(path) != plan.sha256:
            raise PlanError(f"{path}: truncated or altered (its SHA-256 is not the one in {SIDECAR}); {fix}")
    return plans


def _check_sources(engine: Path, folder: Path, plans: Plans, fix: str) -> None:
    """Compare what the plans were built from with the engine's manifest."""
    manifest = read_manifest(engine)
    built = {f"{graph}.onnx": plan.onnx for graph, plan in plans.plans.items()} | {WEIGHTS: plans.weights}
    for name in (WEIGHTS, *(f"{graph}.onnx" for graph in planned(manifest, 1))):
        theirs, ours = str(built.get(name)), manifest.files[name]
        if theirs != ours:
            raise PlanError(
                f"{folder}: built from another {name} (SHA-256 {theirs[:12]}…; the engine's is {ours[:12]}…); {fix}"
            )
