"""Writes an STFlow engine, and publishes it only after its proof of parity."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from stpath_runtime.errors import VocabularyError
from stpath_runtime.files import sha256, written_whole
from stpath_runtime.manifest import FLOW, FLOW_SCHEMA, FLOW_VARIANT, GENES, WEIGHTS, FlowManifest
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.flow_checkpoint import load_flow_checkpoint
from stpath_train.stflow import STFlow

from ..proof import Report
from ..writing import DTYPES, LIBRARIES, OPSET, SharedWeights, write_graph
from .proof import prove, require_passed
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
    with written_whole(out) as directory:
        directory.mkdir()
        manifest = write_flow_engine(model, vocabulary, directory, precision, source, encoder, on_step)
        report = prove(directory, model, device=device)
        require_passed(report)
        FlowManifest(**{**vars(manifest), "parity": report}).write(directory)
    return report


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
    weights = SharedWeights(directory / WEIGHTS)
    todo = graphs(model, DTYPES[precision])
    for done, graph in enumerate(todo):
        if on_step is not None:
            on_step(done, len(todo) + 1)  # the proof is the last step
        write_graph(graph, weights, directory)
    if on_step is not None:
        on_step(len(todo), len(todo) + 1)
    vocabulary.write(directory / GENES)
    manifest = FlowManifest(
        schema=FLOW_SCHEMA,
        family=FLOW,
        variant=FLOW_VARIANT,
        model=model.config,
        precision=precision,
        opset=OPSET,
        encoder=encoder,
        checkpoint=checkpoint,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files={path.name: sha256(path) for path in sorted(directory.iterdir())},
        versions={name: version(name) for name in LIBRARIES},
        parity={},
    )
    manifest.write(directory)
    return manifest
