"""A prediction by PyTorch in a process of its own: its time, and its peak memory.

`python benchmarks/torch_alone.py CHECKPOINT ENGINE VARIANT SPOTS K`; the engine tells the genes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from stpath_runtime.machine import memory_of_process
from stpath_runtime.manifest import GENES
from stpath_runtime.measures.bench.timing import seconds_of
from stpath_runtime.slides.slide import random_slide
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint
from variants import Case, collapsed, geometric, literal

CALLS = {"PyTorch eager": collapsed, "PyTorch Geometric": geometric, "literal formula": literal}


def run_torch_alone(checkpoint: Path, engine: Path, variant: str, spots: int, k: int) -> tuple[float, int]:
    """Seconds of the first call in a new process, and the bytes that the process takes at the most."""
    command = [sys.executable, __file__, str(checkpoint), str(engine), variant, str(spots), str(k)]
    seconds, peak = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    return seconds, peak


def _main(checkpoint: str, engine: str, variant: str, spots: str, k: str) -> None:
    model, vocabulary = load_checkpoint(checkpoint), GeneVocabulary.read(Path(engine) / GENES)
    slide, genes = random_slide(int(spots), model.config.n_features, 0), vocabulary.ensembl_ids[:50]
    case = Case(slide, "knn" if int(k) else "global", int(k), genes)
    seconds = seconds_of(lambda: CALLS[variant](model, vocabulary, case))
    print(json.dumps([seconds, memory_of_process()]))


if __name__ == "__main__":
    _main(*sys.argv[1:])
