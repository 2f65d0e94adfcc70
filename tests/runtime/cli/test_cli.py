"""The command line: the published numbers, outputs, and one line for each fault."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anndata
import anndata.io
import h5py
import numpy as np
import pytest
import torch

from helpers import (
    made_up_vocabulary,
    relative_l2,
    without_coverage,
    write_context,
    write_slide,
    write_symbol_table,
)
from stpath_runtime.cli.app import main
from stpath_train.checkpoint import load_checkpoint


@pytest.fixture(scope="module")
def slide_file(tiny, tmp_path_factory):
    return write_slide(tiny.slides()[0][1], tmp_path_factory.mktemp("slides") / "s1.h5")


def assert_refused(result, *words):
    """One clear line on standard error, exit code 2."""
    code, out, err = result
    assert code == 2, err
    assert out == ""
    assert err.startswith("error[")
    assert err.count("\n") == 1, err
    for word in words:
        assert str(word) in err


def test_predict_gives_the_published_outputs(golden, golden_engine, stpath, tmp_path):
    genes = tmp_path / "panel.json"
    genes.write_text(json.dumps({"genes": golden.genes}))
    expression = np.empty_like(golden.prediction)
    for spots, slide, context in golden.slides():
        path = write_slide(slide, tmp_path / f"{slide.name}.h5")
        words = ["predict", path, "--engine", golden_engine, "--out", tmp_path / "out", "--genes", genes]
        words += ["--organ", slide.organ.upper()]
        words += ["--tech", slide.technology] if slide.technology else []
        if context is not None:
            words += ["--context", write_context(context, tmp_path / f"{slide.name}_counts.h5ad")]
        code, _, err = stpath(*words)
        assert (code, err) == (0, "")
        adata = anndata.read_h5ad(tmp_path / "out" / f"{slide.name}.h5ad")
        assert list(adata.obs_names) == list(slide.barcodes)
        assert list(adata.var_names) == golden.genes
        np.testing.assert_array_equal(adata.obsm["spatial"], slide.coords)
        expression[spots] = adata.X
    assert relative_l2(expression, golden.prediction) <= 1e-5


def test_predict_one_slide_to_one_file(slide_file, tiny_engine, stpath, tmp_path):
    out = tmp_path / "new folder" / "p.h5ad"
    code, printed, err = stpath(
        "predict", slide_file, "--engine", tiny_engine, "--out", out, "--genes", "GENE1, GENE4", "--embeddings"
    )
    assert (code, err) == (0, "")
    assert "61 spots, 2 genes" in printed
    adata = anndata.read_h5ad(out)
    assert adata.shape == (61, 2)
    assert adata.obsm["stpath_embedding"].shape == (61, 64)
    assert adata.uns["stpath"]["organ"] == "Others"


def test_predict_genes_whose_list_is_longer_than_the_name_of_a_file(slide_file, tiny_engine, stpath, tmp_path):
    genes = [f"GENE{i}" for i in range(100)]
    out = tmp_path / "p.h5ad"
    assert stpath("predict", slide_file, "--engine", tiny_engine, "--out", out, "--genes", ",".join(genes))[0] == 0
    assert list(anndata.read_h5ad(tmp_path / "p.h5ad").var_names) == genes


def test_predict_all_genes_and_a_text_panel(slide_file, tiny_engine, stpath, tmp_path):
    panel = tmp_path / "panel.txt"
    panel.write_text("GENE9\n\nENSG00000000011\n")
    for genes, count in ((["--genes", panel], 2), ([], 200), (["--genes", "all"], 200)):
        code, printed, _ = stpath("predict", slide_file, "--engine", tiny_engine, "--out", tmp_path / "p.h5ad", *genes)
        assert (code, printed) == (0, f"{tmp_path}/p.h5ad: 61 spots, {count} genes (Others, unknown technology)\n")
        assert anndata.read_h5ad(tmp_path / "p.h5ad").n_vars == count


@pytest.fixture
def faulty(tmp_path, slide_file):
    """Make a features file with one fault."""

    def make(fault: str):
        path = tmp_path / f"{fault.replace(' ', '_')}.h5"
        shutil.copy(slide_file, path)
        with h5py.File(path, "a") as file:
            features, coords = file["embeddings"][()], file["coords"][()]
            if fault == "no coordinates":
                del file["coords"]
            elif fault == "lengths":
                del file["coords"]
                file["coords"] = coords[:-1]
            elif fault == "width":
                del file["embeddings"]
                file["embeddings"] = features[:, :50]
            elif fault == "nan features":
                file["embeddings"][7, 3] = np.nan
            elif fault == "infinite coords":
                del file["coords"]
                file["coords"] = np.where(np.arange(61)[:, None] == 9, np.inf, coords)
        return path

    return make


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no coordinates", ["no coordinates"]),
        ("lengths", ["61 rows of features but 60 of coordinates"]),
        ("width", ["50 wide", "expects 96", "encoder"]),
        ("nan features", ["1 value of the features is NaN", "first at spot 7"]),
        ("infinite coords", ["2 values of the coordinates are", "first at spot 9"]),
    ],
)
def test_a_faulty_slide_is_one_line_and_nothing_is_written(fault, words, faulty, tiny_engine, stpath, tmp_path):
    path = faulty(fault)
    out = tmp_path / "out"
    out.mkdir()
    assert_refused(stpath("predict", path, "--engine", tiny_engine, "--out", out / "p.h5ad"), path, *words)
    assert list(out.iterdir()) == []


def test_a_fault_in_the_call_is_one_line(slide_file, tiny_engine, stpath, tmp_path):
    def predict(*more, slide=slide_file, engine=tiny_engine, out=tmp_path / "p.h5ad"):
        return stpath("predict", slide, "--engine", engine, "--out", out, *more)

    text = tmp_path / "text.h5"
    text.write_text("spots")
    taken = tmp_path / "taken"
    taken.write_text("")
    assert_refused(predict(slide=tmp_path / "missing.h5"), "missing.h5: no such file")
    assert_refused(predict(slide=text), "not an HDF5 file")
    assert_refused(predict("--organ", "Kidny"), "unknown organ 'Kidny'", "Kidney")
    assert_refused(predict("--tech", "Visum"), "unknown technology 'Visum'", "Visium")
    assert_refused(predict("--genes", "GENE1,GENEX1"), "unknown gene: 'GENEX1'")
    assert_refused(predict("--genes", tmp_path / "missing.txt"), "no such file")
    assert_refused(predict("--genes", ","), "names no gene")
    assert_refused(predict("--context", tmp_path / "missing.h5ad"), "no such file")
    assert_refused(predict("--backend", "tflite"), "unknown backend")
    assert_refused(predict("--device", "cuda:0"), "cuda:0")
    assert_refused(predict(engine=tmp_path), "not an engine")
    assert_refused(predict(out=tmp_path / "p.csv"), ".h5ad or .zarr, or a folder")
    assert_refused(predict(out=taken), "a file is there")
    assert_refused(predict("--gens", "GENE1"), "--gens")
    assert_refused(stpath("predict", slide_file, "--out", tmp_path), "--engine")
    assert_refused(stpath("predikt"), "predikt")
    assert_refused(predict(out=Path()), "no name")
    assert_refused(predict(out=Path("/proc/x.h5ad")), "/proc/x.h5ad: cannot be written")
    assert_refused(predict(out=slide_file.parent / "s1.h5"), "ends in .h5ad")
    assert_refused(predict(out="s3://bucket/p.h5ad"), "a URL; give a path, or run the slides with stpath run")
    table = tmp_path / "genes.csv"
    table.write_text("GENE1")
    assert_refused(predict("--genes", table), "genes.csv", ".txt")
    table.unlink()
    two = ["predict", slide_file, slide_file, "--engine", tiny_engine, "--out"]
    assert_refused(stpath(*two, tmp_path / "p.h5ad"), "one file for 2 slides")
    assert_refused(stpath(*two, tmp_path / "out"), "both be written")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "text.h5"]


def test_an_input_is_never_overwritten(tiny, slide_file, tiny_engine, stpath, tmp_path):
    _, slide, context = tiny.slides()[0]
    features, counts = write_slide(slide, tmp_path / "INT2.h5"), write_context(context, tmp_path / "INT2.h5ad")
    before = counts.read_bytes()
    words = ["predict", features, "--engine", tiny_engine, "--genes", "GENE1", "--out"]
    assert_refused(stpath(*words, tmp_path, "--context", counts), "INT2.h5ad would overwrite an input")
    assert_refused(stpath(*words, tmp_path), "INT2.h5ad exists and is not a prediction")
    assert counts.read_bytes() == before
    for _ in range(2):  # a prediction of before is rewritten
        assert stpath(*words, tmp_path / "pred.h5ad")[0] == 0
    link = tmp_path / "link.h5ad"
    link.symlink_to(features)
    assert_refused(stpath(*words, link), "would overwrite an input")


def test_all_slides_are_checked_before_the_first_is_run(faulty, slide_file, tiny_engine, stpath, tmp_path):
    out = tmp_path / "out"
    assert_refused(
        stpath("predict", slide_file, faulty("width"), "--engine", tiny_engine, "--out", out, "--genes", "GENE1"),
        "width.h5",
    )
    assert not out.exists()
    context = ["--context", tmp_path / "c.h5ad"]
    assert_refused(
        stpath("predict", slide_file, faulty("x"), "--engine", tiny_engine, "--out", out, *context), "one slide"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number, slide_file, tiny_engine, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    code = f"""
import os, sys, anndata.io
from stpath_runtime.cli import main
def write(file, key, adata):
    file["half"] = 1
    os.kill(os.getpid(), {int(number)})
anndata.io.write_elem = write
sys.exit(main(sys.argv[1:]))
"""
    words = ["predict", str(slide_file), "--engine", str(tiny_engine), "--out", str(out / "p.h5ad")]
    command, captured = [sys.executable, "-c", code, *words], {"capture_output": True, "text": True}
    done = subprocess.run(command, **captured, check=False, env=without_coverage())
    assert done.returncode == 128 + number
    assert "Traceback" not in done.stderr
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["results_2026.11.26", "run.h5ad/", "plain"])
def test_a_folder_may_have_a_dot(name, slide_file, tiny_engine, stpath, tmp_path):
    words = ["predict", slide_file, "--engine", tiny_engine, "--genes", "GENE1", "--out", f"{tmp_path}/{name}"]
    code, out, _ = stpath(*words)
    assert code == 0
    assert out.startswith(f"{tmp_path}/{name.rstrip('/')}/{slide_file.stem}.h5ad: ")


def test_context_barcodes_that_are_not_in_the_slide(tiny, slide_file, tiny_engine, stpath, tmp_path):
    context = tiny.slides()[0][2]
    strangers = type(context)([f"elsewhere{i}" for i in range(20)], context.counts, context.genes)
    path = write_context(strangers, tmp_path / "c.h5ad")
    words = ["predict", slide_file, "--engine", tiny_engine, "--out", tmp_path / "p.h5ad", "--context"]
    assert_refused(stpath(*words, path), "none of its 20 barcodes is in the slide", "elsewhere0")
    some = type(context)(["elsewhere", *context.ids[1:]], context.counts, context.genes)
    code, _, err = stpath(*words, write_context(some, path))
    assert code == 0
    assert "1 of its 20 spots are not in the slide and are left out, the first is 'elsewhere'; 19 are used" in err
    negative = type(context)(context.ids, -context.counts - 1, context.genes)
    assert_refused(stpath(*words, write_context(negative, path)), "negative")
    logged = type(context)(context.ids, np.log1p(context.counts), context.genes)
    code, _, err = stpath(*words, write_context(logged, path))
    assert code == 0
    assert err.startswith("warning: ")
    assert "log-transformed" in err


def test_traceback_only_with_debug(slide_file, tiny_engine, tmp_path, capsys):
    words = ["predict", str(slide_file), "--engine", str(tmp_path), "--out", str(tmp_path / "p.h5ad"), "--debug"]
    with pytest.raises(Exception, match="not an engine"):
        main(words)


def test_an_unforeseen_fault_is_one_line_too(stpath, monkeypatch, tmp_path):
    monkeypatch.setattr("stpath_runtime.manifest.Manifest.read", lambda path: 1 / 0)
    code, _, err = stpath("info", tmp_path)
    assert code == 1
    assert err.count("\n") == 1
    assert "ZeroDivisionError" in err


def test_a_failed_write_leaves_no_file(slide_file, tiny_engine, stpath, monkeypatch, tmp_path):
    def full_disk(file, key, adata):
        file["half"] = 1
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(anndata.io, "write_elem", full_disk)
    result = stpath("predict", slide_file, "--engine", tiny_engine, "--out", tmp_path / "p.h5ad")
    assert_refused(result, "p.h5ad: cannot be written (No space left on device)")
    assert list(tmp_path.iterdir()) == []


def test_info_is_for_people(tiny_engine, stpath):
    code, out, _ = stpath("info", tiny_engine)
    assert code == 0
    for words in ("3 layers, width 64, 4 heads", "global", "fp32", "opset 23", "passed: 58 comparisons"):
        assert words in out


def test_export_verify_and_their_faults(one_layer_checkpoint, tiny_genes, slide_file, stpath, tmp_path):
    checkpoint = one_layer_checkpoint
    engine = tmp_path / "engine"
    code, out, err = stpath("export", checkpoint, "--out", engine, "--genes", tiny_genes)
    assert (code, err) == (0, "")
    assert "58 comparisons with float64 passed" in out
    code, out, err = stpath("verify", engine, "--checkpoint", checkpoint, "--slide", slide_file)
    assert (code, err) == (0, "")
    assert "passed" in out
    assert "s1.h5" in out

    assert_refused(stpath("export", checkpoint, "--out", engine, "--genes", tiny_genes), "exists already")
    new = tmp_path / "new"
    assert_refused(stpath("export", tmp_path / "missing.pth", "--out", new), "no such checkpoint")
    assert_refused(stpath("export", checkpoint, "--out", new), "202 gene tokens", "38,984", "--genes")
    assert_refused(stpath("export", checkpoint, "--out", new, "--precision", "int8"), "int8")
    short = write_symbol_table(made_up_vocabulary(100), tmp_path / "short.json")
    assert_refused(stpath("export", checkpoint, "--out", new, "--genes", short), "202 gene tokens", "100")
    pickle = tmp_path / "p.pth"
    torch.save({"a": Ellipsis, "b": print}, pickle)
    refused = stpath("export", pickle, "--out", new)
    assert_refused(refused, "p.pth", "more than tensors")
    assert "weights_only" not in refused[2]
    assert not new.exists()

    other = {key: value + 0.01 for key, value in load_checkpoint(checkpoint).state_dict().items()}
    torch.save(other, tmp_path / "other.pth")
    code, _, err = stpath("verify", engine, "--checkpoint", tmp_path / "other.pth")
    assert code == 3
    assert "parity failed" in err
    assert "SHA-256 differs" in err


def test_plot(slide_file, tiny_engine, stpath, tmp_path):
    prediction = tmp_path / "p.h5ad"
    assert stpath("predict", slide_file, "--engine", tiny_engine, "--out", prediction)[0] == 0
    picture = tmp_path / "maps.png"
    assert stpath("plot", prediction, "GENE3", "ENSG00000000007", "--out", picture)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert_refused(stpath("plot", prediction, "FOO", "--out", tmp_path / "x.png"), "'FOO' is not in the prediction")
    assert_refused(stpath("plot", prediction, "GENE3", "--out", tmp_path / "x.pdf"), ".png")
    assert_refused(stpath("plot", slide_file, "GENE3", "--out", tmp_path / "x.png"), "s1.h5")
    assert_refused(stpath("plot", prediction, "gene3", "--out", tmp_path / "x.png"), "did you mean GENE3")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.png", "p.h5ad"]


def test_torch_is_never_imported_by_a_prediction(slide_file, tiny_engine, tmp_path):
    code = """
import sys
from stpath_runtime.cli import main
slide, engine, out, picture = sys.argv[1:]
assert main(["predict", slide, "--engine", engine, "--out", out]) == 0
assert main(["plot", out, "GENE1", "--out", picture]) == 0
heavy = [name for name in ("torch", "stpath_train", "stpath_export.exporter", "onnx") if name in sys.modules]
assert not heavy, heavy
"""
    paths = [slide_file, tiny_engine, tmp_path / "p.h5ad", tmp_path / "p.png"]
    subprocess.run([sys.executable, "-c", code, *map(str, paths)], check=True)


def test_import_and_help_load_nothing_heavy():
    code = """
import sys
import stpath_runtime, stpath_runtime.cli
heavy = [n for n in ("torch", "anndata", "pandas", "h5py", "scipy", "onnxruntime", "matplotlib") if n in sys.modules]
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
