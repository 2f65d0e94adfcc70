"""What is opened to be looked at, and what is refused; spots and tissue as they are drawn."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from anndata import AnnData
from PIL import Image

from helpers import CROP
from stpath_runtime import InputError
from stpath_runtime.cli.app import main
from stpath_runtime.images.reading import open_image
from stpath_runtime.readers import opened
from stpath_runtime.readers.mapped import map_array
from stpath_runtime.viewer.shown import kept_picture, open_shown
from stpath_runtime.viewer.tissue import TILE, OfPrediction, OfSlide, Tissue


def test_embeddings_are_mapped_from_the_file(prediction, loaded, predicted):
    with open_shown(prediction, loaded) as shown:
        embedding = shown.expression.embedding
        assert isinstance(embedding.base, np.memmap)
        np.testing.assert_array_equal(embedding, predicted.obsm["stpath_embedding"])


@pytest.mark.parametrize("kind", ["zarr", "chunked h5ad"])
def test_embeddings_in_chunks_are_mapped_from_a_copy(predicted, tmp_path, kind):
    path = tmp_path / ("p.zarr" if kind == "zarr" else "p.h5ad")
    if kind == "zarr":
        predicted.write_zarr(path, chunks=(64, 16))
    else:
        predicted.write_h5ad(path, compression="gzip")
    with opened(path, "a prediction") as source:
        found = map_array(source, "obsm/stpath_embedding")
    np.testing.assert_array_equal(found, predicted.obsm["stpath_embedding"])
    with opened(path, "a prediction") as source, pytest.raises(InputError, match="not an array of numbers"):
        map_array(source, "obsm/none")


def test_any_anndata_with_coordinates_is_shown(tmp_path):
    adata = AnnData(np.eye(4, 3, dtype=np.float32), obsm={"spatial": np.arange(8.0).reshape(4, 2)})
    adata.var_names = ["A", "B", "C"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_shown(tmp_path / "a.h5ad") as shown:
        assert shown.expression.gene(shown.genes.find("B")).tolist() == [0, 1, 0, 0]
        assert shown.spot["round"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: file["obsm/spatial"].__setitem__((3, 1), np.nan), "no two finite numbers at spot 3"),
        (lambda file: file.__delitem__("obsm/spatial"), r"no obsm\['spatial'\]"),
        (lambda file: file["uns/stpath"].__delitem__("engine"), "does not say which engine made it"),
        (lambda file: file["uns/stpath/engine"].__setitem__((), "0" * 64), "another engine .0000000"),
    ],
)
def test_what_cannot_be_shown_is_refused(predicted, loaded, tmp_path, change, told):
    adata = predicted.copy()
    adata.obsm["spatial"] = adata.obsm["spatial"].astype(float)
    adata.write_h5ad(tmp_path / "p.h5ad")
    with h5py.File(tmp_path / "p.h5ad", "r+") as file:
        change(file)
    with pytest.raises(InputError, match=told), open_shown(tmp_path / "p.h5ad", loaded):
        pass


def test_genes_of_one_name_are_refused(tmp_path):
    adata = AnnData(np.eye(3, dtype=np.float32), obsm={"spatial": np.eye(3, 2)})
    adata.var_names = ["A", "B", "A"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(InputError, match=r"genes of the same name \(A\)"), open_shown(tmp_path / "a.h5ad"):
        pass


def test_genes_whose_ids_repeat_are_found_by_name(tmp_path):
    """Of as many genes as the model has; a count of each name had taken a minute."""
    names = [f"G{i}" for i in range(38_982)]
    adata = AnnData(np.zeros((3, len(names)), np.float32), obsm={"spatial": np.eye(3, 2)})
    adata.var_names = names
    adata.var["gene_ids"] = "nan"
    adata.write_h5ad(tmp_path / "a.h5ad")
    with open_shown(tmp_path / "a.h5ad") as shown:
        assert shown.genes.find("G38981") == 38_981


@pytest.mark.parametrize(
    ("patch", "spot"),
    [
        ({"level0_pixels": 150}, {"side": 150.0, "round": False, "offset": 75.0}),
        ({"level0_pixels": 150, "centred": True}, {"side": 150.0, "round": False, "offset": 0.0}),
        ({"level0_pixels": 900}, {"side": 200.0, "round": False, "offset": 450.0}),  # they overlap
        ({}, {"side": 180.0, "round": True, "offset": 0.0}),
    ],
)
def test_spots_are_drawn_at_their_true_size(prediction, patch, spot):
    with open_shown(prediction) as shown:
        shown.facts["patch"] = patch
        found = shown.spot
        assert found.pop("pitch") == pytest.approx(199.8, abs=0.3)
        found["side"] = round(found["side"])
        assert found == spot


def pixels_of(tile: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(tile)) as picture:
        assert picture.format == "JPEG"
        return np.asarray(picture).astype(int)


def test_tiles_of_a_slide_image_are_its_pixels():
    with open_image(CROP) as image:
        tissue = Tissue(OfSlide(image))
        exact = image.read(0, 256, 512, TILE, TILE)
        np.testing.assert_array_equal(tissue.picture.square(256, 512, TILE), exact)
        assert np.abs(pixels_of(tissue.tile(0, 1, 2)) - exact).mean() < 4
        half = image.read(1, 0, 512, TILE, TILE)  # it is stored at half the size, too
        np.testing.assert_array_equal(tissue.picture.square(0, 512, 2 * TILE), half)
        quarter = image.read(1, 0, 0, 2 * TILE, 2 * TILE).reshape(TILE, 2, TILE, 2, 3).mean(axis=(1, 3))
        assert np.abs(tissue.picture.square(0, 0, 4 * TILE) - quarter).max() <= 1  # rounded twice
        whole = tissue.levels - 1
        assert TILE << whole >= max(tissue.size)
        assert tissue.tile(whole, 0, 0)
        for level, x, y in ((whole + 1, 0, 0), (whole, 1, 0), (0, 10**6, 0), (10**9, 0, 0)):
            with pytest.raises(InputError, match="the tissue has none such"):
                tissue.tile(level, x, y)


def test_tiles_of_a_kept_picture_are_where_they_were():
    pixels = np.zeros((100, 80, 3), np.uint8)
    pixels[50:, 40:] = 255
    tissue = Tissue(OfPrediction(pixels, 32.0))
    assert tissue.size == (2560, 3200)
    found = pixels_of(tissue.tile(3, 0, 0))[:, :, 0]  # 2,048 pixels of level 0: 64 of the picture
    edge_x, edge_y = 40 / 64 * TILE, 50 / 64 * TILE
    assert found[int(edge_y) + 8 :, int(edge_x) + 8 :].min() > 240
    assert found[: int(edge_y) - 8].max() < 15
    assert pixels_of(tissue.tile(3, 1, 1))[200, 200].min() > 240  # outside


def test_the_picture_that_a_prediction_keeps_is_found():
    pixels = np.random.default_rng(0).random((30, 40, 3)).astype(np.float32)
    library = {"images": {"hires": pixels}, "scalefactors": {"tissue_hires_scalef": 0.1}}
    tissue = kept_picture({"slide": library})
    assert tissue.size == (400, 300)
    for none in (None, {}, {"a": library, "b": library}, {"a": {"images": {}}}, {"a": {**library, "scalefactors": {}}}):
        assert kept_picture(none) is None


def test_an_image_that_the_spots_are_not_of_is_refused(prediction):
    with (
        pytest.raises(InputError, match=r"spots are outside of .*give the image that they were predicted from"),
        open_shown(prediction, None, CROP),
    ):
        pass


def view(*words, **how):
    command = [sys.executable, "-m", "stpath_runtime", "view", *map(str, words), "--no-browser"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_the_command_prints_one_address_and_ends_when_it_is_told(prediction, tiny_engine, ending):
    from viewing import Client

    started = view(prediction, "--engine", tiny_engine)
    address = started.stdout.readline().strip()
    assert address.startswith("http://127.0.0.1:")
    assert Client(address).json("/api/info")[1]["spots"] == 300
    os.kill(started.pid, ending)
    rest, errors = started.communicate(timeout=20)
    assert rest == ""
    assert "Traceback" not in errors


def test_beyond_this_machine_is_said_aloud(prediction):
    started = view(prediction, "--host", "0.0.0.0")
    assert started.stdout.readline().startswith("http://0.0.0.0:")
    time.sleep(0.2)
    started.terminate()
    assert "warning: 0.0.0.0 can be reached from the network" in started.communicate(timeout=20)[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{tmp}/none.h5ad"], "no such file"),
        (["{prediction}", "--engine", "{tmp}"], "not an engine"),
        (["{prediction}", "--port", "70000"], "--port"),
        (["{prediction}", "--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["{prediction}", "--image", "{tmp}/none.svs"], "no such file"),
    ],
)
def test_wrong_words_are_one_line(prediction, tmp_path, capsys, words, told):
    given = [word.format(tmp=tmp_path, prediction=prediction) for word in words]
    assert main(["view", *given, "--no-browser"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), told in err) == ("", 1, True), err
