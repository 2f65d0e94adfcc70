"""What computes the same prediction: the engine by each backend, PyTorch as it is and compiled, and the formula taken
literally. A call starts with a slide in memory and ends with the expression there; neighbours are found in it.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from stpath_runtime import Context, Engine, Slide
from stpath_runtime.encoding import encoder as stages
from stpath_runtime.encoding.attention import Attention, Spots, keys_of
from stpath_runtime.machine import available_on_host
from stpath_runtime.measures.bench.results import Row
from stpath_runtime.measures.bench.timing import Call
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.inputs import knn_blocks, slide_inputs
from stpath_train.literal import literal_forward
from stpath_train.model import STPath

LITERAL_BYTES = 240  # a pair of spots: 6 GB at 5,000
REFERENCE_UP_TO = {"global": 5_000, "knn": 20_000}  # spots: float64 takes its time
WRONG = {"fp32": 1e-5, "fp16": 0.05, "bf16": 0.05}  # relative L2 above which a result is wrong
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Case:
    """A slide, how its spots attend, and the genes to predict (None: all)."""

    slide: Slide
    attention: str = "global"
    neighbors: int = 0
    genes: Sequence[str] | None = None
    context: Context | None = None

    def row(self, what: str, vocabulary: GeneVocabulary, **by: Any) -> Row:
        """The row of what is measured on it."""
        genes = len(vocabulary) if self.genes is None else len(self.genes)
        context = len(self.context.ids) if self.context is not None else 0
        sizes = {"spots": len(self.slide), "genes": genes, "context": context}
        return Row(what, attention=self.attention, neighbors=self.neighbors, **sizes, **by)


def by_engines(what: str, engines: Sequence[Engine], case: Case) -> dict[Row, Call]:
    """The engine by each backend and precision; the first is the base."""
    return {
        case.row(what, engine.vocabulary, backend=engine.backend.name, precision=engine.precision): partial(
            predict, engine, case
        )
        for engine in engines
    }


def by_torch(
    what: str, model: STPath, vocabulary: GeneVocabulary, case: Case, compiled: bool = True
) -> dict[Row, Call]:
    """PyTorch in float32: eager, compiled, PyTorch Geometric (kNN), and the literal formula (global, where it fits)."""
    row, on = partial(case.row, what, vocabulary), (vocabulary, case)
    calls: dict[Row, Call] = {row(variant="PyTorch eager"): partial(collapsed, model, *on)}
    if compiled:
        calls[row(variant="PyTorch compiled")] = partial(collapsed, _compiled(model), *on)
    if case.attention == "knn":
        calls[row(variant="PyTorch Geometric")] = partial(geometric, model, *on)
    elif len(case.slide) ** 2 * LITERAL_BYTES < available_on_host() / 2:
        calls[row(variant="literal formula")] = partial(literal, model, *on)
    return calls


def predict(engine: Engine, case: Case, tile: int = 0) -> np.ndarray:
    """Expression [N, G] by an engine."""
    slide, k = case.slide, case.neighbors
    if not tile:
        embedding = engine.embed(slide, context=case.context, attention=case.attention, neighbors=k or None)
        return engine.decode(embedding, case.genes)
    spots = Spots.of([slide], [None])
    keys = keys_of([slide], spots, engine.manifest.model, engine.precision, Attention(case.attention, k))
    embedding = stages.encode(engine.backend, engine.manifest.model, engine.precision, spots, keys, tile=tile)
    return engine.decode(embedding, case.genes)


def collapsed(forward: Any, vocabulary: GeneVocabulary, case: Case, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Expression [N, G] by the model in PyTorch, kNN in dense blocks."""
    inputs = slide_inputs(case.slide, vocabulary, case.context, dtype)
    if case.attention == "knn":
        inputs["blocks"] = knn_blocks([case.slide.coords], case.neighbors)
    with torch.inference_mode():
        found = forward(**inputs, token_ids=_tokens(vocabulary, case))
    return (found if dtype == torch.float64 else found.float()).numpy()


def geometric(model: STPath, vocabulary: GeneVocabulary, case: Case) -> np.ndarray:
    """The same with kNN attention as message passing."""
    inputs = slide_inputs(case.slide, vocabulary, case.context, neighbors=case.neighbors)
    with torch.inference_mode():
        return model(**inputs, token_ids=_tokens(vocabulary, case)).numpy()


def literal(model: STPath, vocabulary: GeneVocabulary, case: Case) -> np.ndarray:
    """The same by the published formula, with dense tokens and a head over all genes."""
    with torch.inference_mode():
        expression = literal_forward(model, **slide_inputs(case.slide, vocabulary, case.context))[1]
    return expression[:, _tokens(vocabulary, case)].numpy()


def reference(model: STPath, vocabulary: GeneVocabulary, case: Case) -> tuple[np.ndarray, str]:
    """What the others are held to, and its name: PyTorch in float64, or in float32 where that would take too long."""
    if len(case.slide) <= REFERENCE_UP_TO[case.attention]:
        return collapsed(in_precision(model, torch.float64), vocabulary, case, torch.float64), "float64"
    return collapsed(model, vocabulary, case), "PyTorch fp32"


@cache
def in_precision(model: STPath, dtype: torch.dtype) -> STPath:
    """The model in another type."""
    return copy.deepcopy(model).to(dtype)


def _compiled(model: STPath) -> Any:
    torch._dynamo.reset()  # else the sizes of earlier slides count against a limit
    return torch.compile(model, dynamic=False)


def require_right(row: Row, error: float, reference: str) -> None:
    """Raise ArithmeticError where a result is so far from the reference (relative L2) that its speed says nothing."""
    if not error <= WRONG[row.precision]:  # NaN, too
        raise ArithmeticError(f"relative L2 {error:.1e} to {reference}: wrong, so not timed")


def require_compiler() -> None:
    """Raise OSError where torch.compile would not compile."""
    if torch._dynamo.config.disable:
        raise OSError("torch.compile is disabled here (TORCH_COMPILE_DISABLE)")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise OSError("no C++ compiler here, which torch.compile needs")


def _tokens(vocabulary: GeneVocabulary, case: Case) -> torch.Tensor:
    return torch.from_numpy(vocabulary.all_tokens() if case.genes is None else vocabulary.tokens(case.genes))
