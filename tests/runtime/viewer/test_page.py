"""The page in headless Chromium, by the real server: `make test-view`, which installs the browser."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from viewing import SPOTS, Client, brute_force

from stpath_runtime.cli.app import main
from stpath_runtime.viewer import saved as saving
from stpath_runtime.viewer.regions import spots_within
from stpath_runtime.viewer.server import served
from stpath_runtime.viewer.shown import open_shown

pytestmark = pytest.mark.view
CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-unsafe-swiftshader"]
READY = "html[data-ready=yes]"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


class Watched:
    """A page, and what it should not have done."""

    def __init__(self, browser, own: str) -> None:
        self.page = browser.new_page(viewport={"width": 1400, "height": 900}, color_scheme="light")
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self.wrong.append(said.text) if self._is_wrong(said) else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self._asked(request.url, own))

    @staticmethod
    def _is_wrong(said) -> bool:
        return said.type in ("error", "warning") and "GPU stall due to ReadPixels" not in said.text

    def _asked(self, url: str, own: str) -> None:
        if not url.startswith((own, "data:", "blob:")):
            self.wrong.append(f"asked {url}")

    def open(self, url: str):
        self.page.goto(url)
        self.page.wait_for_selector(READY, timeout=30_000)
        return self.page


@pytest.fixture
def page(browser, client):
    watched = Watched(browser, client.base)
    yield watched.open(client.address)
    watched.page.close()
    assert watched.wrong == []


def pixels(page) -> np.ndarray:
    page.wait_for_timeout(250)  # a frame
    with Image.open(io.BytesIO(page.locator("#stage").screenshot())) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def take(page, name: str, field: str = "#gene") -> None:
    page.fill(field, name)
    page.press(field, "Enter")
    page.locator("#titles span", has_text=re.compile(f"^{name}$")).wait_for()


def kept(page) -> dict:
    return json.loads(unquote(page.url.partition("#")[2]))


def on_screen(page, spot) -> tuple[float, float]:
    """Where a place of the slide is drawn."""
    x, y, zoom = kept(page)["view"]
    box = page.locator("#stage").bounding_box()
    return box["x"] + box["width"] / 2 + (spot[0] - x) * zoom, box["y"] + box["height"] / 2 + (spot[1] - y) * zoom


def draw_circle(page, middle, radius) -> None:
    page.click("#lasso")
    points = [
        on_screen(page, (middle[0] + radius * math.cos(a), middle[1] + radius * math.sin(a)))
        for a in np.linspace(0, 2 * np.pi, 24)
    ]
    page.mouse.move(*points[0])
    page.mouse.down()
    for point in points[1:]:
        page.mouse.move(*point)
    page.mouse.up()
    page.wait_for_selector("#genes tr")


def test_the_map_shows_the_values_of_a_gene(page, predicted, every_gene, loaded):
    """The colour of each spot is that of its value between the 1st and the 99th percentile."""
    take(page, "GENE7")
    page.locator("#opacity").fill("100")
    found = pixels(page)
    ramp = page.evaluate("() => [...document.getElementById('ramp').getContext('2d').getImageData(0, 0, 256, 1).data]")
    ramp = np.array(ramp).reshape(256, 4)[:, :3]
    values = every_gene[:, loaded.vocabulary.find("GENE7") - 2]
    low, high = float(page.input_value("#low")), float(page.input_value("#high"))
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.01, 0.99])), abs=0.05 * float(np.ptp(values)))
    box = page.locator("#stage").bounding_box()
    wrong = 0
    for spot, value in zip(predicted.obsm["spatial"], values, strict=True):
        x, y = on_screen(page, spot)
        expected = ramp[int(np.clip((value - low) / (high - low), 0, 1) * 255 + 0.5)]
        wrong += int(np.abs(found[int(y - box["y"]), int(x - box["x"])] - expected).max() > 12)
    assert wrong <= SPOTS * 0.02  # the title and the hover lie over some


def test_another_gene_changes_the_map_and_its_name_is_completed(page):
    take(page, "GENE1")
    before = pixels(page)
    page.fill("#gene", "gene1")
    page.wait_for_selector("#found li")
    assert page.locator("#found li").all_inner_texts()[:2] == ["GENE1", "GENE10"]
    page.press("#gene", "ArrowDown")
    page.press("#gene", "ArrowDown")
    page.press("#gene", "Enter")
    page.locator("#titles span", has_text="GENE10").wait_for()
    assert (np.abs(pixels(page) - before).max(axis=2) > 20).mean() > 0.05


def test_a_second_map_shows_the_whole_slide_unless_one_has_moved(page, predicted):
    def corners() -> list[tuple[float, float]]:
        page.wait_for_timeout(200)
        places = predicted.obsm["spatial"]
        return [on_screen(page, corner) for corner in (places.min(axis=0), places.max(axis=0))]

    take(page, "GENE4")
    (left, _), (right, _) = corners()
    take(page, "GENE6", "#second")
    (left_of_two, _), (right_of_two, _) = corners()
    assert right_of_two - left_of_two < page.locator("#stage").bounding_box()["width"] / 2
    page.click("[data-pair=colours]")
    assert [x for x, _ in corners()] == pytest.approx([left, right], abs=1)
    page.click("#stage", position={"x": 5, "y": 5})
    page.keyboard.press("+")
    page.wait_for_timeout(200)
    moved = kept(page)["view"]
    page.click("[data-pair=side]")
    page.wait_for_timeout(200)
    assert kept(page)["view"] == moved


def test_a_gene_that_is_not_there_is_told_on_the_page(browser, client):
    watched = Watched(browser, client.base)
    page = watched.open(client.address)
    page.fill("#gene", "NOPE")
    page.press("#gene", "Enter")
    page.wait_for_selector("#message:not([hidden])")
    assert "no gene 'NOPE'" in page.inner_text("#message")
    page.close()


def test_a_region_drawn_by_mouse_is_that_of_brute_force(page, predicted, every_gene, loaded):
    middle = predicted.obsm["spatial"].mean(axis=0)
    draw_circle(page, middle, 600)
    (region,) = kept(page)["regions"]
    inside = spots_within(predicted.obsm["spatial"], region["polygon"])
    near = np.linalg.norm(predicted.obsm["spatial"] - middle, axis=1)
    assert set(np.flatnonzero(near < 560)) <= set(inside) <= set(np.flatnonzero(near < 640))
    rest = np.setdiff1d(np.arange(SPOTS), inside)
    assert page.inner_text("#region-title") == f"region 1: {len(inside)} spots against {len(rest)}"
    means, _, difference, effect = brute_force(every_gene, inside, rest)
    rows = [row.split("\t") for row in page.locator("#genes tr").all_inner_texts()]
    assert len(rows) == min(50, len(loaded.vocabulary))
    assert [abs(float(row[4])) for row in rows] == sorted((abs(float(row[4])) for row in rows), reverse=True)
    for row in rows:
        column = loaded.vocabulary.find(row[0]) - 2
        expected = [means[column], difference[column], effect[column]]
        assert [float(row[1]), float(row[3]), float(row[4])] == pytest.approx(expected, abs=6e-4)


def test_a_link_brings_back_gene_view_and_regions(browser, page, client, predicted):
    take(page, "GENE4")
    take(page, "GENE6", "#second")
    page.click("[data-pair=colours]")
    draw_circle(page, predicted.obsm["spatial"].mean(axis=0), 500)
    page.mouse.move(*on_screen(page, predicted.obsm["spatial"][40]))
    page.mouse.wheel(0, -400)
    seen = pixels(page)
    before, link = kept(page), page.url
    other = Watched(browser, client.base)
    again = other.open(link)
    again.wait_for_selector("#genes tr")
    assert kept(again) == before
    again.mouse.move(*on_screen(again, predicted.obsm["spatial"][40]))
    assert (np.abs(pixels(again) - seen).max(axis=2) > 20).mean() < 0.01
    again.close()
    assert other.wrong == []


def test_keys_move_zoom_and_draw(page):
    start = kept(page)["view"]
    page.click("#stage", position={"x": 5, "y": 5})
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    moved = kept(page)["view"]
    assert moved[2] == pytest.approx(1.25 * start[2], rel=1e-5)
    assert moved[0] > start[0]
    page.keyboard.press("f")
    page.wait_for_timeout(200)
    assert kept(page)["view"] == start
    page.keyboard.press("l")
    assert page.get_attribute("#lasso", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    assert page.get_attribute("#lasso", "aria-pressed") == "false"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "gene"


def test_hovering_tells_the_values_and_what_was_measured(page, predicted, every_gene, loaded):
    take(page, "GENE2")
    for spot, measured in ((2, True), (150, False)):
        page.mouse.move(*on_screen(page, predicted.obsm["spatial"][spot]))
        page.locator("#hover", has_text=predicted.obs_names[spot]).wait_for()
        told = page.inner_text("#hover")
        value = every_gene[spot, loaded.vocabulary.find("GENE2") - 2]
        assert told.startswith(f"GENE2 {value:.3f}\n{predicted.obs_names[spot]}")
        assert ("measured" in told) == measured


def test_coexpressed_genes_are_listed(page, every_gene, loaded):
    take(page, "GENE3")
    page.click("[data-panel=alike]")
    page.wait_for_selector("#alike tr")
    name, r = page.locator("#alike tr").first.inner_text().split("\t")
    exact = np.corrcoef(every_gene.T)[loaded.vocabulary.find("GENE3") - 2]
    exact[loaded.vocabulary.find("GENE3") - 2] = -1
    assert (loaded.vocabulary.find(name) - 2, float(r)) == (exact.argmax(), pytest.approx(exact.max(), abs=6e-4))
    assert "correlate more than measured" in page.inner_text("#alike-panel")


def download(page, button: str, path: Path) -> str:
    """What a click saves, written to `path`; the name that it has."""
    with page.expect_download() as waited:
        page.click(button)
    waited.value.save_as(path)
    return waited.value.suggested_filename


def saved_table(page, button: str, folder: Path) -> list[list[str]]:
    download(page, button, folder / "table.csv")
    with (folder / "table.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_what_is_seen_can_be_saved(page, tmp_path):
    assert download(page, "#picture", tmp_path / "saved.png").endswith(".png")
    with Image.open(tmp_path / "saved.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50
    assert len(saved_table(page, "#table", tmp_path)) == SPOTS + 1


def test_names_from_the_file_are_text(browser, predicted, tmp_path):
    adata = predicted[:, :2].copy()
    adata.var_names = ["<img src=x onerror=alert(1)>", "B"]
    del adata.var["gene_ids"]
    path = tmp_path / "<b>p.h5ad"
    adata.write_h5ad(path)
    with open_shown(path) as shown, served(shown) as address:
        watched = Watched(browser, Client(address).base)
        page = watched.open(address)
        page.fill("#gene", "<img")
        page.wait_for_selector("#found li")
        page.press("#gene", "Enter")
        draw_circle(page, adata.obsm["spatial"].mean(axis=0), 600)
        assert page.inner_text("#name") == "<b>p.h5ad"
        assert page.locator("img, b").count() == 0
        page.close()
        assert watched.wrong == []


def test_the_table_of_a_region_holds_no_formula(browser, predicted, tmp_path):
    adata = predicted[:, :2].copy()
    adata.var_names = ["=1+2", 'B, "b"']
    del adata.var["gene_ids"]
    adata.write_h5ad(tmp_path / "p.h5ad")
    with open_shown(tmp_path / "p.h5ad") as shown, served(shown) as address:
        page = Watched(browser, Client(address).base).open(address)
        draw_circle(page, adata.obsm["spatial"].mean(axis=0), 600)
        header, *rows = saved_table(page, "#save-region", tmp_path)
        shown_rows = [row.split("\t") for row in page.locator("#genes tr").all_inner_texts()]
        page.close()
    assert header == ["gene", "inside", "against", "difference", "effect"]
    assert sorted(row[0] for row in rows) == ["'=1+2", 'B, "b"']
    for row, seen in zip(rows, shown_rows, strict=True):
        assert [float(cell) for cell in row[1:]] == pytest.approx([float(cell) for cell in seen[1:]], abs=6e-4)


def test_when_the_viewer_has_ended_the_page_says_so(browser, shown):
    with served(shown) as address:
        page = Watched(browser, Client(address).base).open(address)
    page.fill("#gene", "GENE5")
    page.press("#gene", "Enter")
    page.wait_for_selector("#message:not([hidden])")
    assert "The viewer has ended" in page.inner_text("#message")
    page.close()


@pytest.fixture(params=["float16", "int8"])
def saved(request, browser, shown, tmp_path, monkeypatch):
    """A saved page, opened from the disk, and how its weights are kept."""
    if request.param == "int8":
        monkeypatch.setattr(saving, "MOST_HALF", 5)
    saving.save_page(shown, tmp_path / "page.html")
    watched = Watched(browser, (tmp_path / "page.html").as_uri())
    page = watched.open((tmp_path / "page.html").as_uri())
    yield page, 3e-3 if request.param == "float16" else 3e-2
    page.close()
    assert watched.wrong == []


def test_a_saved_page_needs_no_server(saved, predicted, every_gene, loaded, tmp_path):
    page, near = saved
    take(page, "GENE7")
    exact = every_gene[:, loaded.vocabulary.find("GENE7") - 2]
    found = page.evaluate("async () => [...await globalThis.stpathSource.gene('GENE7')]")
    np.testing.assert_allclose(found, exact, atol=near)
    middle = predicted.obsm["spatial"].mean(axis=0)
    draw_circle(page, middle, 600)
    (region,) = kept(page)["regions"]
    inside = spots_within(predicted.obsm["spatial"], region["polygon"])
    others = np.setdiff1d(np.arange(SPOTS), inside)

    def check() -> None:
        means, _, _, effect = brute_force(every_gene, inside, others)
        rows = [row.split("\t") for row in page.locator("#genes tr").all_inner_texts()]
        assert len(rows) == min(50, len(loaded.vocabulary))
        for row in rows:
            column = loaded.vocabulary.find(row[0]) - 2
            assert [float(row[1]), float(row[4])] == pytest.approx([means[column], effect[column]], abs=5 * near)

    check()
    draw_circle(page, predicted.obsm["spatial"][0] + [300, 300], 400)  # and against that one
    page.locator("#regions .swatch").first.click()
    page.select_option("#against", "region 2")
    others = spots_within(predicted.obsm["spatial"], kept(page)["regions"][1]["polygon"])
    page.locator("#region-title", has_text=f"against {len(others)}").wait_for()
    check()
    header, *rows = saved_table(page, "#table", tmp_path)
    assert header == ["spot", "x", "y", "GENE7", "region"]
    assert [row[0] for row in rows] == list(predicted.obs_names)
    table = np.array([row[1:4] for row in rows], float)
    np.testing.assert_allclose(table[:, :2], predicted.obsm["spatial"], rtol=1e-6)
    np.testing.assert_allclose(table[:, 2], exact, atol=near)
    page.mouse.move(*on_screen(page, predicted.obsm["spatial"][7]))
    page.locator("#hover", has_text=predicted.obs_names[7]).wait_for()
    assert [i for i, row in enumerate(rows) if "region 1" in row[4].split("; ")] == inside.tolist()
    page.click("[data-panel=alike]")
    page.wait_for_selector("#alike tr")
    name, r = page.locator("#alike tr").first.inner_text().split("\t")
    exact = np.corrcoef(every_gene.T)[loaded.vocabulary.find("GENE7") - 2, loaded.vocabulary.find(name) - 2]
    assert float(r) == pytest.approx(exact, abs=near)
    page.reload()
    page.wait_for_selector(READY)
    assert page.locator("#regions li").count() == 2


def test_a_saved_page_of_some_genes_keeps_the_tissue(browser, predicted, loaded, tmp_path):
    pixels_of_tissue = np.zeros((400, 500, 3), np.uint8)
    pixels_of_tissue[:, :, 0] = 200
    adata = predicted.copy()
    library = {"images": {"hires": pixels_of_tissue}, "scalefactors": {"tissue_hires_scalef": 0.1}}
    adata.uns["spatial"] = {"slide": library}
    adata.write_h5ad(tmp_path / "p.h5ad")
    words = [
        "view",
        tmp_path / "p.h5ad",
        "--engine",
        loaded.path,
        "--save",
        tmp_path / "p.html",
        "--genes",
        "GENE2,ALIAS3",
    ]
    assert main([str(word) for word in words]) == 0
    watched = Watched(browser, (tmp_path / "p.html").as_uri())
    page = watched.open((tmp_path / "p.html").as_uri())
    page.locator("#opacity").fill("0")
    page.wait_for_timeout(300)
    red = pixels(page)
    assert (np.abs(red - [200, 0, 0]).max(axis=2) < 30).mean() > 0.3
    page.fill("#gene", "GENE5")
    page.press("#gene", "Enter")
    page.locator("#message", has_text="This page holds no gene 'GENE5'").wait_for()
    page.close()
    assert watched.wrong == []
