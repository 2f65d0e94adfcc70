"""The proof of parity: an engine against the float64 reference, over a grid of slides."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from stpath_runtime.checks import check_slide
from stpath_runtime.encoding import encoder
from stpath_runtime.encoding.attention import AllSpots, Attention, NearestSpots, Spots, keys_of
from stpath_runtime.engine import Engine
from stpath_runtime.errors import ParityError
from stpath_runtime.measures.agreement import gene_pearson, relative_l2
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide, random_slide
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary
from stpath_train.inputs import slide_inputs
from stpath_train.model import STPath

Floats = npt.NDArray[Any]
Report = dict[str, Any]  # what engine.json keeps of a proof

L2_BAR = 1e-5  # fp32, relative to the reference
PEARSON_BAR = 0.99999  # fp32, of every gene that varies
TIMES_TORCH = 2.0  # a lower precision may have twice the error that PyTorch has in it
LOW_PEARSON_BAR = 0.999  # a lower precision, of every gene that varies, on slides that are given
LOW_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SPOTS = (1, 2, 37, 500)
SMALL_TILE = 16  # cuts all but the smallest slides into many tiles
FUSED_SPOTS = 1_000  # the fused graph holds all scores at once: it is proven on slides up to this size
PANEL = 50
KNN = 8

# An error at the bar of L2 alone lowers a gene's Pearson r by (error / spread)^2 / 2. Where a gene's spread over the
# spots is so small that this breaks the bar of Pearson, its r tells rounding, not parity.
FLAT = L2_BAR / np.sqrt(2 * (1 - PEARSON_BAR))


@dataclass(frozen=True)
class Case:
    """One comparison: a slide, perhaps with context, and the genes to decode (None: all)."""

    name: str
    slide: Slide
    context: Context | None = None
    genes: Sequence[str] | None = None
    given: bool = False  # a slide of the user, not of the grid


def grid(model: STPath, vocabulary: GeneVocabulary) -> list[Case]:
    """Slides of 1 to 500 spots, with and without context, a panel and all genes, on several organs and technologies."""
    rng = np.random.default_rng(0)
    names = vocabulary.ensembl_ids
    panel = [names[i] for i in rng.choice(len(names), min(PANEL, len(names)), replace=False)]
    organs = [organ for organ in ORGANS if not organ.startswith("<")]
    technologies = [None, *(t for t in TECHNOLOGIES if not t.startswith("<"))]
    cases: list[Case] = []
    for spots in SPOTS:
        for context in (False, True):
            for genes in (panel, None):
                i = len(cases)
                organ, technology = organs[(i * 7) % len(organs)], technologies[i % len(technologies)]
                slide = random_slide(spots, model.config.n_features, i, organ, technology)
                measured = _random_context(slide, panel, rng) if context else None
                what = [f"{spots} {'spot' if spots == 1 else 'spots'}", organ, technology or "no technology"]
                cases.append(Case(", ".join(what + ["context"] * context), slide, measured, genes))
    return cases


def all_cases(model: STPath, vocabulary: GeneVocabulary, given: Sequence[Slide | Case] = ()) -> list[Case]:
    """The grid, and what is given beside it: slides, of which a panel is decoded, or whole cases."""
    cases = grid(model, vocabulary)
    panel = cases[0].genes
    return cases + [g if isinstance(g, Case) else Case(g.name, g, None, panel, given=True) for g in given]


def attentions(case: Case) -> tuple[int | None, ...]:
    """The neighbours with which a case is compared: None is global attention; kNN attention, too, of a panel."""
    return (None, KNN) if case.genes is not None else (None,)


def prove(
    directory: Path,
    model: STPath,
    given: Sequence[Slide | Case] = (),
    *,
    backend: str = "onnxruntime",
    device: str = "cpu",
    precision: str | None = None,
    on_step: OnTile | None = None,
) -> Report:
    """Hold an engine to the float64 reference on the grid and on what is given beside it.

    Every case runs by the stages and by the stages in small tiles, and with ONNX Runtime by the fused graph (up to
    1,000 spots), which servers run with it; with global attention, and those of a panel with kNN attention, too.

    Parameters
    ----------
    model
        The reference, with the weights of the checkpoint as they are in the file.
    given
        Slides, or cases of an earlier report's bundle.
    backend, device, precision
        What runs the engine, as for `Engine.load`. Below float32 the bar is twice the error that PyTorch makes in the
        same precision and, on the slides given, a Pearson r of 0.999 for every gene.
    on_step
        Called with (done, total) after each case and way to attend.

    Returns
    -------
    Report
        For `engine.json`: whether it passed, the bars, and a row a case and path.

    Raises
    ------
    InputError
        As `Engine.load`, and if a slide does not fit the engine.
    """
    engine = Engine.load(directory, backend=backend, device=device, precision=precision)
    engine.manifest.check_files(directory)
    cases = all_cases(model, engine.vocabulary, given)
    for case in cases:
        check_slide(case.slide, engine.manifest)
    todo = [(case, neighbors) for case in cases for neighbors in attentions(case)]
    rows = []
    exact_model = copy.deepcopy(model).to(torch.float64)
    low_dtype = LOW_DTYPES.get(engine.precision)
    low_model = copy.deepcopy(model).to(low_dtype) if low_dtype is not None else None
    for done, (case, neighbors) in enumerate(todo, 1):
        exact = reference(exact_model, case, engine.vocabulary, neighbors)
        low = reference(low_model, case, engine.vocabulary, neighbors) if low_model is not None else None
        pearson_bar = pearson_bar_of(engine.precision, case.given)
        for path, found in engine_paths(engine, case, neighbors):
            rows.append({"case": case.name, "path": path, **compare(found, exact, low, pearson_bar)})
        if on_step is not None:
            on_step(done, len(todo))
    return summary(engine, rows)


def summary(engine: Engine, rows: list[dict[str, Any]]) -> Report:
    """The report of an engine's comparisons."""
    return {
        "passed": all(row["passed"] for row in rows),
        "reference": "float64",
        "bars": _bars(engine.precision),
        "precision": engine.precision,
        "backend": f"{engine.backend.name} on {engine.backend.device}",
        "cases": rows,
    }


def require_passed(report: Report) -> None:
    """Raise ParityError, naming the worst case, unless the report passed."""
    failed = [row for row in report["cases"] if not row["passed"]]
    if failed:
        worst = max(failed, key=excess)
        raise ParityError(
            f"{len(failed)} of {len(report['cases'])} comparisons miss the bar; the worst is {describe(worst)}"
        )


def excess(row: Mapping[str, Any]) -> float:
    """The error of a comparison over its bar, of the expression or the embedding; infinite where it is not finite."""
    pairs = (("relative_l2", "bar_l2"), ("embedding_l2", "embedding_bar"))
    parts = np.array([row[error] / row[bar] for error, bar in pairs if error in row])  # STFlow has no embedding
    return float(parts.max()) if np.isfinite(parts).all() else np.inf


def describe(row: Mapping[str, Any]) -> str:
    """A comparison in words: the case, the path, the errors and their bars."""
    pearson = "" if row["pearson_min"] is None else f", lowest Pearson {row['pearson_min']:.7f}"
    embedding = ""
    if "embedding_l2" in row:
        embedding = f", embedding {row['embedding_l2']:.2e} (bar {row['embedding_bar']:.2e})"
    l2 = f"relative L2 {row['relative_l2']:.2e} (bar {row['bar_l2']:.2e})"
    return f"{row['case']} by the {row['path']}: {l2}{embedding}{pearson}"


def lowest_pearson(found: Floats, exact: Floats) -> tuple[float | None, int]:
    """Lowest Pearson r over the genes (columns) that vary, None if none does; and how many are flat."""
    r = pearson_of_genes(found, exact)
    return float(r.min()) if len(r) else None, exact.shape[1] - len(r)


def pearson_of_genes(found: Floats, exact: Floats) -> npt.NDArray[np.float64]:
    """Pearson r over the spots, of each gene (column) that is not flat.

    A gene is flat where its spread over the spots is below FLAT times the root mean square of the whole reference.
    """
    return gene_pearson(found, exact, flat=FLAT * float(np.sqrt(np.mean(exact**2))))


def compare(
    found: tuple[Floats, Floats],
    exact: tuple[Floats, Floats],
    low: tuple[Floats, Floats] | None = None,
    pearson_bar: float | None = PEARSON_BAR,
) -> dict[str, Any]:
    """One row of the report: expression and embedding.

    Parameters
    ----------
    found, exact, low
        (embedding [N, d], expression [N, G]) of the engine, of the float64 reference, and of PyTorch in the engine's
        precision where that is below float32.
    pearson_bar
        The least Pearson r of a gene that varies; None means any.
    """
    row = compare_expression(found[1], exact[1], low[1] if low is not None else None, pearson_bar)
    error, bar = relative_l2(found[0], exact[0]), _bar(low[0] if low is not None else None, exact[0])
    return row | {"embedding_l2": error, "embedding_bar": bar, "passed": row["passed"] and error <= bar}


def compare_expression(
    found: Floats, exact: Floats, low: Floats | None = None, pearson_bar: float | None = PEARSON_BAR
) -> dict[str, Any]:
    """The same of expression [N, G] alone."""
    l2, bar = relative_l2(found, exact), _bar(low, exact)
    pearson, flat = lowest_pearson(found, exact)
    correlated = pearson_bar is None or pearson is None or pearson >= pearson_bar
    return {
        "spots": len(exact),
        "genes": exact.shape[1],
        "relative_l2": l2,
        "bar_l2": bar,
        "pearson_min": pearson,
        "flat_genes": flat,
        "max_abs": float(np.abs(found - exact).max()),
        "passed": bool(l2 <= bar and correlated),  # `<=` on purpose: NaN compares false, so that NaN fails
    }


def _bar(low: Floats | None, exact: Floats) -> float:
    """The largest relative L2 that passes."""
    return L2_BAR if low is None else TIMES_TORCH * relative_l2(low, exact)


def pearson_bar_of(precision: str, given: bool) -> float | None:
    """The least Pearson r of a gene that varies; None: any, as of random slides in a low precision."""
    if precision == "fp32":
        return PEARSON_BAR
    return LOW_PEARSON_BAR if given else None


def spots_and_keys(engine: Engine, case: Case, neighbors: int | None) -> tuple[Spots, AllSpots | NearestSpots]:
    """A case as `stpath_runtime.encoding.encoder` takes it."""
    rows = case.context.resolve(case.slide, engine.vocabulary) if case.context is not None else None
    spots = Spots.of([case.slide], [rows])
    attention = Attention(attention_name(neighbors), neighbors or 0)
    return spots, keys_of([case.slide], spots, engine.manifest.model, engine.precision, attention)


def attention_name(neighbors: int | None) -> str:
    """The name of the attention."""
    return "global" if neighbors is None else "knn"


def engine_paths(engine: Engine, case: Case, neighbors: int | None) -> Iterator[tuple[str, tuple[Floats, Floats]]]:
    """The ways in which an engine computes a case: name, (embedding, expression)."""
    attention = attention_name(neighbors)
    spots, keys = spots_and_keys(engine, case, neighbors)
    backend, model, precision = engine.backend, engine.manifest.model, engine.precision
    tokens = engine.vocabulary.panel(case.genes).tokens
    embedding = encoder.encode(backend, model, precision, spots, keys)
    yield f"{attention}, stages", (embedding, engine.decode(embedding, case.genes))
    small = max(SMALL_TILE, keys.unit)
    if keys.rows > small:
        embedding = encoder.encode(backend, model, precision, spots, keys, tile=small)
        yield f"{attention}, stages, small tiles", (embedding, engine.decode(embedding, case.genes))
    if backend.name == "onnxruntime" and len(case.slide) <= FUSED_SPOTS:
        yield f"{attention}, fused graph", encoder.run_fused(backend, precision, spots, keys, tokens)


def reference(
    model: STPath, case: Case, vocabulary: GeneVocabulary, neighbors: int | None = None
) -> tuple[Floats, Floats]:
    """Embedding [N, d] and expression [N, G] by PyTorch, computed in the model's type, as float64.

    With `neighbors`, by kNN attention as message passing in PyTorch Geometric.
    """
    dtype = next(model.parameters()).dtype
    tokens = None if case.genes is None else torch.from_numpy(vocabulary.tokens(case.genes))
    with torch.inference_mode():
        embedding = model.embed(**slide_inputs(case.slide, vocabulary, case.context, dtype, neighbors))
        expression = model.decode(embedding, tokens)
    return embedding.double().numpy(), expression.double().numpy()


def _random_context(slide: Slide, panel: Sequence[str], rng: np.random.Generator) -> Context:
    spots = np.sort(rng.choice(len(slide), max(1, len(slide) // 5), replace=False))
    return Context(spots, rng.poisson(2.0, (len(spots), len(panel))).astype(np.float32), list(panel))


def _bars(precision: str) -> dict[str, Any]:
    if precision == "fp32":
        return {"relative_l2": L2_BAR, "pearson": PEARSON_BAR}
    times = f"{TIMES_TORCH:g} times PyTorch's own error in {precision}"
    return {"relative_l2": times, "pearson on given slides": LOW_PEARSON_BAR}
