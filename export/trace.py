"""Where the error of an engine enters: what each stage gives, beside the float64 reference, with PyTorch beside it.

A stage has two errors. *Accumulated*: within the engine's run of all stages, as it predicts. *Own*: alone, given the
reference's numbers, rounded to the type that passes between the stages. Where the own error rises, the error enters.

Both are of the stages as `stpath_runtime.encoding.encoder` runs them: a backend is wrapped that keeps what each stage
gives, and hands on the reference's numbers in its place. PyTorch is the model itself, in the precision of the
engine, with hooks.

N spots, d width, G genes, C context spots.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stpath_runtime.encoding import encoder
from stpath_runtime.encoding.attention import AllSpots, NearestSpots
from stpath_runtime.encoding.backend import Array, Arrays, Backend, Workspace
from stpath_runtime.encoding.sizes import DTYPES, KV_DTYPES
from stpath_runtime.engine import Engine
from stpath_runtime.measures.agreement import relative_l2
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import MASK_TOKEN, GeneVocabulary
from stpath_train.inputs import slide_inputs
from stpath_train.model import Block, STPath

from .proof import (
    L2_BAR,
    LOW_DTYPES,
    TIMES_TORCH,
    Case,
    Floats,
    attention_name,
    attentions,
    pearson_of_genes,
    spots_and_keys,
)

Stages = dict[str, dict[str, Floats]]  # stage -> output -> its rows, in the order of the spots
Row = dict[str, Any]

QUANTILES = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
DECADES = (-14, 3)  # of absolute errors, that histograms span
BINS_A_DECADE = 8
SHOWN = 5_000  # values of the expression that pictures show, drawn from a seed


@dataclass(frozen=True, eq=False)
class Trace:
    """The stages of one case and way to attend."""

    case: str
    attention: str  # "global" or "knn"
    spots: int
    rows: list[Row]  # a row a stage and output: see `trace`
    pearson: dict[str, Row]  # "engine" and "pytorch": of each gene that varies, over the spots
    histograms: dict[str, list[int]]  # the same: absolute errors of the expression, counted in the bins of `edges`
    shown: dict[str, npt.NDArray[np.float64]]  # the same and "reference": some values of the expression

    @property
    def name(self) -> str:
        """The case and how it attends."""
        return f"{self.case}, {self.attention.replace('knn', 'kNN')} attention"

    def enters(self) -> Row | None:
        """The first row whose own error misses its bar."""
        return next((row for row in self.rows if not row["own_passed"]), None)


def edges() -> npt.NDArray[np.float64]:
    """Edges of the bins of histograms of absolute errors; what lies outside is counted in the first and last bin."""
    low, high = DECADES
    return np.logspace(low, high, (high - low) * BINS_A_DECADE + 1)


def trace_cases(engine: Engine, model: STPath, cases: Sequence[Case], on_step: OnTile | None = None) -> list[Trace]:
    """Trace cases, each with global attention and, if it is of a panel, with kNN attention.

    Parameters
    ----------
    model
        The reference, with the weights of the checkpoint as they are in the file.
    on_step
        Called with (done, total) after each case and way to attend.
    """
    exact_model = copy.deepcopy(model).to(torch.float64)
    torch_model = copy.deepcopy(model).to(LOW_DTYPES.get(engine.precision, torch.float32))
    todo = [(case, neighbors) for case in cases for neighbors in attentions(case)]
    traces = []
    for done, (case, neighbors) in enumerate(todo, 1):
        traces.append(trace(engine, exact_model, torch_model, case, neighbors))
        if on_step is not None:
            on_step(done, len(todo))
    return traces


def trace(engine: Engine, exact_model: STPath, torch_model: STPath, case: Case, neighbors: int | None) -> Trace:
    """Compare every stage of an engine, and of PyTorch in its precision, with the reference.

    A row of the result is of one output of one stage: "engine" and "pytorch", each with the "accumulated" and the "own"
    error (see `errors`), and the bars on the engine's, which are those of the proof: 1e-5 in float32, below it twice
    what PyTorch errs in the same way.
    """
    vocabulary = engine.vocabulary
    exact = torch_stages(exact_model, case, vocabulary, neighbors)
    found = engine_stages(engine, case, neighbors)
    by_torch = torch_stages(torch_model, case, vocabulary, neighbors)
    predicted = {
        name: stages["head"]["expression"]
        for name, stages in {"reference": exact, "engine": found, "pytorch": by_torch}.items()
    }
    accumulated = {"engine": _stage_errors(found, exact), "pytorch": _stage_errors(by_torch, exact)}
    del found, by_torch  # all stages of a large slide are large
    own = {
        "engine": _stage_errors(engine_stages(engine, case, neighbors, exact), exact),
        "pytorch": _stage_errors(torch_stages(torch_model, case, vocabulary, neighbors, exact), exact),
    }
    rows = [
        _row(stage, output, {who: {"accumulated": accumulated[who][at], "own": own[who][at]} for who in own},
             engine.precision)
        for at in accumulated["engine"]
        for stage, output in (at,)
    ]  # fmt: skip
    reference = predicted["reference"]
    sample = np.random.default_rng(0).permutation(reference.size)[:SHOWN]
    return Trace(
        case=case.name,
        attention=attention_name(neighbors),
        spots=len(case.slide),
        rows=rows,
        pearson={who: _pearson(predicted[who], reference) for who in own},
        histograms={who: _histogram(predicted[who], reference) for who in own},
        shown={who: values.ravel()[sample].astype(np.float64) for who, values in predicted.items()},
    )


def engine_stages(engine: Engine, case: Case, neighbors: int | None, exact: Stages | None = None) -> Stages:
    """What the stages of an engine give, in its own row of them or, with `exact`, each handed the reference's numbers.

    Returns
    -------
    "tokens": gene_rows [1 + C, d]; "embed" and "block_1", ...: x, k, v [N, d], of the last block only x, which is the
    embedding; "head": expression [N, G].
    """
    spots, keys = spots_and_keys(engine, case, neighbors)
    handed = _handed(exact, keys, engine.precision) if exact is not None else {}
    tracer = Tracer(engine.backend, handed)
    embedding = encoder.encode(tracer, engine.manifest.model, engine.precision, spots, keys)
    found: Stages = {"tokens": {"gene_rows": tracer.outputs("tokens")[0]}}
    for stage in ("embed", *(f"block_{layer}" for layer in range(1, engine.manifest.model.n_layers + 1))):
        outputs = (keys.of_spots(_floats(rows)) for rows in tracer.outputs(stage))
        found[stage] = dict(zip("xkv", outputs, strict=False))
    found["head"] = {"expression": engine.decode(embedding, case.genes)}
    return found


class Tracer:
    """A backend that keeps what each stage gives and, where it has the reference's numbers, hands on those.

    Parameters
    ----------
    backend
        What runs the graphs.
    handed
        Stage -> what is handed on in place of each of its outputs: the rows of the whole slide, as the stages take
        them.
    """

    def __init__(self, backend: Backend, handed: Mapping[str, Sequence[Floats]]) -> None:
        self.name, self.device = backend.name, backend.device
        self.most_rows, self.keeps_tiles = backend.most_rows, backend.keeps_tiles
        self.tiles_at_once = 1  # they are kept in their order
        self._backend, self._handed = backend, handed
        self._tiles: dict[str, list[list[Floats]]] = {}

    def run(self, graph: str, inputs: Arrays) -> list[npt.NDArray[np.generic]]:
        """Run a graph."""
        found = self._backend.run(graph, inputs)
        return self.keep(graph, found) or found

    @contextmanager
    def workspace(self) -> Iterator[TracedWorkspace]:
        """The backend's, traced."""
        with self._backend.workspace() as at:
            yield TracedWorkspace(at, self)

    def available_memory(self) -> int:
        """Bytes that the device has to give."""
        return self._backend.available_memory()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def keep(self, graph: str, found: Sequence[Floats]) -> list[Floats]:
        """Keep a tile's outputs; returns what is handed on in their place, if anything is.

        The tiles of a stage come one after the other, from the first row.
        """
        stage = graph.removeprefix("knn_")
        tiles = self._tiles.setdefault(stage, [])
        first = sum(len(tile[0]) for tile in tiles)
        tiles.append([*found])
        return [whole[first : first + len(found[0])] for whole in self._handed.get(stage, [])]

    def outputs(self, stage: str) -> list[Floats]:
        """What a stage gave, all tiles together."""
        return [np.concatenate(tiles) for tiles in zip(*self._tiles[stage], strict=True)]


class TracedWorkspace:
    """A backend's workspace whose tracer keeps what the stages give."""

    def __init__(self, at: Workspace, tracer: Tracer) -> None:
        self._at, self._tracer = at, tracer
        self.takes_all_keys = at.takes_all_keys
        self.zeros, self.keep, self.put, self.fetch = at.zeros, at.keep, at.put, at.fetch

    def run(self, graph: str, inputs: Mapping[str, Array], outputs: Mapping[str, Any]) -> None:
        """Run a graph, then write to its outputs what is handed on."""
        self._at.run(graph, inputs, outputs)
        found = [np.array(self._at.fetch(rows)) for rows in outputs.values()]  # copies: the rows change
        for values, rows in zip(self._tracer.keep(graph, found), outputs.values(), strict=False):
            self._at.put(values, rows)


def torch_stages(
    model: STPath, case: Case, vocabulary: GeneVocabulary, neighbors: int | None, exact: Stages | None = None
) -> Stages:
    """The same of the model in PyTorch, in its own type; kNN attention as message passing.

    With `exact`, every block takes the reference's x, k and v, and the head its embedding, rounded to that type.
    """
    dtype = next(model.parameters()).dtype
    inputs = slide_inputs(case.slide, vocabulary, case.context, dtype, neighbors)
    blocks = model.blocks
    found: dict[str, dict[str, Tensor]] = {"tokens": {"gene_rows": _gene_rows(model, inputs["context"])}}

    def keep(stage: str, following: Block | None) -> Any:
        def hook(module: nn.Module, arguments: Any, x: Tensor) -> Tensor | None:
            found[stage] = {"x": x, **(_keys_values(x, following) if following is not None else {})}
            return torch.from_numpy(exact[stage]["x"]).to(dtype) if exact is not None else None

        return hook

    def hand_on(kv: Mapping[str, Floats]) -> Any:
        k, v = (torch.from_numpy(kv[name]).to(dtype) for name in "kv")
        return lambda module, arguments, qkv: torch.cat([qkv[:, : k.shape[1]], k, v], dim=1)

    stages = ["embed", *(f"block_{layer}" for layer in range(1, len(blocks) + 1))]
    with ExitStack() as hooks, torch.inference_mode():
        for stage, module, following in zip(stages, [model.input_encoder, *blocks], [*blocks, None], strict=True):
            hooks.enter_context(module.register_forward_hook(keep(stage, following)))
            if exact is not None and following is not None:
                hooks.enter_context(following.attn.layernorm_qkv.register_forward_hook(hand_on(exact[stage])))
        embedding = model.embed(**inputs)  # with `exact` the reference's: the last hook gave it
        tokens = torch.from_numpy(vocabulary.tokens(case.genes)) if case.genes is not None else None
        found["head"] = {"expression": model.decode(embedding, tokens)}
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        stage: {name: output.to(precise).numpy() for name, output in outputs.items()}
        for stage, outputs in found.items()
    }


def errors(found: Floats, exact: Floats) -> Row:
    """How far an output is from the reference.

    Returns
    -------
    relative_l2; the absolute error: max, mean, and its quantiles p50, p99, p99.9; and the tolerances, as
    `numpy.testing.assert_allclose` takes them, that would have passed: atol with rtol 0, and rtol with atol 0 (infinite
    where the reference is 0 and the other is not).
    """
    difference = np.abs(found.astype(np.float64) - exact)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(difference == 0, 0, difference / np.abs(exact))
    highest = float(difference.max())
    return {
        "relative_l2": relative_l2(found, exact),
        "max": highest,
        "mean": float(difference.mean()),
        **dict(zip(QUANTILES, np.quantile(difference, list(QUANTILES.values())).tolist(), strict=True)),
        "atol": highest,
        "rtol": float(relative.max()),
    }


def _stage_errors(found: Stages, exact: Stages) -> dict[tuple[str, str], Row]:
    return {
        (stage, output): errors(values, exact[stage][output])
        for stage, outputs in found.items()
        for output, values in outputs.items()
    }


def _row(stage: str, output: str, found: dict[str, dict[str, Row]], precision: str) -> Row:
    """One row of a trace: the errors, the bars, and whether the engine's keep to them."""
    row: Row = {"stage": stage, "output": output, **found}
    for which in ("accumulated", "own"):
        by_torch = found["pytorch"][which]["relative_l2"]
        row[f"{which}_bar"] = TIMES_TORCH * by_torch if precision in LOW_DTYPES else L2_BAR
        row[f"{which}_passed"] = bool(found["engine"][which]["relative_l2"] <= row[f"{which}_bar"])  # NaN does not
    return row


def _pearson(found: Floats, exact: Floats) -> Row:
    r = pearson_of_genes(found, exact)
    low = dict(zip(("min", "p1", "p50"), np.quantile(r, (0, 0.01, 0.5)).tolist(), strict=True)) if len(r) else {}
    return {"genes": len(r), "flat_genes": exact.shape[1] - len(r), **low}


def _histogram(found: Floats, exact: Floats) -> list[int]:
    bins = edges()
    difference = np.clip(np.abs(found.astype(np.float64) - exact), bins[0], bins[-1])
    counts: list[int] = np.histogram(difference, bins)[0].tolist()
    return counts


def _handed(exact: Stages, keys: AllSpots | NearestSpots, precision: str) -> dict[str, list[Floats]]:
    """The reference's numbers as they pass between the stages: rows in the order of the keys, rounded."""
    spot = keys.spots(slice(0, keys.rows))
    handed = {"tokens": [exact["tokens"]["gene_rows"].astype(DTYPES[precision])]}
    for stage, outputs in exact.items():
        if "x" in outputs:
            x, *kv = (rows[spot] for rows in outputs.values())
            to_bits = KV_DTYPES[precision] == np.uint16
            kv = [_bits(rows) if to_bits else rows.astype(KV_DTYPES[precision]) for rows in kv]
            handed[stage] = [x.astype(DTYPES[precision]), *kv]
    return handed


def _bits(rows: Floats) -> npt.NDArray[np.uint16]:
    """Rounded to bfloat16, which NumPy does not have: its bits."""
    bits: npt.NDArray[np.int16] = torch.from_numpy(rows).to(torch.bfloat16).view(torch.int16).numpy()
    return bits.view(np.uint16)


def _floats(rows: Floats) -> Floats:
    """Rows as numbers, where they are the bits of bfloat16."""
    return (rows.astype(np.uint32) << 16).view(np.float32) if rows.dtype == np.uint16 else rows


def _gene_rows(model: STPath, context: Any) -> Tensor:
    """Embedded gene rows [1 + C, d]: the mask's, and that of each context spot."""
    embedding = model.input_encoder.gene_embed.weight.T
    mask = F.embedding(torch.tensor([MASK_TOKEN]), embedding)
    if context is None:
        return mask
    return torch.cat([mask, context.log_counts @ F.embedding(context.token_ids, embedding)])


def _keys_values(x: Tensor, block: Block) -> dict[str, Tensor]:
    """The k and v that a block makes of x."""
    norm, linear = block.attn.norm_and_qkv
    _, k, v = linear(norm(x)).chunk(3, dim=-1)
    return {"k": k, "v": v}
