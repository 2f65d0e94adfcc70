"""Which blocks of keys global attention could leave out and still give the same result: a study of a trained model.

    python benchmarks/skipping.py                                   # the demo's trained checkpoint, its held-out slide
    python benchmarks/skipping.py --checkpoint stfm.pth --slide INT2.h5 --organ Breast --tech Visium

Keys left out together take at most `error` of every row's softmax, if each of their scores is at most the largest score
of the row less ln(keys / error). Three ways to know that of a block of 64 queries and a block of 64 keys, near each
other on the tissue, and the share of pairs of blocks that each lets go:

    norms    before any of their scores is computed: |q| |k| / sqrt(d / heads) + w * distance, by the largest norms and
             the nearest corners of the two blocks, against the largest scores of the rows in their own block
    means    the same with q k bounded by the products with the blocks' means, and the norms of what differs from those
    order    the bound of means against the largest score of each row: what no better order of the blocks surpasses
    scores   the scores themselves: what no better bound surpasses
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import typer
from rich.console import Console
from rich.table import Table

from stpath_runtime import Slide, read_slide
from stpath_runtime.encoding.neighbors import cut
from stpath_runtime.encoding.sizes import BLOCK
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint
from stpath_train.cohort import World
from stpath_train.demo_checkpoint import PACKAGED, SEED, held_out_slide
from stpath_train.inputs import slide_inputs
from stpath_train.model import STPath

Doubles = npt.NDArray[np.float64]
SHARES = ("norms", "means", "order", "scores")


def main(
    checkpoint: Annotated[Path, typer.Option(help="Left out: the demo's.")] = PACKAGED,
    slide: Annotated[Path | None, typer.Option(help="A features file; left out: the demo's simulated slide.")] = None,
    organ: str | None = None,
    tech: str | None = None,
    error: Annotated[float, typer.Option(help="Of a row's softmax, in all that is left out.")] = 1e-6,
) -> None:
    """Print the shares by layer and head."""
    read = held_out_slide(World.create(SEED))[0] if slide is None else read_slide(slide, organ=organ, technology=tech)
    table = Table(title=f"{read.name}, {len(read):,} spots: pairs of blocks that can go")
    for column in ("layer", "head", "w", *SHARES):
        table.add_column(column, justify="right")
    for layer, (q, k, weights, coords) in enumerate(queries_and_keys(load_checkpoint(checkpoint), read), 1):
        for head, w in enumerate(weights):
            found = shares(q[:, head], k[:, head], w, coords, error)
            table.add_row(str(layer), str(head), f"{w:+.3f}", *(f"{found[name]:.1%}" for name in SHARES))
    Console().print(table)


def queries_and_keys(model: STPath, slide: Slide) -> list[tuple[Doubles, Doubles, Doubles, Doubles]]:
    """Of each layer: q and k [N, H, d/H], distance weights [H], coordinates [N, 2] as the model takes them."""
    genes = model.config.n_tokens - 2
    vocabulary = GeneVocabulary([f"ENSG{i:011d}" for i in range(genes)], [], [])  # names no gene: there is no context
    found = []

    def note(attention, given, _) -> None:
        x, coords = given[:2]
        q, k, _ = attention.layernorm_qkv(x).reshape(len(x), 3, attention.n_heads, -1).unbind(1)
        found.append(tuple(part.double().numpy() for part in (q, k, attention.distance_weight, coords)))

    for block in model.blocks:
        block.attn.register_forward_hook(note)
    with torch.inference_mode():
        model.double().embed(**slide_inputs(slide, vocabulary, dtype=torch.float64))
    return found


def shares(q: Doubles, k: Doubles, w: float, coords: Doubles, error: float) -> dict[str, float]:
    """SHARES of one head with queries and keys [N, d/H]."""
    block = cut(coords, BLOCK)
    order = np.argsort(block, kind="stable")
    starts = np.searchsorted(block[order], np.arange(block.max() + 1))
    q, k, coords = q[order] / np.sqrt(q.shape[1]), k[order], coords[order]
    distance = np.linalg.norm(coords[:, None] - coords, axis=2)
    scores = q @ k.T + w * distance  # [N, N]
    of_blocks = np.maximum.reduceat(np.maximum.reduceat(scores, starts), starts, axis=1)  # [b, b]

    own = block[order]
    in_own = np.where(own[:, None] == own, scores, -np.inf).max(axis=1)  # [N]
    lowest_in_own, lowest = (np.minimum.reduceat(row, starts) for row in (in_own, scores.max(axis=1)))  # [b]
    bias, margin = w * _reach(coords, starts, nearest=w < 0), np.log(len(q) / error)
    by_means = _product_by_means(q, k, starts) + bias
    most = {
        "norms": np.outer(_largest_norm(q, starts), _largest_norm(k, starts)) + bias - lowest_in_own[:, None],
        "means": by_means - lowest_in_own[:, None],
        "order": by_means - lowest[:, None],
        "scores": of_blocks - lowest[:, None],
    }
    return {name: float((above < -margin).mean()) for name, above in most.items()}


def _product_by_means(q: Doubles, k: Doubles, starts: npt.NDArray[np.int64]) -> Doubles:
    """What q k of two blocks is at most, [b, b]: q k = Q k + q K - Q K + (q - Q)(k - K), with Q and K the means."""
    counts = np.diff(np.append(starts, len(q)))
    mean_q, mean_k = (np.add.reduceat(part, starts) / counts[:, None] for part in (q, k))  # [b, d/H]
    with_k = np.maximum.reduceat(mean_q @ k.T, starts, axis=1)
    with_q = np.maximum.reduceat(q @ mean_k.T, starts)
    rest = [_largest_norm(part - mean.repeat(counts, 0), starts) for part, mean in ((q, mean_q), (k, mean_k))]
    return with_k + with_q - mean_q @ mean_k.T + np.outer(*rest)


def _largest_norm(rows: Doubles, starts: npt.NDArray[np.int64]) -> Doubles:
    return np.maximum.reduceat(np.linalg.norm(rows, axis=1), starts)


def _reach(coords: Doubles, starts: npt.NDArray[np.int64], nearest: bool) -> Doubles:
    """The least distance between the boxes around two blocks, or the largest, [b, b]."""
    low, high = np.minimum.reduceat(coords, starts), np.maximum.reduceat(coords, starts)  # [b, 2]
    if nearest:
        gap = np.maximum(np.maximum(low[:, None] - high, low - high[:, None]), 0)
    else:
        gap = np.maximum(high[:, None] - low, high - low[:, None])
    return np.linalg.norm(gap, axis=2)


if __name__ == "__main__":
    typer.run(main)
