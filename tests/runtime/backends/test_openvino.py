"""OpenVINO: bfloat16 within the bar on the trained demo model, its cache, and what is refused."""

from __future__ import annotations

import copy
import hashlib
import shutil
import subprocess
import sys

import numpy as np
import openvino
import pytest
import torch

from helpers import load_golden, relative_l2, require_bf16
from stpath_export.exporter import write_engine
from stpath_export.proof import LOW_PEARSON_BAR, PEARSON_BAR, Case, compare, random_slide, reference
from stpath_runtime import Engine, InputError
from stpath_runtime.backends import openvino as openvino_backend
from stpath_runtime.backends.openvino import DIGEST, OpenVinoBackend
from stpath_runtime.cli.app import main
from stpath_runtime.files import sha256
from stpath_runtime.manifest import MANIFEST, Manifest
from stpath_runtime.slides.slide import Slide
from stpath_train.checkpoint import load_checkpoint
from stpath_train.cohort import World
from stpath_train.demo_checkpoint import PACKAGED, SEED, held_out_slide

SLIDE = random_slide(150, 96, 3)


@pytest.fixture
def bf16():
    require_bf16()


@pytest.fixture
def own(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


@pytest.fixture(scope="module")
def demo(made_once):
    """The demo's model, which is trained, as an engine, and its held-out slide."""
    world = World.create(SEED)
    model = load_checkpoint(PACKAGED)

    def fill(folder):
        source = {"name": PACKAGED.name, "sha256": sha256(PACKAGED)}
        (folder / "engine").mkdir()
        write_engine(model, world.vocabulary, folder / "engine", "fp32", source)

    slide, _ = held_out_slide(world)
    slide = Slide(slide.coords, slide.features, organ="Breast", technology="Visium", name="demo slide")
    return made_once("demo_engine_openvino", fill) / "engine", model, slide


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("neighbors", [None, 32], ids=["global", "knn"])
@pytest.mark.filterwarnings("ignore::stpath_runtime.errors.InputWarning")
def test_parity_on_the_demo_slide(demo, precision, neighbors, request):
    """All genes of a trained model: within the bar of the precision, and every gene's Pearson r."""
    if precision == "bf16":
        request.getfixturevalue("bf16")
    path, model, slide = demo
    engine = Engine.load(path, backend="openvino", precision=precision)
    case = Case(slide.name, slide)
    exact = reference(copy.deepcopy(model).double(), case, engine.vocabulary, neighbors)
    low = reference(copy.deepcopy(model).bfloat16(), case, engine.vocabulary, neighbors)
    how = {} if neighbors is None else {"attention": "knn", "neighbors": neighbors}
    embedding = engine.embed(slide, **how)
    found = (embedding, engine.decode(embedding))
    row = (
        compare(found, exact, low, LOW_PEARSON_BAR) if precision == "bf16" else compare(found, exact, None, PEARSON_BAR)
    )
    assert row["genes"] == 500
    assert row["flat_genes"] == 0
    assert row["passed"], row


@pytest.mark.filterwarnings("ignore::stpath_runtime.errors.InputWarning")
def test_positions_are_not_rounded_to_bfloat16(demo, bf16):
    """Where spots are close, bfloat16 makes one position of many: distances must not be taken of it."""
    path, model, _ = demo
    engine = Engine.load(path, backend="openvino", precision="bf16")
    slide = random_slide(12_000, model.config.n_features, 0, "Breast", "Visium")
    case = Case(slide.name, slide, None, engine.vocabulary.ensembl_ids[:20])
    exact, low = (
        reference(copy.deepcopy(model).to(t), case, engine.vocabulary, 32) for t in (torch.float64, torch.bfloat16)
    )
    error = relative_l2(engine.embed(slide, attention="knn", neighbors=32), exact[0])
    assert error <= relative_l2(low[0], exact[0])  # with rounded positions it is twice that


def test_compiled_graphs_are_kept_in_the_engine_and_are_no_part_of_it(own, monkeypatch):
    before = Engine.load(own).hash()
    found = Engine.load(own, backend="openvino").embed(SLIDE)
    (folder,) = (own / "cache").iterdir()
    assert sorted(path.name.split(".")[0] for path in folder.iterdir()) == ["block_1", "block_2", "block_3", "embed"]
    compiled = []
    monkeypatch.setattr(openvino_backend, "_keep", lambda kept, _: compiled.append(kept))
    again = Engine.load(own, backend="openvino")
    np.testing.assert_array_equal(again.embed(SLIDE), found)
    assert compiled == [None]  # tokens, which is not kept
    assert again.hash() == before
    Manifest.read(own).check_files(own)


@pytest.mark.parametrize("damage", [lambda b: b[:-7], lambda b: b[:500] + bytes([b[500] ^ 1]) + b[501:], lambda b: b""])
def test_a_damaged_cache_is_made_anew(own, damage):
    found = Engine.load(own, backend="openvino").embed(SLIDE)
    paths = [path for path in (own / "cache").rglob("*") if path.is_file()]
    for path in paths:
        path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(Engine.load(own, backend="openvino").embed(SLIDE), found)
    for path in paths:
        digest, graph = path.read_bytes()[:DIGEST], path.read_bytes()[DIGEST:]
        assert hashlib.sha256(graph).digest() == digest


def test_another_engine_takes_no_graph_of_the_cache(own):
    Engine.load(own, backend="openvino").embed(SLIDE)
    kept = set((own / "cache").rglob("embed*"))
    (own / MANIFEST).write_text((own / MANIFEST).read_text() + "\n")
    Engine.load(own, backend="openvino").embed(SLIDE)
    assert len(set((own / "cache").rglob("embed*")) - kept) == 1


def test_an_engine_that_cannot_be_written_runs(own):
    (own / "cache").write_text("a file where the folder would be")
    found = Engine.load(own, backend="openvino").embed(SLIDE)
    assert relative_l2(found, Engine.load(own).embed(SLIDE)) <= 1e-5


def test_two_processes_may_start_at_once(own, tmp_path):
    code = (
        "import sys, numpy as np; from stpath_runtime import Engine; from stpath_export.proof import random_slide\n"
        "np.save(sys.argv[2], Engine.load(sys.argv[1], backend='openvino').embed(random_slide(150, 96, 3)))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code, own, tmp_path / f"{i}.npy"]) for i in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    expected = Engine.load(own).embed(SLIDE)
    for i in range(3):
        assert relative_l2(np.load(tmp_path / f"{i}.npy"), expected) <= 1e-5
    assert not [path for path in (own / "cache").rglob("*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("freed", ["first in, first out", "by another thread"])
def test_signals_are_handled_after_engines_are_freed(own, freed):
    """Each Core of OpenVINO would leave the thread a stack for signal handlers that is gone."""
    code = """if True:
        import os, signal, sys, threading
        from stpath_export.proof import random_slide
        from stpath_runtime import Engine

        signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
        engines = [Engine.load(sys.argv[1], backend="openvino") for _ in range(2)]
        for engine in engines:
            engine.embed(random_slide(20, 96, 3))
        del engine
        if sys.argv[2] == "by another thread":
            thread = threading.Thread(target=engines.clear)
            thread.start()
            thread.join()
        while engines:
            del engines[0]
        os.kill(os.getpid(), signal.SIGUSR1)
    """
    command = [sys.executable, "-c", code, own, freed]
    assert subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout == "handled\n"


def test_a_cpu_without_bfloat16_is_refused_and_never_given_float32(own, monkeypatch):
    monkeypatch.setattr(OpenVinoBackend, "capabilities", lambda self: ["FP32", "INT8"])
    with pytest.raises(InputError, match="precision bf16: this CPU has neither AMX nor AVX-512-BF16"):
        Engine.load(own, backend="openvino", precision="bf16")
    Engine.load(own, backend="openvino", precision="fp32")


def test_openvino_that_is_not_installed(own, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(InputError, match=r"OpenVINO is not installed; run: pip install 'stpath-engine\[openvino\]'"):
        Engine.load(own, backend="openvino")


@pytest.mark.parametrize("version", ["2026.2.1-21919-bd3e1d9d5a1", "2025.4.0"])
def test_openvino_that_computes_attention_wrong_is_refused(version, own, monkeypatch):
    monkeypatch.setattr(openvino, "__version__", version)
    with pytest.raises(InputError, match=rf"OpenVINO {version} computes .*pip install 'openvino>=2026.3'"):
        Engine.load(own, backend="openvino")


def test_other_devices_and_half_precision_are_refused(own):
    with pytest.raises(InputError, match="the backend openvino runs on the CPU; give --device cpu"):
        Engine.load(own, backend="openvino", device="cuda:0")
    with pytest.raises(InputError, match="precision fp16: the backend openvino has fp32 and bf16"):
        Engine.load(own, backend="openvino", precision="fp16")
    manifest = Manifest.read(own)
    Manifest(**{**vars(manifest), "precision": "fp16"}).write(own)
    for precision in (None, "bf16"):
        with pytest.raises(InputError, match="an fp16 engine; the backend openvino takes fp32 engines only"):
            Engine.load(own, backend="openvino", precision=precision)


def test_memory_is_honoured(own):
    slide = random_slide(3000, 96, 0)
    with pytest.raises(InputError, match="cannot hold one tile"):
        Engine.load(own, backend="openvino").embed(slide, memory=2**20)


def test_the_command_line_takes_backend_and_precision(own, tmp_path, capsys, bf16):
    import anndata

    from helpers import write_slide

    (_, slide, _), *_ = load_golden("tiny_masked").slides()
    words = ["predict", write_slide(slide, tmp_path / "s.h5"), "--engine", own, "--out", tmp_path / "p.h5ad"]
    assert main([str(word) for word in [*words, "--backend", "auto", "--precision", "bf16"]]) == 0
    _, err = capsys.readouterr()
    assert err.startswith("backend auto: openvino, bf16 on cpu (")
    assert len(err.splitlines()) == 1
    facts = anndata.read_h5ad(tmp_path / "p.h5ad").uns["stpath"]
    assert (facts["backend"], facts["precision"]) == ("openvino", "bf16")
    assert main([str(word) for word in [*words, "--precision", "bf16"]]) == 2
    assert "give --backend openvino" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_encoder_keeps_to_its_memory(own, precision, request):
    """In a process of its own: graphs do not each keep the scores of their largest tile."""
    if precision == "bf16":
        request.getfixturevalue("bf16")
    code = (
        "import re, sys\n"
        "from stpath_runtime import Engine, Slide\n"
        "from stpath_export.proof import random_slide\n"
        "peak = lambda f: int(re.search(f + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1]) * 1024\n"
        "engine = Engine.load(sys.argv[1], backend='openvino', precision=sys.argv[2])\n"
        "slide = random_slide(9000, 96, 0)\n"
        "engine.embed(Slide(slide.coords[:9], slide.features[:9]))\n"
        "before = peak('VmRSS')\n"
        "engine.embed(slide, memory=300 << 20)\n"
        "print(peak('VmHWM') - before)"
    )
    command = [sys.executable, "-c", code, own, precision]
    taken = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert taken < 1.1 * (300 << 20)
