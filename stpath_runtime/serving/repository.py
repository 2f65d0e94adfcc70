"""Writes a model repository for NVIDIA's Triton Inference Server from an engine.

    stpath/                    runs slides of any size as `Engine` does, in Triton's Python backend
        config.pbtxt
        warmup/                the request of the warm-up
        1/model.py             a copy of stpath_runtime/serving/model.py
        1/engine/              the engine
    stpath_fused/              the graph of all stages, in Triton's ONNX Runtime backend (stpath_fused_knn for a model
        config.pbtxt           that was trained to attend by kNN)
        1/model.onnx, weights.bin
    stpath_tokens/             the graph that gives the gene rows that the fused graph takes, there too
    stpath_tiles/              with a tile encoder: as stpath, but of uint8 tiles instead of features
        config.pbtxt
        warmup/
        1/model.py
        1/engine/, 1/encoder/

Source of the format: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..encoding.sizes import BLOCK
from ..engine import Engine
from ..errors import DeviceError, OutputError
from ..files import link_or_copy, require_writable, written_whole
from ..flow_engine import FlowEngine
from ..images.encoder import TileEncoder, noise, require_width
from ..manifest import ENCODER_MANIFEST, MANIFEST, WEIGHTS
from ..slides.slide import random_slide

VERSION = "1"
DATA_TYPES = {  # ONNX Runtime's names -> Triton's
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64",
    "tensor(bool)": "TYPE_BOOL",
}


def write_model_repository(
    engine: str | Path, out: str | Path, device: str = "cpu", encoder: str | Path | None = None
) -> list[str]:
    """Write a Triton model repository that holds all it needs of an engine.

    The engine's files are linked (hard links) where the file system can, else copied; as an engine's files are never
    written again, either is a copy of its own. The folder appears under its name only when it is whole.

    Parameters
    ----------
    engine
        An engine directory.
    out
        The folder to make.
    device
        Where Triton runs the models: "cpu" or "cuda:N"; "cuda" is "cuda:0". It need not be there now.
    encoder
        A tile encoder's folder, for a model that takes tiles; None: there is none.

    Returns
    -------
    list of str
        The names of the models.

    Raises
    ------
    InputError
        If `out` exists or cannot be written, the engine is missing or damaged, the device is no such name, or ONNX
        Runtime, which reads the graphs' inputs, is not installed.
    """
    out = Path(out)
    instances = _instance_group(device)
    if out.exists():
        raise OutputError(f"{out}: exists already; remove it or choose another folder")
    require_writable(out)
    loaded = Engine.load(engine)
    tiles = TileEncoder.load(encoder) if encoder is not None else None
    if tiles is not None:
        require_width(tiles.name, tiles.width, loaded.manifest.model.n_features, str(engine))
    graphs: tuple[str, ...] = ()  # STFlow has none of a whole slide
    if not isinstance(loaded, FlowEngine):
        graphs = ("fused_knn" if loaded.manifest.model.attention == "knn" else "fused", "tokens")
    with written_whole(out) as partial:
        _write_python_model(loaded, partial / "stpath", instances)
        for graph in graphs:
            _write_onnx_model(loaded.path / f"{graph}.onnx", partial / f"stpath_{graph}", instances)
        if tiles is not None:
            _write_python_model(loaded, partial / "stpath_tiles", instances, tiles)
    return ["stpath", *(f"stpath_{graph}" for graph in graphs), *(["stpath_tiles"] if tiles is not None else [])]


def _write_python_model(engine: Engine, folder: Path, instances: str, encoder: TileEncoder | None = None) -> None:
    version = folder / VERSION
    for name in (MANIFEST, *engine.manifest.files):
        link_or_copy(engine.path / name, version / "engine" / name)
    shutil.copyfile(Path(str(files("stpath_runtime.serving") / "model.py")), version / "model.py")
    gene = engine.vocabulary.ensembl_ids[0].encode()
    (folder / "warmup").mkdir()
    (folder / "warmup" / "genes").write_bytes(len(gene).to_bytes(4, "little") + gene)  # Triton's form of a string
    # Triton's own random data are random bits, among them NaN.
    spots = random_slide(BLOCK, engine.manifest.model.n_features, 0) if encoder is None else random_slide(1, 1, 0)
    (folder / "warmup" / "coords").write_bytes(spots.coords.astype("<f8").tobytes())
    shape, name, data_type = [engine.manifest.model.n_features], "features", "TYPE_FP32"
    if encoder is not None:
        for file in (ENCODER_MANIFEST, *encoder.manifest.files):
            link_or_copy(encoder.path / file, version / "encoder" / file)
        shape, name, data_type = [encoder.size, encoder.size, 3], "tiles", "TYPE_UINT8"
    given = spots.features.astype("<f4") if encoder is None else noise(1, encoder.size)
    (folder / "warmup" / name).write_bytes(given.tobytes())
    tensors = [
        _tensor("input", name, data_type, [-1, *shape]),
        _tensor("input", "coords", "TYPE_FP64", [-1, 2]),  # holds pixels, whole, and micrometres
        _tensor("input", "genes", "TYPE_STRING", [-1]),
        _tensor("input", "organ", "TYPE_STRING", [1], " optional: true"),
        _tensor("input", "technology", "TYPE_STRING", [1], " optional: true"),
        _tensor("output", "expression", "TYPE_FP32", [-1, -1]),
        _tensor("output", "columns", "TYPE_STRING", [-1]),
    ]
    if isinstance(engine, FlowEngine):
        tensors += [
            _tensor("input", name, "TYPE_INT64", [1], " optional: true") for name in ("steps", "seed", "samples")
        ]
        tensors += [_tensor("output", "std", "TYPE_FP32", [-1, -1])]
    _write_config(
        folder,
        'backend: "python"',
        tensors,
        instances,
        _warmup(
            {
                name: (data_type, given.shape),
                "coords": ("TYPE_FP64", spots.coords.shape),
                "genes": ("TYPE_STRING", (1,)),
            }
        ),
    )


def _write_onnx_model(graph: Path, folder: Path, instances: str) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is read, not run
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    ends = [("input", end) for end in session.get_inputs()] + [("output", end) for end in session.get_outputs()]
    tensors = [_tensor(kind, end.name, DATA_TYPES[end.type], _dims(end.shape)) for kind, end in ends]
    link_or_copy(graph, folder / VERSION / "model.onnx")
    link_or_copy(graph.with_name(WEIGHTS), folder / VERSION / WEIGHTS)  # the graph names it, beside itself
    _write_config(folder, 'platform: "onnxruntime_onnx"', tensors, instances)


def _write_config(folder: Path, runs_on: str, tensors: Sequence[str], instances: str, warmup: str = "") -> None:
    """Write config.pbtxt: a request is one slide, so no batching."""
    lines = [f'name: "{folder.name}"', runs_on, "max_batch_size: 0", *tensors, instances, warmup]
    (folder / "config.pbtxt").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _tensor(kind: str, name: str, data_type: str, dims: Sequence[int], more: str = "") -> str:
    return f'{kind} {{ name: "{name}" data_type: {data_type} dims: {list(dims)}{more} }}'


def _dims(shape: Sequence[Any]) -> list[int]:
    """A shape as ONNX Runtime gives it: sizes, or names of those that vary (-1 in Triton)."""
    return [size if isinstance(size, int) else -1 for size in shape]


def _instance_group(device: str) -> str:
    """One instance: it takes all cores, or the whole GPU, for the slide that it runs."""
    if device == "cpu":
        return "instance_group { count: 1 kind: KIND_CPU }"
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if match is None:
        raise DeviceError(f"unknown device {device!r} for Triton; give cpu or cuda:N")
    return f"instance_group {{ count: 1 kind: KIND_GPU gpus: [ {int(match[1] or 0)} ] }}"


def _warmup(inputs: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """A request that Triton runs before the model is ready, of the files in `warmup`: no user's is the first."""
    lines = ["model_warmup {", '  name: "first_request"', "  batch_size: 1"]
    for name, (data_type, dims) in inputs.items():
        data = f'data_type: {data_type} dims: {list(dims)} input_data_file: "{name}"'
        lines.append(f'  inputs {{ key: "{name}" value {{ {data} }} }}')
    return "\n".join([*lines, "}"])
