"""Writes an STFlow engine, and publishes it only after its proof of parity."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from stpath_runtime.errors import VocabularyError
from stpath_runtime.files import sha256
from stpath_runtime.manifest import FLOW, FLOW_SCHEMA, FLOW_VARIANT, FlowManifest
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.flow_checkpoint import load_flow_checkpoint
from stpath_train.stflow import STFlow

from ..proof import Report
from ..writing import DTYPES, publish, write_files
from .proof import prove
from .stages import graphs


def export_flow(
    checkpoint: Path,
    out: Path,
    config: Path | None,
    genes: Path | None,
    precision: str,
    on_step: OnTile | None = None,
    device: str = "cpu",
) -> Report:
    """Export a checkpoint of STFlow; the parameters are those of `stpath_export.exporter.export_engine`.

    Parameters
    ----------
    config
        The `config.json` of its training run.
    genes
        Names of its genes: HEST-bench's `{"genes": [...]}`, or a list, in JSON.

    Raises
    ------
    InputError
        If checkpoint, config or genes are at fault.
    ParityError
        If the engine misses the bar; nothing is left at `out`.
    """
    model, encoder = load_flow_checkpoint(checkpoint, config)
    vocabulary = read_flow_genes(genes, model.config.n_genes, str(checkpoint))
    source = {"name": checkpoint.name, "sha256": sha256(checkpoint)}
    write = partial(
        write_flow_engine,
        model,
        vocabulary,
        precision=precision,
        checkpoint=source,
        encoder=encoder,
        on_step=on_step,
    )
    return publish(out, write, partial(prove, model=model, device=device))


def read_flow_genes(path: Path | None, n_genes: int, checkpoint: str) -> GeneVocabulary:
    """The genes of a model, in its order.

    Raises
    ------
    InputError
        If there is no such file, it is no list of distinct names, or of another length.
    """
    if path is None:
        raise VocabularyError(
            f"{checkpoint}: a checkpoint of STFlow has {n_genes:,} genes without names; give them with --genes, as "
            "HEST-bench's var_50genes.json"
        )
    if not path.is_file():
        raise VocabularyError(f"{path}: no such file of genes")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{path}: not JSON ({error}); give a list of genes") from error
    names = content.get("genes") if isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
        raise VocabularyError(f'{path}: no list of genes; expected {{"genes": ["EPCAM", ...]}}, or a list of names')
    if len(names) != n_genes:
        raise VocabularyError(f"{path}: {len(names):,} genes, but {checkpoint} has {n_genes:,}; give its own")
    return GeneVocabulary.of_names(names, str(path))


def write_flow_engine(
    model: STFlow,
    vocabulary: GeneVocabulary,
    directory: Path,
    precision: str,
    checkpoint: dict[str, str],
    encoder: str,
    on_step: OnTile | None = None,
) -> FlowManifest:
    """Write graphs, weights, genes and manifest, without a proof, into an empty directory."""
    written = write_files(graphs(model, DTYPES[precision]), vocabulary, directory, precision, checkpoint, on_step)
    manifest = FlowManifest(
        schema=FLOW_SCHEMA, family=FLOW, variant=FLOW_VARIANT, model=model.config, encoder=encoder, **written
    )
    manifest.write(directory)
    return manifest
