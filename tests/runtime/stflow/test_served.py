"""STFlow engines elsewhere: a Triton repository, the viewer, TensorRT-RTX plans."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from viewing import Client

from helpers import relative_l2
from stpath_runtime import Engine, Slide
from stpath_runtime.backends.plan_builder import Build
from stpath_runtime.errors import GeneError
from stpath_runtime.results.output import write_h5ad
from stpath_runtime.serving.repository import write_model_repository
from stpath_runtime.viewer.server import served
from stpath_runtime.viewer.shown import open_shown


@pytest.fixture(scope="module")
def slide() -> Slide:
    rng = np.random.default_rng(0)
    return Slide(rng.random((90, 2)) * 4_000, rng.standard_normal((90, 24), np.float32), name="slide")


def test_the_viewer_shows_the_spread_of_samples_beside_their_mean(flow_engine, slide, tmp_path):
    adata = Engine.load(flow_engine).predict(slide, samples=3)
    write_h5ad(adata, tmp_path / "p.h5ad")
    with open_shown(tmp_path / "p.h5ad", Engine.load(flow_engine)) as shown, served(shown) as address:
        client = Client(address)
        ask = lambda path: np.frombuffer(client.ask(path)[2], "<f4")  # noqa: E731
        assert (ask("/api/gene/GENE3") == adata[:, "GENE3"].X[:, 0]).all()
        assert (ask("/api/gene/GENE3%20(std)") == adata[:, "GENE3"].layers["std"][:, 0]).all()
        assert client.json("/api/info")[1]["spread"] == " (std)"
        assert client.json("/api/genes?search=gene3&limit=3")[1] == ["GENE3", "GENE3 (std)", "GENE30"]
        table = client.ask("/api/export.csv?genes=GENE3,GENE3%20(std)")[2].decode().splitlines()
        assert table[0] == "spot,x,y,GENE3,GENE3 (std),region"
        with pytest.raises(GeneError):
            shown.values("GENE77 (std)")
    adata.layers["std"] = csr_matrix(adata.layers["std"])
    del adata.uns["stpath"]["samples"]  # another program's, of whatever it is
    write_h5ad(adata, tmp_path / "other.h5ad")
    with open_shown(tmp_path / "other.h5ad") as shown:
        assert shown.deviation is None
    del adata.layers["std"]
    write_h5ad(adata, tmp_path / "one.h5ad")
    with open_shown(tmp_path / "one.h5ad") as shown, pytest.raises(GeneError):
        shown.values("GENE3 (std)")


def test_a_triton_repository_holds_the_engine_and_takes_steps_seed_and_samples(flow_engine, tmp_path):
    assert write_model_repository(flow_engine, tmp_path / "models") == ["stpath"]
    config = (tmp_path / "models" / "stpath" / "config.pbtxt").read_text()
    for name in ("steps", "seed", "samples"):
        assert f'input {{ name: "{name}" data_type: TYPE_INT64 dims: [1] optional: true }}' in config
    assert 'output { name: "std" data_type: TYPE_FP32 dims: [-1, -1] }' in config
    copied = Engine.load(tmp_path / "models" / "stpath" / "1" / "engine")
    assert copied.hash() == Engine.load(flow_engine).hash()


def test_plans_are_built_for_every_graph(flow_engine, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    import shutil

    engine = tmp_path / "engine"
    shutil.copytree(flow_engine, engine)
    build = Build.of(engine, "tensorrt_rtx", "cuda:0", "sm_89", 5_000)
    plans = build.run()
    assert set(plans.plans) == {"image", "edges_1", "edges_2", "layer_1", "layer_2"}
    assert build.up_to_date()
    assert plans.ranges("layer_2")["state"][2] == (1_024, 8, 50)


def test_tiles_that_run_at_once_give_the_same(flow_engine, slide):
    engine = Engine.load(flow_engine)
    wanted = engine.predict(slide, samples=2)
    for at_once in (1, 3):
        engine.backend.tiles_at_once = at_once
        assert relative_l2(engine.predict(slide, samples=2).X, wanted.X) <= 1e-6
