"""The tile encoder as an engine: batches, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stpath_runtime.cli.app import main
from stpath_runtime.errors import InputError
from stpath_runtime.images import encoder as encoder_module
from stpath_runtime.images.encoder import BATCHES, TileEncoder, load_encoder, noise


@pytest.fixture
def copied(tiny_encoder, tmp_path) -> Path:
    return shutil.copytree(tiny_encoder, tmp_path / "encoder")


def test_features_do_not_depend_on_the_batch(tiny_encoder):
    with TileEncoder.load(tiny_encoder) as encoder:
        tiles = noise(7, encoder.size)
        whole = encoder(tiles)
        for size in (1, 2, 5):
            parts = np.concatenate([encoder(tiles[start : start + size]) for start in range(0, 7, size)])
            np.testing.assert_allclose(parts, whole, rtol=2e-5, atol=2e-5)
        assert encoder(tiles[:0]).shape == (0, encoder.width)


def test_the_batch_is_measured_once_and_kept(copied, monkeypatch):
    with TileEncoder.load(copied) as encoder:
        first = encoder.batch()
    assert first in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    assert list(json.loads((copied / BATCHES).read_text()).values()) == [first]
    monkeypatch.setattr(TileEncoder, "_measured", lambda self: 1 / 0)
    with TileEncoder.load(copied) as encoder:
        assert encoder.batch() == first
    (copied / BATCHES).write_text("{")
    with TileEncoder.load(copied) as encoder, pytest.raises(ZeroDivisionError):
        encoder.batch()


def test_memory_bounds_the_batch(copied, monkeypatch):
    with TileEncoder.load(copied) as encoder:
        one = 3 * 4 * encoder.manifest.activations
        monkeypatch.setattr(encoder_module, "available_on_host", lambda: 2 * one)
        assert encoder.batch() <= 2
        assert encoder(noise(5, encoder.size)).shape == (5, 96)
        monkeypatch.setattr(encoder_module, "available_on_host", lambda: one // 2)
        with pytest.raises(InputError, match="one tile takes about"):
            encoder(noise(1, encoder.size))


@pytest.mark.parametrize(
    "tiles", [np.zeros((2, 224, 224, 3)), np.zeros((2, 200, 224, 3), np.uint8), np.zeros((224, 224, 3), np.uint8)]
)
def test_other_tiles_are_refused(tiles, tiny_encoder):
    with TileEncoder.load(tiny_encoder) as encoder, pytest.raises(InputError, match=r"takes uint8 \[n, 224, 224, 3\]"):
        encoder(tiles)


def damage(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"xxx")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: damage(f, "weights.bin"), "weights.bin: truncated or altered"),
        (lambda f: (f / "encoder.onnx").unlink(), "encoder.onnx: missing from the encoder"),
        (lambda f: (f / "encoder.json").write_text("{}"), "damaged encoder manifest"),
        (lambda f: (f / "encoder.json").unlink(), "not an encoder"),
        (lambda f: edit(f, schema=99), "schema 99 is newer than 1"),
        (lambda f: edit(f, parity={"passed": False}), "its proof of parity did not pass"),
        (lambda f: edit(f, width=-1), "width is -1"),
    ],
)
def test_damaged_folders_are_refused(make, message, copied):
    make(copied)
    with pytest.raises(InputError, match=message):
        TileEncoder.load(copied)


def edit(folder: Path, **changes) -> None:
    content = json.loads((folder / "encoder.json").read_text())
    (folder / "encoder.json").write_text(json.dumps(content | changes))


def test_what_is_no_encoder_says_what_to_do(encoder_folder, tiny_engine, tiny_encoder, tmp_path):
    with pytest.raises(InputError, match="make an engine of it: stpath export-encoder"):
        load_encoder(str(encoder_folder))
    with pytest.raises(InputError, match="not an encoder"):
        load_encoder(str(tiny_engine))
    for path in (tmp_path / "nothing", "./encoder", "~/encoder"):
        with pytest.raises(InputError, match=f"^{path}: no such folder; give that of an encoder"):
            load_encoder(str(path), precision="bf16")
    with pytest.raises(InputError, match="--precision bf16: 'gigapath' is no folder, so a model of timm"):
        load_encoder("gigapath", precision="bf16")
    with pytest.raises(InputError, match="unknown encoder 'gigapth'"):
        load_encoder("gigapth")
    with pytest.raises(InputError, match="--weights w.pth: of a model of timm"):
        load_encoder(str(tiny_encoder), Path("w.pth"))


def test_info_doctor_and_bench_take_an_encoder(tiny_encoder, tmp_path, capsys):
    assert main(["info", str(tiny_encoder)]) == 0
    said = capsys.readouterr().out
    assert "112 um a tile, 0.5 um a pixel" in said
    assert "passed: 5 parts against timm in float64" in said
    assert main(["doctor", str(tiny_encoder)]) == 0
    assert "the features of 3 tiles of noise" in capsys.readouterr().out
    words = ["bench", str(tiny_encoder), "--rounds", "1", "--tiles", "1,2", "--backend", "onnxruntime"]
    assert main([*words, "--out", str(tmp_path / "bench")]) == 0
    assert "tiles/s" in capsys.readouterr().out
    rows = json.loads((tmp_path / "bench" / "bench.json").read_text())["rows"]
    assert {(row["what"], row["tiles"]) for row in rows} == {
        ("encode", 1), ("encode", 2), ("first call", 1), ("first call", 2),
    }  # fmt: skip


def test_backends_agree(tiny_encoder):
    tiles = noise(3, 224)
    with TileEncoder.load(tiny_encoder) as ours, TileEncoder.load(tiny_encoder, backend="openvino") as theirs:
        np.testing.assert_allclose(ours(tiles), theirs(tiles), rtol=0, atol=1e-4)


def test_a_closed_encoder_says_so(tiny_encoder):
    encoder = TileEncoder.load(tiny_encoder)
    encoder.close()
    with pytest.raises(InputError, match="was closed"):
        encoder(noise(1, 224))
