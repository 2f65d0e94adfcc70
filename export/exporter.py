"""Writes an engine directory from a checkpoint, and publishes it only after its proof of parity."""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch

from stpath_runtime.errors import OptionError, OutputError, VocabularyError
from stpath_runtime.files import require_writable, sha256, written_whole
from stpath_runtime.manifest import GENES, SCHEMA, WEIGHTS, Manifest
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint, require_genes
from stpath_train.model import STPath

from .proof import Report, prove, require_passed
from .stages import Graph, graphs

OPSET = 23
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PASSED_ON = ("k", "v", "k_next", "v_next")  # from stage to stage, as they are
SHARED_FROM_BYTES = 1024  # smaller tensors stay in the graph, where every tool can fold them
ALIGNMENT = 64
ENCODERS = {1536: "Gigapath tile features"}  # by width
LIBRARIES = ("stpath-engine", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")


class SharedWeights:
    """One file of weights for all graphs; equal tensors are written once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets: dict[str, int] = {}
        path.touch()

    def add(self, tensor: ir.TensorProtocol, name: str) -> ir.ExternalTensor:
        """Write a tensor unless it is there, and return what refers to it."""
        raw = tensor.tobytes()
        digest = hashlib.sha256(raw).hexdigest()
        if digest not in self._offsets:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                self._offsets[digest] = file.tell()
                file.write(raw)
        return ir.ExternalTensor(
            self.path.name,
            self._offsets[digest],
            len(raw),
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=name,
        )


def export_engine(
    checkpoint: Path,
    out: Path,
    genes: Path | None = None,
    precision: str = "fp32",
    on_step: OnTile | None = None,
    device: str = "cpu",
) -> Report:
    """Export a checkpoint as an engine directory, prove its parity, and only then publish it at `out`.

    Parameters
    ----------
    genes
        The model's gene vocabulary (`symbol2ensembl.json`); None means STPath's published one.
    precision
        "fp32", "fp16" or "bf16".
    on_step
        Called with (done, total) as the work goes on.
    device
        Where the proof runs: "cpu" or "cuda:N"; on a CPU ONNX Runtime does not compute in bfloat16.

    Raises
    ------
    InputError
        If `out` exists, or the checkpoint or the vocabulary is at fault.
    ParityError
        If the engine misses the bar; nothing is left at `out`.
    """
    if precision not in DTYPES:
        raise OptionError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    if (precision, device) == ("bf16", "cpu"):
        raise OptionError(
            "precision bf16: the proof of such an engine runs on a GPU; give --device cuda:0, or for bfloat16 on a CPU "
            "export with --precision fp32 and run with --backend openvino --precision bf16"
        )
    if out.exists():
        raise OutputError(f"{out}: exists already; remove it or choose another folder")
    require_writable(out)
    model = load_checkpoint(checkpoint)
    vocabulary = read_vocabulary(genes, model, str(checkpoint))
    require_genes(checkpoint, vocabulary, str(genes or "the published vocabulary"))
    source = {"name": checkpoint.name, "sha256": sha256(checkpoint)}
    with written_whole(out) as directory:
        directory.mkdir()
        manifest = write_engine(model, vocabulary, directory, precision, source, on_step)
        report = prove(directory, model, device=device)
        require_passed(report)
        Manifest(**{**vars(manifest), "parity": report}).write(directory)
    return report


def read_vocabulary(genes: Path | None, model: STPath, name: str) -> GeneVocabulary:
    """The vocabulary of a model, checked against its number of tokens.

    Raises
    ------
    InputError
        If it cannot be read or has another number of genes.
    """
    vocabulary = GeneVocabulary.published() if genes is None else GeneVocabulary.read(genes)
    if vocabulary.n_tokens != model.config.n_tokens:
        source = genes or "the published vocabulary"
        raise VocabularyError(
            f"{name}: the checkpoint has {model.config.n_tokens:,} gene tokens, but {source} gives "
            f"{vocabulary.n_tokens:,} ({len(vocabulary):,} genes and 2); give the model's own with --genes"
        )
    return vocabulary


def write_engine(
    model: STPath,
    vocabulary: GeneVocabulary,
    directory: Path,
    precision: str,
    checkpoint: dict[str, str],
    on_step: OnTile | None = None,
) -> Manifest:
    """Write graphs, weights, vocabulary and manifest, without a proof, into an empty directory."""
    weights = SharedWeights(directory / WEIGHTS)
    todo = graphs(copy.deepcopy(model).to(DTYPES[precision]))  # a copy: the reference stays in its own type
    for done, graph in enumerate(todo):
        if on_step is not None:
            on_step(done, len(todo) + 1)  # the proof is the last step
        _write_graph(graph, weights, directory)
    if on_step is not None:
        on_step(len(todo), len(todo) + 1)
    vocabulary.write(directory / GENES)
    config = model.config
    manifest = Manifest(
        schema=SCHEMA,
        model=config,
        precision=precision,
        opset=OPSET,
        encoder=ENCODERS.get(config.n_features, "the encoder that the model was trained on"),
        checkpoint=checkpoint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.name: sha256(path) for path in sorted(directory.iterdir())},
        versions={name: version(name) for name in LIBRARIES},
        parity={},
    )
    manifest.write(directory)
    return manifest


def _write_graph(graph: Graph, weights: SharedWeights, directory: Path) -> None:
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")  # notes of the exporter about itself
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=tuple(graph.sizes.values()),
            verbose=False,
        )
    assert program is not None
    model = program.model
    _widen_ends(model)
    _tidy(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= SHARED_FROM_BYTES:
            value.const_value = weights.add(tensor, value.name or "")
    ir.save(model, directory / f"{graph.name}.onnx")


def _widen_ends(model: ir.Model) -> None:
    """Make the ends that are bfloat16 float32, but for k and v, which stay on the device: NumPy has no bfloat16."""
    graph = model.graph
    for i, end in enumerate(graph.inputs):
        if end.dtype == ir.DataType.BFLOAT16 and end.name not in PASSED_ON:
            wide = ir.Value(name=end.name, shape=end.shape, type=ir.TensorType(ir.DataType.FLOAT))
            cast = ir.node("Cast", [wide], {"to": ir.DataType.BFLOAT16})
            ir.convenience.replace_all_uses_with(end, cast.outputs[0])
            graph.inputs[i] = wide
            graph.insert_before(graph[0], cast)
    for i, end in enumerate(graph.outputs):
        if end.dtype == ir.DataType.BFLOAT16 and end.name not in PASSED_ON:
            cast = ir.node("Cast", [end], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name, end.name = end.name, None
            cast.outputs[0].shape, cast.outputs[0].type = end.shape, ir.TensorType(ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[i] = cast.outputs[0]


def _tidy(model: ir.Model) -> None:
    """Drop the exporter's traces (with paths of the machine), and names that may be those of the graph's own ends."""
    graph = model.graph
    ends = {id(value) for value in graph.outputs}
    values = [*graph.inputs, *graph.initializers.values(), *graph.outputs]
    for i, node in enumerate(graph):
        node.doc_string = None
        for j, value in enumerate(node.outputs):
            if id(value) not in ends:
                value.name = f"node_{i}_{j}"
        values += node.outputs
    for traced in (model, graph, *graph, *values):
        traced.metadata_props.clear()


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
