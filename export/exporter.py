"""Writes an engine directory from a checkpoint, and publishes it only after its proof of parity."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

from stpath_runtime.errors import OptionError, VocabularyError
from stpath_runtime.files import sha256
from stpath_runtime.manifest import SCHEMA, Manifest
from stpath_runtime.progress import OnTile
from stpath_runtime.slides.vocabulary import GeneVocabulary
from stpath_train.checkpoint import load_checkpoint, read_state_dict, require_genes
from stpath_train.flow_checkpoint import is_flow_checkpoint
from stpath_train.model import STPath

from .proof import Report, prove
from .stages import graphs
from .stflow.exporter import export_flow
from .writing import DTYPES, publish, require_free, write_files

ENCODERS = {1536: "Gigapath tile features"}  # by width


def export_engine(
    checkpoint: Path,
    out: Path,
    genes: Path | None = None,
    precision: str = "fp32",
    on_step: OnTile | None = None,
    device: str = "cpu",
    config: Path | None = None,
) -> Report:
    """Export a checkpoint as an engine directory, prove its parity, and only then publish it at `out`.

    Its keys tell whether it is STPath's or STFlow's.

    Parameters
    ----------
    genes
        The model's gene vocabulary (`symbol2ensembl.json`); None means STPath's published one. Of STFlow the list of
        its genes, which it needs.
    precision
        "fp32", "fp16" or "bf16".
    on_step
        Called with (done, total) as the work goes on.
    device
        Where the proof runs: "cpu" or "cuda:N"; on a CPU ONNX Runtime does not compute in bfloat16.
    config
        Of STFlow: the `config.json` of its training run.

    Raises
    ------
    InputError
        If `out` exists, or the checkpoint or the vocabulary is at fault.
    ParityError
        If the engine misses the bar; nothing is left at `out`.
    """
    if precision not in DTYPES:
        raise OptionError(f"unknown precision {precision!r}; known: {', '.join(DTYPES)}")
    if (precision, device) == ("bf16", "cpu"):
        raise OptionError(
            "precision bf16: the proof of such an engine runs on a GPU; give --device cuda:0, or for bfloat16 on a CPU "
            "export with --precision fp32 and run with --backend openvino --precision bf16"
        )
    require_free(out)
    if is_flow_checkpoint(read_state_dict(checkpoint)[0]):
        return export_flow(checkpoint, out, config, genes, precision, on_step, device)
    if config is not None:
        raise OptionError(f"--config {config}: of checkpoints of STFlow; {checkpoint} is none: leave it out")
    model = load_checkpoint(checkpoint)
    vocabulary = read_vocabulary(genes, model, str(checkpoint))
    require_genes(checkpoint, vocabulary, str(genes or "the published vocabulary"))
    source = {"name": checkpoint.name, "sha256": sha256(checkpoint)}
    write = partial(write_engine, model, vocabulary, precision=precision, checkpoint=source, on_step=on_step)
    return publish(out, write, partial(prove, model=model, device=device))


def read_vocabulary(genes: Path | None, model: STPath, name: str) -> GeneVocabulary:
    """The vocabulary of a model, checked against its number of tokens.

    Raises
    ------
    InputError
        If it cannot be read or has another number of genes.
    """
    vocabulary = GeneVocabulary.published() if genes is None else GeneVocabulary.read(genes)
    if vocabulary.n_tokens != model.config.n_tokens:
        source = genes or "the published vocabulary"
        raise VocabularyError(
            f"{name}: the checkpoint has {model.config.n_tokens:,} gene tokens, but {source} gives "
            f"{vocabulary.n_tokens:,} ({len(vocabulary):,} genes and 2); give the model's own with --genes"
        )
    return vocabulary


def write_engine(
    model: STPath,
    vocabulary: GeneVocabulary,
    directory: Path,
    precision: str,
    checkpoint: dict[str, str],
    on_step: OnTile | None = None,
) -> Manifest:
    """Write graphs, weights, vocabulary and manifest, without a proof, into an empty directory."""
    todo = graphs(copy.deepcopy(model).to(DTYPES[precision]))  # a copy: the reference stays in its own type
    written = write_files(todo, vocabulary, directory, precision, checkpoint, on_step)
    config = model.config
    encoder = ENCODERS.get(config.n_features, "the encoder that the model was trained on")
    manifest = Manifest(schema=SCHEMA, model=config, encoder=encoder, **written)
    manifest.write(directory)
    return manifest
