"""The parity report: stage by stage the engine's error is PyTorch's, and a stage that errs is named and repeated."""

from __future__ import annotations

import copy
import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from helpers import require_bf16
from stpath_export import figures, proof, report, trace
from stpath_export.bundle import read_case, write_bundle
from stpath_export.proof import KNN
from stpath_runtime import Engine, InputError
from stpath_runtime.backends.onnxruntime import OnnxRuntimeBackend
from stpath_runtime.cli.app import main
from stpath_runtime.measures.agreement import relative_l2
from stpath_train.checkpoint import load_checkpoint

FILES = {"report.html", "report.json", "stages.png", "scatter.png", "histogram.png"}
BLOCKS = ["block_1", "block_2", "block_3"]


@pytest.fixture(scope="module")
def engine(tiny_engine):
    return Engine.load(tiny_engine)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint)


@pytest.fixture(scope="module")
def exact_model(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def case(model, engine):
    """The 37 spots of the grid with context, and a panel."""
    cases = proof.grid(model, engine.vocabulary)
    return next(c for c in cases if len(c.slide) == 37 and c.context is not None and c.genes is not None)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Matrices this small take longer on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _one_size(monkeypatch):
    monkeypatch.setattr(proof, "SPOTS", (5,))


@pytest.fixture
def _blank(monkeypatch):
    """Pictures with nothing in them: they take most of the time."""
    blank = lambda traces, title: Figure(figsize=(1, 1))  # noqa: E731
    monkeypatch.setattr(report, "FIGURES", dict.fromkeys(report.FIGURES, blank))


@pytest.fixture
def breaks(monkeypatch):
    """Let one output of a graph err by a thousandth; all of them where none is named."""
    real = OnnxRuntimeBackend.run

    def break_(broken: str, output: int | None = None, factor: float = 1.001) -> None:
        def run(self, graph, inputs):
            found = real(self, graph, inputs)
            if graph.removeprefix("knn_") == broken:
                return [a * a.dtype.type(factor) if output in (None, i) else a for i, a in enumerate(found)]
            return found

        monkeypatch.setattr(OnnxRuntimeBackend, "run", run)

    return break_


def verify(engine, checkpoint, *words) -> int:
    return main([str(word) for word in ("verify", engine, "--checkpoint", checkpoint, *words)])


@pytest.mark.parametrize("neighbors", [None, KNN])
def test_the_reference_handed_its_own_numbers_gives_them_again(exact_model, case, engine, neighbors):
    exact = trace.torch_stages(exact_model, case, engine.vocabulary, neighbors)
    again = trace.torch_stages(exact_model, case, engine.vocabulary, neighbors, exact)
    assert list(exact) == ["tokens", "embed", *BLOCKS, "head"]
    for stage, outputs in exact.items():
        for name, output in outputs.items():
            np.testing.assert_allclose(again[stage][name], output, rtol=1e-12, atol=1e-12)
    embedding, expression = proof.reference(exact_model, case, engine.vocabulary, neighbors)
    np.testing.assert_array_equal(exact["block_3"]["x"], embedding)
    np.testing.assert_array_equal(exact["head"]["expression"], expression)


@pytest.mark.parametrize("neighbors", [None, KNN])
def test_the_trace_ends_where_the_proof_does(engine, model, exact_model, case, neighbors):
    found = trace.trace(engine, exact_model, model, case, neighbors)
    paths = dict(proof.engine_paths(engine, case, neighbors))
    exact = proof.reference(exact_model, case, engine.vocabulary, neighbors)
    row = proof.compare(paths[f"{found.attention}, stages"], exact)
    at = {(r["stage"], r["output"]): r for r in found.rows}
    assert at["block_3", "x"]["engine"]["accumulated"]["relative_l2"] == pytest.approx(row["embedding_l2"])
    assert at["head", "expression"]["engine"]["accumulated"]["relative_l2"] == pytest.approx(row["relative_l2"])
    assert found.pearson["engine"]["min"] == pytest.approx(row["pearson_min"])
    assert all(r[who][which]["relative_l2"] < 2e-6 for r in found.rows for who in ("engine", "pytorch")
               for which in ("own", "accumulated"))  # fmt: skip
    assert found.enters() is None
    assert sum(found.histograms["engine"]) == 37 * len(case.genes)


def test_a_low_precision_is_held_to_twice_what_pytorch_errs(tiny_engine, model, exact_model, case, tmp_path):
    require_bf16()
    own = shutil.copytree(tiny_engine, tmp_path / "engine")
    low = copy.deepcopy(model).bfloat16()
    reduced = Engine.load(own, backend="openvino", precision="bf16")
    found = trace.trace(reduced, exact_model, low, case, None)
    exact, by_torch = (proof.reference(m, case, reduced.vocabulary) for m in (exact_model, low))
    last = found.rows[-1]
    assert last["accumulated_bar"] == pytest.approx(2 * relative_l2(by_torch[1], exact[1]))
    blocks = [row for row in found.rows if row["stage"] in BLOCKS]
    assert all(1e-4 < row["engine"]["own"]["relative_l2"] <= row["own_bar"] for row in blocks)  # bits are numbers again


@pytest.mark.parametrize(
    ("stage", "output", "neighbors"),
    [
        ("tokens", 0, None),
        ("embed", 0, None),
        ("block_1", 1, KNN),
        ("block_2", 2, None),
        ("block_2", 0, KNN),
        ("block_3", 0, None),
        ("head", 0, KNN),
    ],
)
def test_a_stage_that_errs_is_where_the_error_enters(
    engine, model, exact_model, case, breaks, stage, output, neighbors
):
    breaks(stage, output)
    found = trace.trace(engine, exact_model, model, case, neighbors)
    missed = [(row["stage"], row["output"]) for row in found.rows if not row["own_passed"]]
    name = {"tokens": ["gene_rows"], "head": ["expression"]}.get(stage, ["x", "k", "v"])[output]
    assert missed == [(stage, name)]  # of its own, and no stage after it
    assert found.enters()["stage"] == stage
    (row,) = [row for row in found.rows if row["stage"] == stage and row["output"] == name]
    assert row["engine"]["own"]["relative_l2"] == pytest.approx(1e-3, rel=0.01)
    assert not row["accumulated_passed"]


def test_the_picture_marks_where_the_error_enters(engine, model, exact_model, case, breaks):
    sound = trace.trace(engine, exact_model, model, case, None)
    breaks("block_2")
    broken = trace.trace(engine, exact_model, model, case, None)
    legends = [figures.stages_figure([t], "title").legends[0].get_texts() for t in (sound, broken)]
    marked = [any(text.get_text() == "the error enters here" for text in texts) for texts in legends]
    assert marked == [False, True]


def test_errors_by_hand():
    exact = np.array([[1.0, 2.0], [0.0, 4.0]])
    found = trace.errors(exact + np.array([[0.1, 0.0], [0.0, -0.3]]), exact)
    assert found["relative_l2"] == pytest.approx(np.sqrt(0.1 / 21))
    assert (found["max"], found["atol"], found["mean"]) == pytest.approx((0.3, 0.3, 0.1))
    assert found["p50"] == pytest.approx(0.05)
    assert found["rtol"] == pytest.approx(0.1)
    assert trace.errors(exact + 0.1, exact)["rtol"] == np.inf
    assert np.isnan(trace.errors(exact * np.nan, exact)["max"])


@pytest.mark.usefixtures("_one_size")
def test_a_report_of_an_engine_that_passes(tiny_engine, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "report"
    assert verify(tiny_engine, tiny_checkpoint, "--report", out) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    found = json.loads((out / "report.json").read_text())
    assert found["passed"]
    assert found["verdict"].endswith("No stage errs more than its bar on its own.")
    assert f"{out}/report.html: {found['verdict']}" in capsys.readouterr().out
    assert [t["attention"] for t in found["traces"]] == ["global", "knn"]
    assert found["command"].startswith(f"stpath verify {tiny_engine} --checkpoint {tiny_checkpoint} --report {out}")
    assert found["versions"]["torch"] == torch.__version__
    html = (out / "report.html").read_text()
    assert html.count('src="data:image/png;base64,') == 3
    assert "http" not in html  # it needs no other file
    require_balanced(html)


def require_balanced(html: str) -> None:
    """Check that every element that opens also closes."""

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag, attrs) -> None:
            if tag not in ("img", "meta"):
                self.open.append(tag)

        def handle_endtag(self, tag) -> None:
            assert self.open.pop() == tag

    parser = Parser()
    parser.feed(html)
    assert parser.open == []


@pytest.mark.usefixtures("_one_size", "_blank")
def test_a_failure_leaves_a_bundle_that_repeats_it(tiny_engine, tiny_checkpoint, tmp_path, capsys, breaks):
    out = tmp_path / "report"
    breaks("block_2")
    assert verify(tiny_engine, tiny_checkpoint, "--report", out) == 3
    assert "parity failed: " in capsys.readouterr().err
    found = json.loads((out / "report.json").read_text())
    assert not found["passed"]
    assert "The error enters at block 2 (x)" in found["verdict"]
    assert {t["enters"] for t in found["traces"]} == {"block_2"}
    html = (out / "report.html").read_text()
    assert "the error enters at block 2" in html
    assert found["repeat"] in html

    bundle = out / "bundle"
    comparison = json.loads((bundle / "bundle.json").read_text())["comparison"]
    assert found["repeat"] in (bundle / "README.md").read_text()
    with np.load(bundle / "outputs.npz", allow_pickle=False) as file:
        outputs = dict(file)
    assert outputs["reference_expression"].dtype == np.float64
    error = relative_l2(outputs["engine_expression"], outputs["reference_expression"])
    assert error == pytest.approx(comparison["relative_l2"])
    assert relative_l2(outputs["pytorch_expression"], outputs["reference_expression"]) < 1e-6

    # The very command that the bundle names, with a report: the case fails by as much, and is traced.
    words = found["repeat"].split()[1:]
    assert main([*words, "--report", str(tmp_path / "again")]) == 3
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    path = f"({bundle / 'inputs.npz'})"
    (row,) = [r for r in again["proof"]["cases"] if r["case"].endswith(path) and r["path"] == comparison["path"]]
    assert row["relative_l2"] == pytest.approx(comparison["relative_l2"])
    assert again["traces"][0]["case"].endswith(path)

    breaks("nothing")
    assert verify(tiny_engine, tiny_checkpoint, "--report", out) == 0  # an earlier report makes room
    assert {path.name for path in out.iterdir()} == FILES


@pytest.mark.usefixtures("_one_size")
def test_an_engine_that_gives_nan_has_a_report(tiny_engine, tiny_checkpoint, tmp_path, breaks):
    breaks("head", factor=np.nan)
    assert verify(tiny_engine, tiny_checkpoint, "--report", tmp_path / "report") == 3
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "The error enters at head (expression)" in found["verdict"]
    assert found["traces"][0]["stages"][-1]["engine"]["own"]["relative_l2"] is None  # JSON has no NaN
    assert "not finite" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.usefixtures("_one_size")
def test_what_only_the_fused_graph_errs_is_said(tiny_engine, model, engine, breaks):
    breaks("fused")
    rows = proof.prove(tiny_engine, model)["cases"]
    assert "what fails is fused graph" in report.verdict(rows, trace.trace_cases(engine, model, []))


def test_a_case_comes_back_from_its_bundle(case, tmp_path):
    row = {"case": "c", "path": "p", "relative_l2": 1.0, "bar_l2": 1e-5, "embedding_l2": 1.0, "embedding_bar": 1e-5}
    write_bundle(tmp_path, case, {}, {**row, "pearson_min": None}, {"command": "stpath", "repeat": "stpath"})
    again = read_case(tmp_path / "inputs.npz")
    assert again.name == f"{case.name} ({tmp_path / 'inputs.npz'})"
    assert (again.genes, again.given) == (list(case.genes), case.given)
    for name in ("coords", "features", "barcodes"):
        np.testing.assert_array_equal(getattr(again.slide, name), getattr(case.slide, name))
    assert (again.slide.organ, again.slide.technology) == (case.slide.organ, case.slide.technology)
    np.testing.assert_array_equal(again.context.ids, case.context.ids)
    np.testing.assert_array_equal(again.context.counts, case.context.counts)
    assert again.context.genes == list(case.context.genes)


def test_files_that_are_no_bundle_are_refused(tmp_path):
    path = tmp_path / "inputs.npz"
    with pytest.raises(InputError, match="no such file"):
        read_case(path)
    path.write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"not the inputs.npz of a bundle, or damaged"):
        read_case(path)
    np.savez(path, coords=np.zeros((3, 2)))
    with pytest.raises(InputError, match="no 'case' in it"):
        read_case(path)
    np.savez(path, case=np.array([{}], object))
    with pytest.raises(InputError, match=r"Object arrays cannot be loaded"):  # a pickle
        read_case(path)


def test_a_folder_with_something_else_is_left_alone(tiny_engine, tiny_checkpoint, tmp_path, capsys):
    out = tmp_path / "notes"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.json").write_text("{}")
    assert verify(tiny_engine, tiny_checkpoint, "--report", out) == 2
    assert f"--report {out}: the folder holds something else (notes.txt); give a new one" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == {"notes.txt", "report.json"}
    assert verify(tiny_engine, tiny_checkpoint, "--report", out / "notes.txt") == 2
    assert "a file is there; give a folder" in capsys.readouterr().err


@pytest.mark.usefixtures("_one_size", "_blank")
def test_a_report_that_cannot_be_finished_leaves_nothing(tiny_engine, model, engine, case, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "page", fail)
    rows = proof.prove(tiny_engine, model)
    with pytest.raises(InputError, match="No space left on device"):
        report.write_report(tmp_path / "out", engine, model, [], rows, {}, {"name": "m", "sha256": "0"})
    assert list(tmp_path.iterdir()) == []
