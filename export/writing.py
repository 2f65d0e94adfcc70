"""Writes an engine: modules as ONNX graphs, whose weights are in one file that they share; published once proven."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from stpath_runtime.errors import OutputError
from stpath_runtime.files import require_writable, sha256, written_whole
from stpath_runtime.manifest import GENES, WEIGHTS, FlowManifest, Manifest
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import GeneVocabulary

from .proof import Report, require_passed
from .stages import Graph

OPSET = 23
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PASSED_ON = ("k", "v", "k_next", "v_next")  # from stage to stage, as they are
SHARED_FROM_BYTES = 1024  # smaller tensors stay in the graph, where every tool can fold them
ALIGNMENT = 64
LIBRARIES = ("stpath-engine", "torch", "onnx", "onnxscript", "onnxruntime", "numpy")

_traces: dict[Hashable, ir.Model] = {}  # without their weights, not yet optimized; tracing is what an export waits for


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


def require_free(out: Path) -> None:
    """Check that nothing is at `out`, and that it can be written.

    Raises
    ------
    InputError
        If it is not so.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already; remove it or choose another folder")
    require_writable(out)


def publish(out: Path, write: Callable[[Path], Manifest | FlowManifest], prove: Callable[[Path], Report]) -> Report:
    """Write an engine into a folder of its own, prove it there, and only then move it to `out`.

    Raises
    ------
    ParityError
        If it misses the bar; nothing is left at `out`.
    """
    with written_whole(out) as directory:
        directory.mkdir()
        manifest = write(directory)
        report = prove(directory)
        require_passed(report)
        replace(manifest, parity=report).write(directory)
    return report


def write_files(
    graphs: Sequence[Graph],
    vocabulary: GeneVocabulary,
    directory: Path,
    precision: str,
    checkpoint: dict[str, str],
    on_step: OnTile | None = None,
) -> dict[str, Any]:
    """Write graphs, weights and vocabulary into an empty folder; returns what manifests of either model say of them.

    Parameters
    ----------
    checkpoint
        Name and sha256 of what the weights are from.
    on_step
        Called with (done, total) after each graph; the proof is the last step.
    """
    weights = SharedWeights(directory / WEIGHTS)
    for done, graph in enumerate(graphs, 1):
        write_graph(graph, weights, directory)
        if on_step is not None:
            on_step(done, len(graphs) + 1)
    vocabulary.write(directory / GENES)
    return {
        "precision": precision,
        "opset": OPSET,
        "checkpoint": checkpoint,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {path.name: sha256(path) for path in sorted(directory.iterdir())},
        "versions": {name: version(name) for name in LIBRARIES},
        "parity": {},
    }


def write_graph(graph: Graph, weights: SharedWeights, directory: Path) -> None:
    """Write a graph into a folder, and its larger weights into their file."""
    model = _traced(graph)
    _widen_ends(model)
    _tidy(model)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes >= SHARED_FROM_BYTES:
            value.const_value = weights.add(tensor, value.name or "")
    ir.save(model, directory / f"{graph.name}.onnx")


def _traced(graph: Graph) -> ir.Model:
    """A module as an ONNX model, optimized; modules that differ in their weights alone are traced once."""
    layout = (type(graph.module).__name__, *graph.inputs, graph.outputs, graph.layout)
    tensors = graph.module.state_dict()
    with warnings.catch_warnings(), _quiet("torch.onnx"), torch.no_grad():
        warnings.simplefilter("ignore")  # notes of the exporter about itself, and about weights that have two names
        if layout not in _traces:
            _traces[layout] = _trace(graph)
        program = torch.onnx.ONNXProgram(_traces[layout].clone(), None)
        program.apply_weights(tensors)
        named = {tensors[name].data_ptr() for name in tensors.keys() & program.model.graph.initializers.keys()}
        if named != {tensor.data_ptr() for tensor in tensors.values()}:
            raise AssertionError(f"{graph.name}: its trace does not hold all of its weights by name")
        program.optimize()  # not before: it folds what is computed of weights
    return program.model


def _trace(graph: Graph) -> ir.Model:
    """A module's operators, with the names of its weights."""
    program = torch.onnx.export(
        graph.module,
        tuple(graph.inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(graph.inputs),
        output_names=list(graph.outputs),
        dynamic_shapes=tuple(graph.sizes.values()),
        verbose=False,
        optimize=False,
    )
    assert program is not None
    for name in graph.module.state_dict().keys() & program.model.graph.initializers.keys():
        program.model.graph.initializers[name].const_value = None
    return program.model


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
