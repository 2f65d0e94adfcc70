"""Images to features: those of timm, kept as they are made, to the same bytes however often a run is killed."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import anndata
import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
from PIL import Image

from helpers import CROP, by_timm, relative_l2, without_coverage
from images_helpers import tissue_pixels, write_png, write_svs
from stpath_runtime.cli.app import main
from stpath_runtime.errors import EncoderError, ImageError, InputError, InputWarning
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.images.features import FeaturesJob, extract, extract_one, find_targets
from stpath_runtime.images.settings import PIECES, TileSettings
from stpath_runtime.images.sources import identity
from stpath_runtime.readers import read_slide


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    with TileEncoder.load(tiny_encoder) as loaded:
        yield loaded


def test_features_of_the_real_crop_are_those_of_timm(encoder, encoder_folder, tmp_path):
    made = extract_one(FeaturesJob(CROP, tmp_path / "a.h5"), encoder)
    with h5py.File(tmp_path / "a.h5") as file:
        corners, said = file["coords"][()], dict(file["coords"].attrs)
        assert set(file) == {"coords", "features"}
    slide = read_slide(tmp_path / "a.h5")
    assert made.total == len(slide) == len(corners) > 20
    with openslide.OpenSlide(CROP) as by_hand:
        tiles = np.stack([by_hand.read_region(tuple(map(int, xy)), 0, (224, 224)).convert("RGB") for xy in corners])
    assert relative_l2(slide.features, by_timm(encoder_folder, tiles)) < 1e-5
    # By Pillow, from the tiles of the file itself.
    with Image.open(CROP) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    tiles = np.stack([pixels[y : y + 224, x : x + 224] for x, y in corners])
    assert relative_l2(slide.features, by_timm(encoder_folder, tiles)) < 2e-2  # another decoder of JPEG
    assert (said["patch_size"], said["patch_size_level0"], said["target_magnification"]) == (224, 224, 20)
    assert (said["level0_width"], said["level0_height"], said["overlap"]) == (1124, 1350, 0)
    assert slide.patch.microns == 112
    assert (tmp_path / "a.tiles.png").is_file()
    assert not list(tmp_path.glob(".*"))


class Stopped(Exception):
    pass


def stop_at(tiles: int):
    def on_batch(done: int, total: int) -> None:
        if done >= tiles:
            raise Stopped

    return on_batch


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(encoder, tmp_path):
    extract_one(FeaturesJob(CROP, tmp_path / "whole.h5"), encoder, 4)
    job = FeaturesJob(CROP, tmp_path / "a.h5")
    with pytest.raises(Stopped):
        extract_one(job, encoder, 4, stop_at(12))
    assert not job.target.exists()
    assert job.half.exists()
    batches = []
    made = extract_one(job, encoder, 4, lambda *counts: batches.append(counts))
    assert batches[0] == (16, made.total)
    assert job.target.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    batches.clear()
    assert extract_one(job, encoder, 4, lambda *counts: batches.append(counts)).total == made.total
    assert batches == []  # a whole file is left as it is


def test_a_row_that_was_half_written_is_made_again(encoder, tmp_path):
    extract_one(FeaturesJob(CROP, tmp_path / "whole.h5"), encoder, 4)
    job = FeaturesJob(CROP, tmp_path / "a.h5")
    with pytest.raises(Stopped):
        extract_one(job, encoder, 4, stop_at(12))
    with h5py.File(job.half, "r+") as file:
        file["features"][5, 90:] = np.nan
    batches = []
    extract_one(job, encoder, 4, lambda *counts: batches.append(counts))
    assert batches[0][0] == 8
    assert job.target.read_bytes() == (tmp_path / "whole.h5").read_bytes()


KILLED = """
import sys
from pathlib import Path
from stpath_runtime.images.encoder import TileEncoder
from stpath_runtime.images.features import FeaturesJob, extract_one
extract_one(FeaturesJob(Path(sys.argv[2]), Path(sys.argv[3])), TileEncoder.load(sys.argv[1]), 2)
"""


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_runs_go_on_to_the_same_bytes(times, encoder, tiny_encoder, tmp_path):
    extract_one(FeaturesJob(CROP, tmp_path / "whole.h5"), encoder, 2)
    target = tmp_path / "a.h5"
    command = [sys.executable, "-c", KILLED, str(tiny_encoder), str(CROP), str(target)]
    start = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed.h5")], check=True, env=without_coverage())
    whole = time.monotonic() - start
    rng = random.Random(0)
    for _ in range(times):
        running = subprocess.Popen(command, env=without_coverage())
        time.sleep(rng.uniform(0.4, 1.0) * whole)
        running.send_signal(signal.SIGKILL)
        running.wait()
    subprocess.run(command, check=True, env=without_coverage())
    assert target.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert not list(tmp_path.glob(".*.h5.partial"))


def test_two_runs_do_not_write_one_file(encoder, tmp_path):
    job = FeaturesJob(CROP, tmp_path / "a.h5")

    def second(done: int, total: int) -> None:
        with pytest.raises(InputError, match="another run computes it"):
            extract_one(job, encoder, 4)

    extract_one(job, encoder, 40, second)
    assert job.target.exists()


def test_other_settings_do_not_go_on_or_overwrite(encoder, tmp_path):
    job = FeaturesJob(CROP, tmp_path / "a.h5")
    with pytest.raises(Stopped):
        extract_one(job, encoder, 4, stop_at(4))
    other = FeaturesJob(CROP, job.target, TileSettings(pitch=224))
    with pytest.warns(InputWarning, match="begun with other tiles; it starts over"):
        assert extract_one(other, encoder, 4).total < 15
    with pytest.raises(InputError, match="exists, and is of other tiles"):
        extract_one(job, encoder, 4)


def test_a_slide_that_breaks_off_in_the_middle(encoder, tmp_path):
    """Its features so far are kept, and said to be part; the slide after it is run."""
    whole = CROP.read_bytes()
    path = tmp_path / "cut.svs"
    path.write_bytes(whole)
    spots = tmp_path / "spots.h5ad"
    centres = np.array([[300.0, 300.0]] * 8 + [[900.0, 1200.0]] * 4)
    obs = pd.DataFrame(index=[f"s{i}" for i in range(12)])
    anndata.AnnData(obs=obs, obsm={"spatial": centres}).write_h5ad(spots)
    settings = TileSettings(spots=str(spots))

    class Broken:
        name, size, width, microns, about = encoder.name, encoder.size, encoder.width, encoder.microns, encoder.about

        def batch(self):
            return 4

        def __call__(self, tiles):
            return encoder(tiles)

    from stpath_runtime.images.tiles import TileReader

    read = TileReader.read

    def breaks(self, x, y):
        if self.image.path == path and y > 1000:
            raise ImageError(f"{path}: level 0 cannot be read at ({x:,}, {y:,})")
        return read(self, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TileReader, "read", breaks)
        jobs = [FeaturesJob(path, tmp_path / "cut.h5", settings), FeaturesJob(CROP, tmp_path / "good.h5")]
        broken, good = extract(jobs, Broken())
    assert good.error is None
    assert good.total > 20
    message = str(broken.error)
    assert "(tile 9 of 12, at (788, 1,088))" in message
    assert "the features of the first 8 of 12 tiles are kept in" in message
    assert "a part and no features file" in message
    with h5py.File(jobs[0].half) as file:
        assert np.isfinite(file["features"][:8]).all()
        assert np.isnan(file["features"][8:]).all()
    assert not jobs[0].target.exists()


def test_a_file_that_is_really_cut_is_named(encoder, tmp_path):
    pixels = np.random.default_rng(0).integers(60, 220, (3000, 3000, 3), dtype=np.uint8)
    path = write_svs(tmp_path / "a.svs", pixels)
    cut = tmp_path / "cut.svs"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    cut.write_bytes(data)
    with pytest.raises(InputError, match=r"cut.svs: .*(cannot be read|cannot open)"):
        extract_one(FeaturesJob(cut, tmp_path / "a.h5"), encoder, 4)
    assert not (tmp_path / "a.h5").exists()


def test_the_encoder_failing_leaves_the_next_slide_alone(encoder, tmp_path, monkeypatch):
    calls = []
    call = TileEncoder.__call__

    def fails_once(self, tiles):
        calls.append(len(tiles))
        if len(calls) == 2:
            raise EncoderError("it fails")
        return call(self, tiles)

    monkeypatch.setattr(TileEncoder, "__call__", fails_once)
    other = tmp_path / "b.svs"
    other.write_bytes(CROP.read_bytes())
    first, second = extract(
        [FeaturesJob(CROP, tmp_path / "a.h5"), FeaturesJob(other, tmp_path / "b.h5")], encoder, batch_size=4
    )
    assert isinstance(first.error, EncoderError)
    assert second.error is None


def write_positions(path: Path, header: bool = True) -> Path:
    rows = ["barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"] if header else []
    rows += ["AAAC-1,1,0,0,300,400", "AAAG-1,0,0,1,300,600", "AAAT-1,1,1,0,500.5,410"]
    path.write_text("\n".join(rows))
    return path


def test_tiles_at_the_spots_of_visium(encoder, tmp_path):
    for header, name in ((True, "tissue_positions.csv"), (False, "tissue_positions_list.csv")):
        settings = TileSettings(spots=str(write_positions(tmp_path / name, header)))
        extract_one(FeaturesJob(CROP, tmp_path / f"{name}.h5", settings), encoder)
        slide = read_slide(tmp_path / f"{name}.h5")
        assert slide.obs_names == ["AAAC-1", "AAAT-1"]
        assert slide.coords.tolist() == [[288, 188], [298, 389]]  # x is the column; the tile's corner


def test_sections_of_spots_and_pieces_of_tissue(encoder, tmp_path):
    obs = pd.DataFrame({"part": ["b", "a", "b"]}, index=["x", "y", "z"])
    spatial = np.array([[300.0, 300], [600, 600], [700, 900]])
    anndata.AnnData(obs=obs, obsm={"spatial": spatial}).write_h5ad(tmp_path / "s.h5ad")
    settings = TileSettings(spots=str(tmp_path / "s.h5ad"), sections="part")
    extract_one(FeaturesJob(CROP, tmp_path / "a.h5", settings), encoder)
    assert read_slide(tmp_path / "a.h5").sections == ["b", "a", "b"]
    path = write_svs(tmp_path / "two.svs", tissue_pixels())
    extract_one(FeaturesJob(path, tmp_path / "b.h5", TileSettings(sections=PIECES)), encoder)
    slide = read_slide(tmp_path / "b.h5")
    right = np.asarray(slide.coords)[:, 0] > 650
    assert set(np.array(slide.sections)[right]) == {"section 2"}
    assert set(np.array(slide.sections)[~right]) == {"section 1"}


FAULTS = {
    "no tissue": (lambda f: write_svs(f / "a.svs", tissue_pixels(pieces=())), TileSettings(), "no tissue in it"),
    "no whole tile": (
        lambda f: write_svs(f / "a.svs", tissue_pixels(150, 150, ((10, 10, 140, 140),)), 0.5),
        TileSettings(),
        "no tile of 112 um is tissue by 15% or more|no tissue",
    ),
    "no scale": (lambda f: write_png(f / "a.png"), TileSettings(), "--mpp"),
    "pitch": (lambda f: CROP, TileSettings(pitch=0), "--pitch 0"),
    "share": (lambda f: CROP, TileSettings(min_tissue=2), "--min-tissue 2"),
    "both": (lambda f: CROP, TileSettings(spots="a", tissue="b"), "--spots and --tissue both"),
    "column": (lambda f: CROP, TileSettings(sections="part"), "--sections part: a column of obs, and there is no obs"),
    "no spots": (lambda f: CROP, TileSettings(spots="none.csv"), "--spots none.csv: no such file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_leave_nothing(fault, encoder, tmp_path):
    make, settings, message = FAULTS[fault]
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=message):
        extract_one(FeaturesJob(make(tmp_path), tmp_path / "out" / "a.h5", settings), encoder)
    assert not list((tmp_path / "out").glob("*.h5"))


def test_spots_outside_of_the_image(encoder, tmp_path):
    path = write_positions(tmp_path / "p.csv")
    path.write_text(path.read_text().replace("500.5", "9500"))
    with pytest.raises(InputError, match=r"1 of 2 spots are outside of .* such as AAAT-1 at \(410, 9,500\)"):
        extract_one(FeaturesJob(CROP, tmp_path / "a.h5", TileSettings(spots=str(path))), encoder)


def test_spots_of_one_name_are_refused(encoder, tmp_path):
    path = write_positions(tmp_path / "p.csv")
    path.write_text(path.read_text().replace("AAAT-1", "AAAC-1"))
    with pytest.raises(InputError, match="spot 'AAAC-1' appears twice"):
        extract_one(FeaturesJob(CROP, tmp_path / "a.h5", TileSettings(spots=str(path))), encoder)


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "", "barcode,in_tissue\nA,1\n", "A,x,0,0,1,1\n", "A,0,0,0,1,1\n"])
def test_faults_of_a_positions_file(text, encoder, tmp_path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=r"--spots .*p.csv: "):
        extract_one(FeaturesJob(CROP, tmp_path / "a.h5", TileSettings(spots=str(tmp_path / "p.csv"))), encoder)


def test_the_identity_follows_files_and_settings(tmp_path):
    image, outlines = tmp_path / "a.svs", tmp_path / "t.geojson"
    image.write_bytes(b"1")
    outlines.write_text("1")
    seen = {identity(image, TileSettings()), identity(image, TileSettings(pitch=100))}
    seen.add(identity(image, TileSettings(tissue=str(outlines))))
    outlines.write_text("22")
    seen.add(identity(image, TileSettings(tissue=str(outlines))))
    os.utime(image, (1, 1))
    seen.add(identity(image, TileSettings()))
    assert len(seen) == 5


def test_targets(tmp_path):
    a, b, c = (tmp_path / name for name in ("one/a.svs", "one/b.svs", "two/a.h5"))
    assert find_targets([a], tmp_path / "x.h5") == [tmp_path / "x.h5"]
    assert find_targets([a, b], tmp_path / "out") == [tmp_path / "out" / "a.h5", tmp_path / "out" / "b.h5"]
    for sources, out, message in [
        ([a, b], tmp_path / "x.h5", "one file for 2 slides"),
        ([a, c], tmp_path / "out", "would both be written to"),
        ([c], tmp_path / "two", "would overwrite the patches"),
    ]:
        with pytest.raises(InputError, match=message):
            find_targets(sources, out)


def test_the_command(tiny_encoder, tmp_path, capsys):
    words = ["features", str(CROP), "--encoder", str(tiny_encoder), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out' / CROP.stem}.h5: ")
    blank = write_svs(tmp_path / "blank.svs", tissue_pixels(pieces=()))
    assert main([*words[:1], str(blank), *words[1:]]) == 2
    said = capsys.readouterr()
    assert "error[image]: " in said.err
    assert "spots, 96 features" in said.out  # the other one is made
    assert main([*words, "--mpp", "0.25"]) == 2
    assert "is of other tiles" in capsys.readouterr().err


def test_the_command_chooses_a_backend_and_says_which(tiny_encoder, tmp_path, capsys):
    out = tmp_path / "a.h5"
    words = ["features", str(CROP), "--encoder", str(tiny_encoder), "--backend", "auto", "--out", str(out)]
    assert main(words) == 0
    chosen = re.search(r"openvino|onnxruntime", capsys.readouterr().err)[0]
    with h5py.File(out) as file:
        assert file.attrs["backend"] == f"{chosen} on cpu"


def test_a_run_of_other_settings_does_not_take_the_file_of_one_at_work(encoder, tmp_path):
    """It would be given the name of a whole file, and hold none of its features."""
    job = FeaturesJob(CROP, tmp_path / "a.h5")
    other = FeaturesJob(CROP, job.target, TileSettings(pitch=150))

    def second(done: int, total: int) -> None:
        if done == 4:
            with pytest.raises(InputError, match="another run computes it"):
                extract_one(other, encoder, 4)

    extract_one(job, encoder, 4, second)
    assert np.isfinite(read_slide(job.target).features).all()
    assert len(read_slide(job.target)) > 20


def test_a_file_that_was_replaced_meanwhile_is_not_taken_for_whole(encoder, tmp_path):
    job = FeaturesJob(CROP, tmp_path / "a.h5")

    def replaced(done: int, total: int) -> None:
        if done == 4:
            job.half.rename(tmp_path / "moved")
            job.half.write_bytes((tmp_path / "moved").read_bytes())

    with pytest.raises(InputError, match="another run has begun it anew"):
        extract_one(job, encoder, 4, replaced)
    assert not job.target.exists()
