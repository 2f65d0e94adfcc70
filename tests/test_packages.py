"""What an installation from the package index would lack."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WITHOUT_EXAMPLES = ("close", "encode", "resolve", "normalized_coords", "hash", "trained")  # nothing to show
ERRORS = ("InputError", "InputWarning", "ParityError")


def test_every_package_is_installed():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"stpath_runtime": "stpath_runtime", "stpath_train": "stpath_train", "export": "stpath_export"}
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for folder, package in folders.items()
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert set(setup["packages"]) == found


# What an import is called on the package index, where that is another name, and by which other package it comes: a
# library that belongs to one that is declared.
DISTRIBUTIONS = {
    "cuda": "cuda-bindings",
    "sklearn": "scikit-learn",
    "torch_geometric": "torch_geometric",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "openslide": "openslide-python",
    "onnx_ir": "onnx-ir",
}
OURS = {"stpath_runtime", "stpath_train", "stpath_export"}
NOT_INSTALLED_BY_PIP = {"triton_python_backend_utils"}  # Triton's server brings it
NOT_IMPORTED = {
    "stpath-engine": "itself, with other extras",
    "onnxruntime-gpu": "imported as onnxruntime, beside which it must not be",
    "tensorrt": "imported by name, stpath_runtime.backends.plans.LIBRARIES",
    "tensorrt-rtx-cu13": "likewise",
    "onnx": "torch.onnx writes it",
    "onnxscript": "torch.onnx writes through it",
    "tensorboard": "Lightning's logger, stpath_train.run",
    "igraph": "scanpy's Leiden",
    "openslide-bin": "the library that openslide-python calls",
    "torchvision": "timm's preprocessing",
}


def imports(folder: Path) -> set[str]:
    """What the modules of a package import from elsewhere."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(str(node.module).partition(".")[0])
    return found - set(sys.stdlib_module_names) - OURS - NOT_INSTALLED_BY_PIP


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml declares for the runtime and extras, and those of extras within them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named, waiting = set(), [*project["dependencies"]]
    waiting += [line for extra in extras for line in project["optional-dependencies"][extra]]
    while waiting:
        name, inner = re.match(r"([\w.\-]+)(?:\[([\w,\-]+)\])?", waiting.pop()).groups()
        named.add(name.lower().replace("_", "-"))
        if name == "stpath-engine":
            waiting += [line for extra in inner.split(",") for line in project["optional-dependencies"][extra]]
    return named


RUNTIME = ("wsi", "cpu", "gpu", "openvino", "tensorrt", "tensorrt-rtx", "plot", "view", "spatialdata", "remote", "ray")


def test_every_import_is_declared():
    for folder, extras in {
        "stpath_runtime": RUNTIME,
        "stpath_train": ("train", "tensorboard", "features", "model", "dev"),
        "export": ("export", "plot", "features", *RUNTIME),
    }.items():
        wanted = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in imports(ROOT / folder)}
        assert not wanted - declared(*extras), folder


def test_nothing_is_declared_that_is_not_imported():
    imported = {
        DISTRIBUTIONS.get(name, name).lower().replace("_", "-")
        for folder in ("stpath_runtime", "stpath_train", "export")
        for name in imports(ROOT / folder)
    }
    assert not declared(*RUNTIME, "train", "tensorboard", "features", "model", "export") - imported - set(NOT_IMPORTED)


PUBLIC = {
    "stpath_runtime": (
        *("Attention", "Context", "Engine", "FlowEngine", "InputError", "InputWarning", "ParityError", "Slide"),
        *("open_lazy", "read_slide", "view"),
    ),
    "stpath_train": ("STPath", "load_checkpoint", "save_checkpoint"),
    "stpath_export": (),
}


@pytest.mark.parametrize("package", PUBLIC)
def test_what_is_public_is_named_documented_and_nothing_else(package):
    module = importlib.import_module(package)
    assert sorted(getattr(module, "__all__", ())) == sorted(PUBLIC[package])
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for name in PUBLIC[package]:
        thing = getattr(module, name)
        assert thing.__doc__, name
        named = re.search(rf"{package}\.([\w.]+\.)?{name}\b", pages) or f"automodule:: {thing.__module__}\n" in pages
        assert named, name
    ours = {
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "").partition(".")[0] in OURS
    }
    assert ours - {"keep_old_paths"} <= set(PUBLIC[package])


@pytest.mark.parametrize("name", [name for name in PUBLIC["stpath_runtime"] if name not in ERRORS])
def test_what_is_public_has_examples(name):
    import stpath_runtime

    thing = getattr(stpath_runtime, name)
    methods = [method for word, method in inspect.getmembers(thing, callable) if not word.startswith("_")]
    of_class = [method for method in methods if inspect.getdoc(method) and inspect.isclass(thing)]
    for documented in [thing, *of_class]:
        if getattr(documented, "__name__", "") not in WITHOUT_EXAMPLES:
            assert ">>>" in inspect.getdoc(documented), documented
