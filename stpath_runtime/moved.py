"""Old import paths: modules that were moved can still be imported by the names that they had before 0.1.0.

>>> from stpath_runtime.vocabulary import GeneVocabulary
>>> GeneVocabulary.__module__
'stpath_runtime.slides.vocabulary'
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
MOVED = {
    "context": "slides.context",
    "cuda": "backends.cuda",
    "distributed": "cohort.on_ray",
    "doctor": "measures.doctor",
    "encoder": "encoding.encoder",
    "fidelity": "measures.fidelity",
    "memory": "machine",
    "neighbors": "encoding.neighbors",
    "output": "results.output",
    "pipeline": "cohort.pipeline",
    "plan_builder": "backends.plan_builder",
    "plans": "backends.plans",
    "plot": "results.plot",
    "prediction": "results.prediction",
    "remote": "cohort.remote",
    "sample": "slides.sample",
    "slide": "slides.slide",
    "targets": "results.targets",
    "triton": "serving.repository",
    "vocabulary": "slides.vocabulary",
}


class _MovedLoader(Loader):
    """Loads a module by its new name, under its old one."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.name)
        self.spec = module.__spec__  # which the import system is about to overwrite
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _MovedFinder(MetaPathFinder):
    """Finds the modules of MOVED by their old names."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != PACKAGE or name not in MOVED:
            return None
        return spec_from_loader(fullname, _MovedLoader(f"{PACKAGE}.{MOVED[name]}"))


def keep_old_paths() -> None:
    """Let modules be imported by their old names."""
    sys.meta_path.append(_MovedFinder())
