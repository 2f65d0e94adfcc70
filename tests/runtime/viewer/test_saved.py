"""One HTML file that needs no server; what it shows is in test_page.py."""

from __future__ import annotations

import json
import re

import pytest

from stpath_runtime import InputError
from stpath_runtime.cli.app import main
from stpath_runtime.viewer import saved
from stpath_runtime.viewer.saved import save_page
from stpath_runtime.viewer.shown import open_shown


def read_json(page: str, name: str):
    return json.loads(re.search(rf'id="data-{name}">(.*?)</script>', page)[1])


@pytest.mark.parametrize(("most_half", "weights", "bar"), [(4_000, "float16", 1e-3), (5, "int8", 2e-2)])
def test_the_error_of_what_is_kept_is_told(shown, tmp_path, monkeypatch, most_half, weights, bar):
    monkeypatch.setattr(saved, "MOST_HALF", most_half)
    error = save_page(shown, tmp_path / "page.html")
    info = read_json((tmp_path / "page.html").read_text(), "info")
    assert (info["weights"], info["error"], info["genes"]) == (weights, error, len(shown.genes))
    assert bar / 100 < error < bar


def test_nothing_of_the_file_is_run(predicted, loaded, tmp_path):
    adata = predicted.copy()
    adata.uns["stpath"]["note"] = "</script><script>alert(1)</script>"
    path = tmp_path / "<svg onload=alert(1)>.h5ad"
    adata.write_h5ad(path)
    with open_shown(path, loaded) as shown:
        save_page(shown, tmp_path / "page.html", ["GENE1"])
    page = (tmp_path / "page.html").read_text()
    assert "alert(1)</script>" not in page
    assert "<svg" not in page
    assert read_json(page, "info")["provenance"]["note"] == "</script><script>alert(1)</script>"
    assert not re.search(r'(src|href)="(?!data:)', page)  # it asks for nothing


def test_genes_are_kept_once_by_any_of_their_names(shown, tmp_path):
    save_page(shown, tmp_path / "page.html", ["ALIAS3", "GENE1", "GENE3"])
    assert [names[0] for names in read_json((tmp_path / "page.html").read_text(), "names")] == ["GENE1", "GENE3"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--save", "{tmp}/page.png", "--engine", "{engine}"], "ends in .html"),
        (["--save", "{tmp}/page.html"], "--save needs embeddings and --engine"),
        (["--save", "{tmp}/page.html", "--engine", "{engine}", "--genes", "NOPE"], "no gene 'NOPE'"),
        (["--save", "{tmp}/prediction.h5ad/page.html", "--engine", "{engine}"], "prediction.h5ad"),
        (["--genes", "GENE1"], "goes with --save"),
    ],
)
def test_wrong_words_are_one_line_and_write_nothing(prediction, tiny_engine, tmp_path, capsys, words, told):
    before = sorted(path.name for path in tmp_path.iterdir())
    given = [word.format(tmp=tmp_path, engine=tiny_engine) for word in words]
    assert main(["view", str(prediction), "--no-browser", *given]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), told in err) == ("", 1, True), err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_too_many_spots_for_one_page_are_refused(shown, tmp_path, monkeypatch):
    monkeypatch.setattr(saved, "MOST_SPOTS", 200)
    with pytest.raises(InputError, match="300 spots; a saved page takes 200: serve it instead"):
        save_page(shown, tmp_path / "page.html")
