"""Slides over HTTP and gRPC from a real Triton server: the engine's numbers, each client its own, and its errors."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from servers import running, start, stop

from helpers import copy_with_knn, texts
from stpath_runtime import Engine, Slide
from stpath_runtime.files import sha256
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.manifest import Manifest
from stpath_runtime.serving.repository import write_model_repository

http = pytest.importorskip("tritonclient.http", reason="no Triton server is installed; make test-triton installs one")
grpc = pytest.importorskip("tritonclient.grpc")
text_format = pytest.importorskip("google.protobuf.text_format")
utils = pytest.importorskip("tritonclient.utils")

pytestmark = pytest.mark.triton
PROTOCOLS = {"http": http, "grpc": grpc}
PANEL = ["GENE7", "ALIAS3", "ENSG00000000011"]


@pytest.fixture(scope="module", params=["global", "knn"])
def engine(request, tiny_engine, tmp_path_factory) -> Engine:
    if request.param == "global":
        return Engine.load(tiny_engine)
    return Engine.load(copy_with_knn(tiny_engine, tmp_path_factory.mktemp("knn") / "engine"))


@pytest.fixture(scope="module")
def server(engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton")
    write_model_repository(engine.path, folder / "models")
    with running(folder / "models", folder / "log") as ready:
        yield ready


def a_slide(engine: Engine, spots: int, seed: int = 0, **names) -> Slide:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((spots, engine.manifest.model.n_features)).astype(np.float32)
    return Slide(rng.integers(0, 40_000, (spots, 2)), features, **names)


def inputs_of(slide: Slide, *genes: str) -> dict[str, np.ndarray]:
    inputs = {"features": slide.features, "coords": slide.coords.astype(np.float64), "genes": texts(*genes)}
    names = {"organ": slide.organ, "technology": slide.technology}
    return inputs | {key: texts(name) for key, name in names.items() if name is not None}


def ask(server, protocol: str, inputs: dict[str, np.ndarray], model: str = "stpath") -> np.ndarray:
    """One request, by a client of its own."""
    triton = PROTOCOLS[protocol]
    tensors = []
    for name, array in inputs.items():
        tensor = triton.InferInput(name, list(array.shape), utils.np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    client = triton.InferenceServerClient(getattr(server, protocol))
    try:
        return client.infer(model, tensors).as_numpy("expression")
    finally:
        client.close()


def assert_answers(server, engine: Engine, protocol: str) -> None:
    slide = a_slide(engine, 7)
    found = ask(server, protocol, inputs_of(slide, *PANEL))
    np.testing.assert_allclose(found, engine.predict(slide, genes=PANEL).X, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("spots", [1, 65, 500])
@pytest.mark.parametrize("names", [{}, {"organ": "kidney", "technology": "visium-hd"}], ids=["unnamed", "named"])
def test_served_slides_have_the_engines_numbers(server, engine, protocol, spots, names):
    slide = a_slide(engine, spots, **names)
    for genes in (PANEL, None):
        found = ask(server, protocol, inputs_of(slide, *(genes or ["all"])))
        expected = engine.predict(slide, genes=genes).X
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tiles_are_served_as_their_features_are(engine, tiny_encoder, protocol, tmp_path):
    if engine.manifest.model.attention != "global":
        pytest.skip("once is enough")
    write_model_repository(engine.path, tmp_path / "models", encoder=tiny_encoder)
    rng = np.random.default_rng(0)
    tiles, coords = rng.integers(0, 256, (9, 224, 224, 3), dtype=np.uint8), rng.uniform(0, 9_000, (9, 2))
    with TileEncoder.load(tiny_encoder) as encoder:
        slide = Slide(coords, encoder(tiles))
    with running(tmp_path / "models", tmp_path / "log") as server:
        inputs = {"tiles": tiles, "coords": coords, "genes": texts(*PANEL)}
        found = ask(server, protocol, inputs, "stpath_tiles")
        np.testing.assert_allclose(found, engine.predict(slide, genes=PANEL).X, rtol=1e-4, atol=1e-5)
        for wrong, words in (
            ({"tiles": tiles[:3]}, "3 tiles but 9 rows of coords"),
            ({"genes": texts("GENE_")}, "unknown gene"),
        ):
            with pytest.raises(utils.InferenceServerException, match=words):
                ask(server, protocol, inputs | wrong, "stpath_tiles")
        assert_answers(server, engine, protocol)  # beside it


def test_concurrent_clients_get_each_their_own_answer(server, engine):
    """8 clients with 4 slides each, over both protocols; no two slides, panels or sizes are the same."""

    def converse(client: int) -> float:
        worst = 0.0
        for turn in range(4):
            seed = 10 * client + turn
            slide = a_slide(engine, 20 + 7 * seed, seed, organ=("Brain", "Breast", "Lung")[seed % 3])
            genes = [f"GENE{seed + i}" for i in range(1 + turn)]
            found = ask(server, ("http", "grpc")[client % 2], inputs_of(slide, *genes))
            expected = engine.predict(slide, genes=genes).X
            assert found.shape == expected.shape
            worst = max(worst, float(np.abs(found - expected).max()))
        return worst

    with ThreadPoolExecutor(8) as clients:
        assert max(clients.map(converse, range(8))) <= 1e-6


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"features": np.zeros((7, 95), np.float32)}, "unexpected shape for input 'features'"),
        ({"features": np.zeros(96, np.float32)}, "unexpected shape for input 'features'"),
        ({"features": np.full((7, 96), np.nan, np.float32)}, "672 values of the features are NaN or infinite"),
        ({"features": np.zeros((7, 96), np.float16)}, "data-type is 'FP16', but model 'stpath' expects 'FP32'"),
        ({"features": np.zeros((6, 96), np.float32)}, "6 rows of features but 7 of coordinates"),
        ({"features": np.zeros((0, 96), np.float32), "coords": np.zeros((0, 2))}, "no spots"),
        ({"features": None}, "'features' is missing"),
        ({"coords": np.zeros((7, 2), np.int64)}, "data-type is 'INT64', but model 'stpath' expects 'FP64'"),
        ({"coords": np.zeros((7, 3))}, "unexpected shape for input 'coords'"),
        ({"coords": np.full((7, 2), np.inf)}, "14 values of the coordinates are NaN or infinite"),
        ({"coords": None}, "'coords' is missing"),
        ({"genes": texts("GENE3", "GENNE7")}, "unknown gene: 'GENNE7' (did you mean"),
        ({"genes": texts(b"\xff")}, "not text in UTF-8"),
        ({"genes": texts()}, "no gene is asked for"),
        ({"genes": None}, "no gene is asked for"),
        ({"organ": texts("Kidny")}, "unknown organ 'Kidny' (did you mean Kidney"),
        ({"organ": texts("")}, "unknown organ ''"),
        ({"organ": texts("Kidney", "Lung")}, "unexpected shape for input 'organ'"),
        ({"technology": texts("Visum")}, "unknown technology 'Visum' (did you mean Visium"),
        ({"orgn": texts("Kidney")}, "unexpected inference input 'orgn'"),
    ],
)
def test_wrong_input_is_an_error_of_one_line_and_the_server_answers_on(server, engine, protocol, changed, words):
    inputs = {**inputs_of(a_slide(engine, 7), *PANEL), **changed}
    with pytest.raises(utils.InferenceServerException) as error:
        ask(server, protocol, {name: array for name, array in inputs.items() if array is not None})
    assert words in error.value.message()
    assert "\n" not in error.value.message().strip()
    assert error.value.status() == {"http": "400", "grpc": "StatusCode.INVALID_ARGUMENT"}[protocol]
    assert_answers(server, engine, protocol)


def test_a_request_has_run_before_the_server_is_ready(server):
    log = server.log.read_text()
    assert log.index("is running warmup sample 'first_request'") < log.index("Started HTTPService")


def test_server_listens_on_this_machine_alone(server):
    listening = [c for c in psutil.Process(server.process.pid).net_connections("inet") if c.status == "LISTEN"]
    assert listening
    assert {c.laddr.ip.removeprefix("::ffff:") for c in listening} == {"127.0.0.1"}  # gRPC names it in IPv6


def test_configs_are_tritons(engine, tmp_path):
    for name in write_model_repository(engine.path, tmp_path / "models", "cuda:1"):
        text = (tmp_path / "models" / name / "config.pbtxt").read_text()
        config = text_format.Parse(text, grpc.model_config_pb2.ModelConfig())
        assert config.name == name
        assert config.max_batch_size == 0
        assert not config.HasField("dynamic_batching")
        (group,) = config.instance_group
        assert (group.kind, list(group.gpus)) == (grpc.model_config_pb2.ModelInstanceGroup.KIND_GPU, [1])
        assert [tensor.name for tensor in config.input if tensor.optional] == (
            ["organ", "technology"] if name == "stpath" else []
        )
        assert bool(config.backend) != bool(config.platform)


@pytest.fixture
def repository(tiny_engine, tmp_path):
    write_model_repository(tiny_engine, tmp_path / "models")
    return tmp_path / "models" / "stpath"


def refused(repository, log) -> str:
    """What a server that does not start says."""
    server = start(repository.parent, log)
    try:
        assert server.process.wait(60) != 0
    finally:
        stop(server)
    return log.read_text()


def test_faults_are_told_in_one_line_and_the_trace_in_the_log(repository, tiny_engine, tmp_path):
    model = repository / "1" / "model.py"
    faults = """
        if genes == ["GENE1"]:
            raise MemoryError("no room")
        if genes == ["GENE2"]:
            1 / 0
        slide = Slide("""
    model.write_text(model.read_text().replace("\n        slide = Slide(", faults))
    engine = Engine.load(tiny_engine)
    expected = {
        ("http", "GENE1"): ("503", "not enough memory (no room); ask for fewer genes or smaller slides"),
        ("grpc", "GENE1"): ("StatusCode.UNAVAILABLE", "not enough memory (no room)"),
        ("http", "GENE2"): ("500", "ZeroDivisionError: division by zero; a fault of stpath-engine"),
        ("grpc", "GENE2"): ("StatusCode.INTERNAL", "ZeroDivisionError: division by zero"),
    }
    with running(repository.parent, tmp_path / "log") as server:
        for (protocol, gene), (status, words) in expected.items():
            with pytest.raises(utils.InferenceServerException) as error:
                ask(server, protocol, inputs_of(a_slide(engine, 7), gene))
            assert error.value.status() == status
            assert error.value.message().startswith(words)
            assert "\n" not in error.value.message()
            assert_answers(server, engine, protocol)
    assert (tmp_path / "log").read_text().count("Traceback") == 2


def test_warm_up_really_runs(repository, tmp_path):
    """One that asks for an unknown gene fails, and keeps the server from being ready (this version crashes of it)."""
    (repository / "warmup" / "genes").write_bytes((5).to_bytes(4, "little") + b"GENNE")
    assert "failed to run warmup sample 'first_request'" in refused(repository, tmp_path / "log")


def test_graph_that_does_not_load_is_told_at_the_start(repository, tmp_path):
    engine = repository / "1" / "engine"
    for name in ("block_2.onnx", "engine.json"):  # links to the engine's own
        raw = (engine / name).read_bytes()
        (engine / name).unlink()
        (engine / name).write_bytes(raw)
    (engine / "block_2.onnx").write_bytes(b"no graph")
    manifest = Manifest.read(engine)
    files = {**manifest.files, "block_2.onnx": sha256(engine / "block_2.onnx")}
    dataclasses.replace(manifest, files=files).write(engine)
    assert "block_2.onnx: ONNX Runtime cannot run it on cpu" in refused(repository, tmp_path / "log")


def test_damaged_engine_is_not_served(repository, tmp_path):
    weights = repository / "1" / "engine" / "weights.bin"
    raw = weights.read_bytes()
    weights.unlink()  # it is a link to the engine's own
    weights.write_bytes(raw[:-1])
    assert "weights.bin: truncated or altered" in refused(repository, tmp_path / "log")
