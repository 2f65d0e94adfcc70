"""The examples of the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import numpy as np
import pytest

import stpath_export
import stpath_runtime
import stpath_train
from helpers import CROP, load_flow_golden, write_slide
from stpath_runtime.results.output import write_h5ad

pytestmark = pytest.mark.docs

# Served by Triton, which brings what it imports; and what needs a GPU's compiler.
NOT_IMPORTED = ("stpath_runtime.serving.model", "stpath_runtime.__main__")


def modules() -> list[str]:
    """The modules that have an example."""
    found = []
    for package in (stpath_runtime, stpath_train, stpath_export):
        names = [package.__name__]
        names += [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
        for name in names:
            spec = importlib.util.find_spec(name) if name not in NOT_IMPORTED else None
            if spec is not None and ">>>" in (spec.loader.get_source(name) or ""):
                found.append(name)
    return found


@pytest.fixture(scope="module")
def names(tiny, tiny_engine, tiny_encoder, flow_engine, tmp_path_factory):
    """What an example may name without making it: an engine, a slide and their files, and NumPy."""
    _, slide, _ = tiny.slides()[0]
    slide = stpath_runtime.Slide(slide.coords, slide.features, slide.barcodes, name="slide")
    folder = tmp_path_factory.mktemp("examples")
    write_slide(slide, folder / "s.h5")
    engine = stpath_runtime.Engine.load(tiny_engine)
    write_h5ad(engine.predict(slide, genes=["GENE1"], embeddings=True), folder / "embedded.h5ad")
    return folder, {
        "engine": engine,
        "embedded_path": "embedded.h5ad",
        "engine_path": tiny_engine,
        "encoder_path": tiny_encoder,
        "flow_engine": stpath_runtime.Engine.load(flow_engine),
        "flow_path": flow_engine,
        "flow_slide": load_flow_golden("n9").slide,
        "image_path": CROP,
        "slide": slide,
        "slide_path": "s.h5",
        "np": np,
    }


@pytest.mark.parametrize("module", modules())
def test_examples(module, names, monkeypatch):
    folder, given = names
    monkeypatch.chdir(folder)
    loaded = importlib.import_module(module)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(loaded, module):
        example.globs = {**vars(loaded), **given}
        runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0
