"""A model of the published sizes (49.2 M parameters, 38,984 tokens) with weights from a seed, and engines of it.

Made once and kept in .benchmarks/, under a hash of all that they are made from; an older one is deleted.
"""

from __future__ import annotations

import hashlib
import shutil
from importlib.metadata import version
from pathlib import Path

from stpath_export.exporter import write_engine
from stpath_runtime.files import sha256, written_whole
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint, save_checkpoint, seeded_checkpoint
from stpath_train.model import PUBLISHED_SIZES

ROOT = Path(__file__).parent.parent
KEPT = ROOT / ".benchmarks"
SEED = 0
SOURCES = ("export/*.py", "stpath_train/model.py", "stpath_train/checkpoint.py", "stpath_runtime/data/*genes*")
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


def checkpoint() -> Path:
    """The checkpoint."""
    path = _folder() / "checkpoint.safetensors"
    if not path.exists():
        save_checkpoint(seeded_checkpoint(PUBLISHED_SIZES, SEED), path)
    return path


def engine(precision: str = "fp32") -> Path:
    """An engine of it; without the proof, since benchmarks hold all that they time to a reference themselves."""
    path = _folder() / precision
    if not path.exists():
        source = {"name": checkpoint().name, "sha256": sha256(checkpoint())}
        model, vocabulary = load_checkpoint(checkpoint()), GeneVocabulary.published()
        with written_whole(path) as partial:
            partial.mkdir()
            write_engine(model, vocabulary, partial, precision, source)
    return path


def _folder() -> Path:
    facts = hashlib.sha256(repr((PUBLISHED_SIZES, SEED, [(name, version(name)) for name in LIBRARIES])).encode())
    for path in sorted(found for pattern in SOURCES for found in ROOT.glob(pattern)):
        facts.update(path.read_bytes())
    folder = KEPT / f"engine-{facts.hexdigest()[:12]}"
    for other in KEPT.glob("engine-*"):
        if other != folder:
            shutil.rmtree(other)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
