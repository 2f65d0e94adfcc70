"""The Triton model repository without a server: its files, its graphs, its model.py on a stand-in for Triton."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from helpers import copy_with_knn, texts
from stpath_runtime import Engine, InputError, Slide
from stpath_runtime.cli.app import main
from stpath_runtime.encoding.attention import NearestSpots, Spots, keys_of
from stpath_runtime.errors import InputWarning
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.serving import repository as triton
from stpath_runtime.serving.repository import write_model_repository

DATA_TYPES = {"TYPE_FP32": np.float32, "TYPE_FP16": np.float16, "TYPE_INT64": np.int64, "TYPE_BOOL": np.bool_}


@pytest.fixture(scope="module", params=["global", "knn"])
def engine(request, tiny_engine, tmp_path_factory) -> Engine:
    if request.param == "global":
        return Engine.load(tiny_engine)
    return Engine.load(copy_with_knn(tiny_engine, tmp_path_factory.mktemp("knn") / "engine"))


@pytest.fixture(scope="module")
def repository(engine, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "models"
    write_model_repository(engine.path, out)
    return out


@pytest.fixture(scope="module")
def slide(tiny) -> Slide:
    return tiny.slides()[0][1]


def fused_name(engine: Engine) -> str:
    return "stpath_fused_knn" if engine.manifest.model.attention == "knn" else "stpath_fused"


def tensors(config: str, kind: str) -> dict[str, tuple[str, list[int]]]:
    """Name -> data type and dims of the inputs or outputs of a config.pbtxt."""
    lines = re.findall(rf'^{kind} {{ name: "(\w+)" data_type: (\w+) dims: \[(.*?)\]', config, re.MULTILINE)
    return {name: (data_type, [int(n) for n in dims.split(",")]) for name, data_type, dims in lines}


def test_repository_holds_all_it_needs(engine, repository):
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    onnx_models = {fused_name(engine), "stpath_tokens"}
    assert files == {
        *("stpath/config.pbtxt", "stpath/1/model.py", "stpath/1/engine/engine.json"),
        *(f"stpath/warmup/{name}" for name in ("genes", "coords", "features")),
        *(f"stpath/1/engine/{name}" for name in engine.manifest.files),
        *(f"{model}/{name}" for model in onnx_models for name in ("config.pbtxt", "1/model.onnx", "1/weights.bin")),
    }
    Engine.load(repository / "stpath" / "1" / "engine")  # hashes and all
    length, gene = (repository / "stpath" / "warmup" / "genes").read_bytes()[:4], engine.vocabulary.ensembl_ids[0]
    assert int.from_bytes(length, "little") == len(gene)
    assert not list(repository.parent.glob(".*"))


def test_onnx_models_declare_what_their_graphs_take(engine, repository):
    """Against the signature as `onnx` reads it from the file, name by name, in order."""
    for name in (fused_name(engine), "stpath_tokens"):
        config = (repository / name / "config.pbtxt").read_text()
        graph = onnx.load(repository / name / "1" / "model.onnx", load_external_data=False).graph
        assert f'name: "{name}"' in config
        assert 'platform: "onnxruntime_onnx"' in config
        for kind, values in (("input", graph.input), ("output", graph.output)):
            found = tensors(config, kind)
            assert list(found) == [value.name for value in values]
            for value in values:
                tensor = value.type.tensor_type
                data_type, dims = found[value.name]
                assert DATA_TYPES[data_type] == onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
                assert dims == [dim.dim_value or -1 for dim in tensor.shape.dim]


def test_fused_graph_gives_the_engines_numbers(engine, repository, slide, tmp_path):
    """Each model folder on its own, elsewhere: the weights resolve, and what a client would send gives the numbers."""
    tokens, fused = (
        onnxruntime.InferenceSession(shutil.copytree(repository / name, tmp_path / name) / "1" / "model.onnx")
        for name in ("stpath_tokens", fused_name(engine))
    )
    keys = keys_of([slide], Spots.of([slide], [None]), engine.manifest.model, "fp32", engine.attention())
    spots = keys.spots(slice(0, keys.rows))
    coords = {"coords": slide.normalized_coords().astype(np.float32)}
    (gene_rows,) = tokens.run(None, {"values": np.ones((1, 1), np.float32), "token_ids": np.array([1])})
    inputs = {
        "features": slide.features[spots],
        "organ": np.full(keys.rows, slide.organ_token),
        "technology": np.full(keys.rows, slide.technology_token),
        "gene_rows": gene_rows,
        "gene_row": np.zeros(keys.rows, np.int64),
        "token_ids": engine.vocabulary.tokens(["GENE3", "GENE7"]),
        **(keys.whole() if isinstance(keys, NearestSpots) else coords),
    }
    embedding, expression = fused.run(None, inputs)
    np.testing.assert_allclose(keys.of_spots(embedding), engine.embed(slide), atol=1e-5)
    expected = engine.predict(slide, genes=["GENE3", "GENE7"]).X
    np.testing.assert_allclose(keys.of_spots(expression), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "expected"),
    [("cpu", "count: 1 kind: KIND_CPU"), ("cuda", "kind: KIND_GPU gpus: [ 0 ]"), ("cuda:3", "gpus: [ 3 ]")],
)
def test_device_is_every_models(tiny_engine, tmp_path, device, expected):
    names = write_model_repository(tiny_engine, tmp_path / "models", device)
    for name in names:
        assert expected in (tmp_path / "models" / name / "config.pbtxt").read_text()


def test_files_are_copied_where_they_cannot_be_linked(tiny_engine, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    write_model_repository(tiny_engine, tmp_path / "models")
    weights = tmp_path / "models" / "stpath_fused" / "1" / "weights.bin"
    assert weights.stat().st_nlink == 1
    assert weights.read_bytes() == (tiny_engine / "weights.bin").read_bytes()


# The command


def assert_refused(capsys, words, *expected):
    assert main(["triton", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[")
    assert err.count("\n") == 1, err
    for word in expected:
        assert str(word) in err


def test_command_writes_the_repository(tiny_engine, tmp_path, capsys):
    out = tmp_path / "new" / "models"
    assert main(["triton", str(tiny_engine), "--out", str(out), "--device", "cuda:1"]) == 0
    assert capsys.readouterr().out == f"{out}: stpath, stpath_fused, stpath_tokens\n"
    assert "gpus: [ 1 ]" in (out / "stpath" / "config.pbtxt").read_text()


def test_what_exists_is_left_alone(tiny_engine, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "file").write_text("mine")
    assert_refused(capsys, [tiny_engine, "--out", tmp_path / "models"], tmp_path / "models", "exists already")
    assert_refused(capsys, [tiny_engine, "--out", tmp_path / "file"], tmp_path / "file", "exists already")
    assert not list((tmp_path / "models").iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_engine_is_refused(tiny_engine, tmp_path, capsys):
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    weights = bytearray((engine / "weights.bin").read_bytes())
    weights[100] ^= 1
    (engine / "weights.bin").write_bytes(weights)
    assert_refused(capsys, [engine, "--out", tmp_path / "models"], "weights.bin", "truncated or altered")
    (engine / "engine.json").unlink()
    assert_refused(capsys, [engine, "--out", tmp_path / "models"], engine, "not an engine")
    assert_refused(capsys, [tmp_path / "none", "--out", tmp_path / "models"], "not an engine (no such folder)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine"]


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_unknown_device_is_refused(tiny_engine, tmp_path, capsys, device):
    words = [tiny_engine, "--out", tmp_path / "models", "--device", device]
    assert_refused(capsys, words, repr(device), "cpu or cuda:N")


def test_nothing_half_written_is_left(tiny_engine, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(triton, "_write_onnx_model", full)
    assert_refused(capsys, [tiny_engine, "--out", tmp_path / "models"], "No space left on device")
    assert not list(tmp_path.iterdir())


# model.py, on a stand-in for what Triton gives it


class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array

    def as_numpy(self):
        return self.array


class TritonError:
    INVALID_ARG, UNAVAILABLE, INTERNAL = range(3)

    def __init__(self, message, code):
        self.message, self.code = message, code


@pytest.fixture
def server_log() -> list[str]:
    return []


@pytest.fixture
def start(server_log, monkeypatch):
    """Loads a repository's model.py as Triton does, from the file of which it is a copy: coverage follows that."""
    return lambda repository: _start(repository, server_log, monkeypatch)


@pytest.fixture
def served(repository, start):
    return start(repository)


def _start(repository, server_log, monkeypatch):
    packaged = Path(triton.__file__).with_name("model.py")
    assert (repository / "stpath" / "1" / "model.py").read_bytes() == packaged.read_bytes()
    stand_in = ModuleType("triton_python_backend_utils")
    stand_in.Tensor, stand_in.TritonError = Tensor, TritonError
    stand_in.InferenceResponse = lambda tensors=(), error=None: SimpleNamespace(tensors=tensors, error=error)
    stand_in.get_input_tensor_by_name = lambda request, name: request.get(name)
    stand_in.Logger = SimpleNamespace(log_error=server_log.append)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stand_in)
    spec = importlib.util.spec_from_file_location("stpath_runtime.serving.model", packaged)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    folder = {"model_repository": str(repository / "stpath"), "model_version": "1"}
    model.initialize({**folder, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    return model


def a_request(slide: Slide, **changed) -> dict[str, Tensor]:
    inputs = {"features": slide.features, "coords": slide.coords.astype(np.float64), "genes": texts("GENE3"), **changed}
    return {name: Tensor(name, array) for name, array in inputs.items() if array is not None}


def test_served_model_gives_the_engines_numbers(engine, served, slide):
    panel = a_request(
        slide, genes=texts("GENE7", "ALIAS3", "GENE7", "GENE3"), organ=texts("kidney"), technology=texts("ST")
    )
    everything = a_request(slide, genes=texts("all"))
    with pytest.warns(InputWarning, match="more than once"):
        first, second = served.execute([panel, everything])
    for response in (first, second):
        assert response.error is None
        assert [tensor.name for tensor in response.tensors] == ["expression", "columns"]
    renal = dataclasses.replace(slide, organ="Kidney", technology="Spatial Transcriptomics")
    plain = dataclasses.replace(slide, organ=None, technology=None)
    two = engine.predict(renal, genes=["GENE7", "GENE3"]).X
    np.testing.assert_array_equal(first.tensors[0].array, two)  # a column for each gene, in the order asked
    assert first.tensors[1].array.tolist() == [b"GENE7", b"ALIAS3"]
    np.testing.assert_array_equal(second.tensors[0].array, engine.predict(plain).X)
    assert second.tensors[0].array.dtype == np.float32


def test_stflow_is_served_with_its_samples(start, flow_engine, tmp_path):
    write_model_repository(flow_engine, tmp_path / "models")
    model, engine = start(tmp_path / "models"), Engine.load(flow_engine)
    rng = np.random.default_rng(0)
    slide = Slide(rng.random((40, 2)) * 900, rng.standard_normal((40, 24), np.float32))
    asked = {name: np.array([number]) for name, number in (("steps", 3), ("seed", 4), ("samples", 2))}
    many, one, wrong = model.execute([
        a_request(slide, genes=texts("GENE7", "GENE3"), **asked),
        a_request(slide, genes=texts("all")),
        a_request(slide, steps=np.array([1])),
    ])  # fmt: skip
    wanted = engine.predict(slide, genes=["GENE7", "GENE3"], steps=3, seed=4, samples=2)
    assert [tensor.name for tensor in many.tensors] == ["expression", "std", "columns"]
    np.testing.assert_array_equal(many.tensors[0].array, wanted.X)
    np.testing.assert_array_equal(many.tensors[1].array, wanted.layers["std"])
    np.testing.assert_array_equal(one.tensors[0].array, engine.predict(slide).X)
    assert one.tensors[1].array.shape == (0, 0)
    assert "steps must be a whole number from 2, not 1" in wrong.error.message


def test_tiles_are_served_as_their_features_are(tiny_engine, tiny_encoder, served, tmp_path):
    names = write_model_repository(tiny_engine, tmp_path / "models", encoder=tiny_encoder)
    assert names[-1] == "stpath_tiles"
    config = (tmp_path / "models" / "stpath_tiles" / "config.pbtxt").read_text()
    assert tensors(config, "input")["tiles"] == ("TYPE_UINT8", [-1, 224, 224, 3])
    model = type(served)()
    folder = {"model_repository": str(tmp_path / "models" / "stpath_tiles"), "model_version": "1"}
    model.initialize({**folder, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    rng = np.random.default_rng(0)
    tiles, coords = rng.integers(0, 256, (5, 224, 224, 3), dtype=np.uint8), rng.uniform(0, 9_000, (5, 2))
    request = {"tiles": tiles, "coords": coords, "genes": texts("GENE3")}
    good, bad = model.execute(
        [
            {name: Tensor(name, array) for name, array in each.items()}
            for each in (request, request | {"coords": coords[:2]})
        ]
    )
    with TileEncoder.load(tiny_encoder) as encoder:
        expected = Engine.load(tiny_engine).predict(Slide(coords, encoder(tiles)), genes=["GENE3"])
    np.testing.assert_allclose(good.tensors[0].array, expected.X, rtol=1e-5, atol=1e-6)
    assert "5 tiles but 2 rows of coords" in bad.error.message
    model.finalize()


def test_an_encoder_of_another_width_is_refused(tiny_encoder, tmp_path, golden_engine):
    if Engine.load(golden_engine).manifest.model.n_features == 96:
        pytest.skip("of the same width")
    with pytest.raises(InputError, match="gives 96 features, and"):
        write_model_repository(golden_engine, tmp_path / "models", encoder=tiny_encoder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"features": np.zeros((3, 96), np.float32)}, "3 rows of features"),
        ({"features": np.zeros((0, 96), np.float32), "coords": np.zeros((0, 2))}, "no spots"),
        ({"features": None}, "'features' is missing"),
        ({"coords": None}, "'coords' is missing"),
        ({"genes": None}, "no gene is asked for"),
        ({"genes": texts()}, "no gene is asked for"),
        ({"genes": texts("GENE3", "GENNE7")}, "unknown gene: 'GENNE7' (did you mean"),
        ({"genes": texts("GENE3", "all")}, "unknown gene: 'all'"),
        ({"genes": texts(b"\xff")}, "not text in UTF-8"),
        ({"organ": texts("Kidny")}, "unknown organ 'Kidny' (did you mean Kidney"),
        ({"organ": texts("")}, "unknown organ ''"),
        ({"technology": texts("Visum")}, "unknown technology 'Visum' (did you mean Visium"),
    ],
)
def test_wrong_input_is_one_line_and_the_next_is_answered(served, slide, server_log, changed, words):
    wrong, right = served.execute([a_request(slide, **changed), a_request(slide)])
    assert words in wrong.error.message
    assert "\n" not in wrong.error.message
    assert wrong.error.code == TritonError.INVALID_ARG
    assert right.error is None
    assert server_log == []


def test_genes_and_sizes_are_checked_before_the_work(served, slide, monkeypatch):
    monkeypatch.setattr(served.engine, "embed", None)
    (error,) = (response.error for response in served.execute([a_request(slide, genes=texts("GENNE7"))]))
    assert "unknown gene: 'GENNE7'" in error.message
    monkeypatch.setitem(type(served).execute.__globals__, "LARGEST", 8 * len(slide) + 3)  # two genes
    for genes in (texts("GENE1", "GENE2", "GENE3"), texts("all")):
        (error,) = (response.error for response in served.execute([a_request(slide, genes=genes)]))
        assert error.code == TritonError.INVALID_ARG
        assert error.message.endswith("more than a response holds; ask for at most 2 genes at a time")


def test_faults_leave_the_trace_in_the_servers_log(served, slide, server_log, monkeypatch):
    def fail(error):
        def embed(*_):
            raise error

        monkeypatch.setattr(served.engine, "embed", embed)
        return served.execute([a_request(slide)])[0].error

    error = fail(MemoryError("Unable to allocate 9 GiB"))
    assert error.code == TritonError.UNAVAILABLE
    assert "not enough memory (Unable to allocate 9 GiB)" in error.message
    assert server_log == []
    error = fail(ZeroDivisionError("of\nours"))
    assert error.code == TritonError.INTERNAL
    assert error.message.startswith("ZeroDivisionError: of ours; a fault of stpath-engine")
    assert "Traceback" in server_log[0]


def test_damaged_repository_is_not_served(engine, tmp_path, served):
    repository = tmp_path / "models"
    write_model_repository(engine.path, repository)
    weights = repository / "stpath" / "1" / "engine" / "weights.bin"
    raw = weights.read_bytes()
    weights.unlink()  # it is a link to the engine's own
    weights.write_bytes(raw[:-1])
    folder = {"model_repository": str(repository / "stpath"), "model_version": "1"}
    with pytest.raises(InputError, match="weights.bin: truncated or altered"):
        served.initialize({**folder, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
