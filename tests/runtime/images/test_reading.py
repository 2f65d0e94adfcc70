"""Slide images: what OpenSlide reads, plain pictures, scales, and what is refused."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from helpers import CROP
from images_helpers import tissue_pixels, write_png, write_svs, write_tiff
from stpath_runtime.errors import InputError, InputWarning
from stpath_runtime.images.reading import on_background, open_image

OME = (
    '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0"><Pixels '
    'DimensionOrder="XYCZT" ID="Pixels:0" SizeC="{c}" SizeT="1" SizeX="1400" SizeY="1000" SizeZ="1" Type="uint8" '
    "{size}>"
    '<Channel ID="Channel:0:0" SamplesPerPixel="{c}"/><TiffData/></Pixels></Image></OME>'
)


def test_the_real_crop_is_read_as_openslide_reads_it():
    with open_image(CROP) as image, openslide.OpenSlide(CROP) as slide:
        assert image.microns_a_pixel == 0.499
        assert [level.size for level in image.levels] == list(slide.level_dimensions) == [(1124, 1350), (562, 675)]
        for level, x, y in ((0, 301, 77), (1, 400, 600)):
            by_hand = np.asarray(slide.read_region((x, y), level, (224, 200)).convert("RGB"))
            np.testing.assert_array_equal(image.read(level, x, y, 224, 200), by_hand)


def test_what_is_outside_is_white(tmp_path):
    pixels = tissue_pixels()
    for path, mpp in ((write_svs(tmp_path / "a.svs", pixels), None), (write_png(tmp_path / "a.png", pixels), 0.5)):
        with open_image(path, mpp) as image:
            found = image.read(0, -50, 900, 224, 224)
        assert (found[:, :50] == 255).all()
        assert (found[100:] == 255).all()
        np.testing.assert_array_equal(found[:100, 50:], pixels[900:, :174])


def test_transparent_pixels_show_the_background():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [100, 100, 100, 51]]], np.uint8)
    found = on_background(rgba, np.array([255, 255, 255], np.float32))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255], [224, 224, 224]]]


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"', 0.25),
        ('PhysicalSizeX="0.0005" PhysicalSizeXUnit="mm" PhysicalSizeY="0.0005" PhysicalSizeYUnit="mm"', 0.5),
    ],
)
def test_the_scale_of_an_ome_tiff_is_read(size, scale, tmp_path):
    path = write_tiff(tmp_path / "a.ome.tif", tissue_pixels(), OME.format(c=3, size=size), photometric="rgb")
    with open_image(path) as image:
        assert image.microns_a_pixel == pytest.approx(scale)


def test_an_ome_tiff_in_strips_is_read_whole(tmp_path):
    """OpenSlide does not take it; its scale stands in the same place."""
    pixels, size = tissue_pixels(), 'PhysicalSizeX="0.5" PhysicalSizeY="0.5"'
    tifffile.imwrite(
        tmp_path / "a.ome.tif", pixels, description=OME.format(c=3, size=size), photometric="rgb", metadata=None
    )
    with open_image(tmp_path / "a.ome.tif") as image:
        assert image.microns_a_pixel == 0.5
        np.testing.assert_array_equal(image.read(0, 10, 20, 50, 60), pixels[20:80, 10:60])
    tifffile.imwrite(tmp_path / "b.ome.tif", np.zeros((5, 64, 64), np.uint16), ome=True)
    with pytest.raises(InputError, match="5 channels, as of fluorescence"), open_image(tmp_path / "b.ome.tif"):
        pass


def test_the_scale_that_is_given_is_taken_and_a_contradiction_warns(tmp_path):
    path = write_svs(tmp_path / "a.svs", tissue_pixels(), 0.25)
    with pytest.warns(InputWarning, match=r"says 0.25 um a pixel; 0.5 is taken"), open_image(path, 0.5) as image:
        assert image.microns_a_pixel == 0.5
    with open_image(path, 0.252) as image:
        assert image.microns_a_pixel == 0.252


def fluorescence(path):
    tifffile.imwrite(path, np.zeros((5, 512, 512), np.uint16), tile=(256, 256), ome=True)
    return path


def grey(path):
    return write_tiff(path, tissue_pixels()[..., 0], photometric="minisblack", resolution=(20000, 20000))


REFUSED = {
    "no scale": (lambda f: write_svs(f / "a.svs", tissue_pixels(), None), "says no um a pixel.*--mpp"),
    "72 dots an inch": (
        lambda f: write_tiff(f / "a.tif", tissue_pixels(), photometric="rgb", resolution=(72, 72), resolutionunit=2),
        "says no um a pixel.*--mpp",
    ),
    "unequal": (
        lambda f: write_tiff(
            f / "a.ome.tif",
            tissue_pixels(),
            OME.format(c=3, size='PhysicalSizeX="0.25" PhysicalSizeY="0.5"'),
            photometric="rgb",
        ),
        "says no um a pixel",
    ),
    "plain": (lambda f: write_png(f / "a.png"), "a plain picture, which says no scale; give its um a pixel with --mpp"),
    "missing": (lambda f: f / "a.svs", "no such file"),
    "a folder": (lambda f: f, "a folder; give a slide image"),
    "no image": (lambda f: (f / "a.svs").write_text("text") and f / "a.svs", "no slide image that OpenSlide reads"),
    "no dicom": (lambda f: (f / "a.dcm").write_bytes(bytes(128) + b"DICM" + bytes(50)) and f / "a.dcm", "a.dcm: "),
    "channels": (lambda f: fluorescence(f / "a.ome.tif"), "5 channels, as of fluorescence"),
    "grey": (lambda f: grey(f / "a.tif"), "1 channels, as of fluorescence"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused(fault, tmp_path):
    make, message = REFUSED[fault]
    with pytest.raises(InputError, match=message), open_image(make(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: Image.fromarray(tissue_pixels()).convert("L").save(path), "of the mode L, not RGB"),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90)), "cannot be read as an image"),
        (lambda path: path.write_bytes(write_png(path).read_bytes()[:3000]), "cannot be read as an image"),
    ],
)
def test_plain_pictures_that_are_refused(make, message, tmp_path):
    make(tmp_path / "a.png")
    with pytest.raises(InputError, match=message), open_image(tmp_path / "a.png", 0.5):
        pass


@pytest.mark.parametrize("mpp", [0, -1, float("nan"), 1000])
def test_scales_that_cannot_be(mpp):
    with pytest.raises(InputError, match="--mpp"), open_image(CROP, mpp):
        pass


def test_a_transparent_png_is_read_on_white(tmp_path):
    rgba = np.dstack([tissue_pixels(), np.full((1000, 1400), 255, np.uint8)])
    rgba[:300, :300, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    with open_image(tmp_path / "a.png", 0.5) as image:
        assert (image.read(0, 0, 0, 300, 300) == 255).all()
        np.testing.assert_array_equal(image.read(0, 300, 300, 100, 100), rgba[300:400, 300:400, :3])
