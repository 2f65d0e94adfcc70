"""The published inference class, on an engine: published scripts run with this one import changed.

>>> from stpath_runtime.compat import STPathInference
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .checks import require_stpath
from .engine import Engine
from .errors import CheckpointError, ContextError, FileError, VocabularyError, warn
from .files import sha256
from .slides.context import Context
from .slides.slide import Slide
from .slides.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData

# The published spellings whose tokens differ from this package's.
_PUBLISHED_ORGANS = {"Ovary": "Others"}


class STPathInference:
    """The published class's constructor and call, without its faults.

    Unlike the published one it takes any number type, leaves the caller's arrays as they are, runs slides of one row
    or column, resolves several names of one gene by the maximum, and raises on an unknown gene, organ or technology.

    Parameters
    ----------
    gene_voc_path
        symbol2ensembl.json; None means the engine's or STPath's published vocabulary.
    model_weight_path
        A checkpoint, which is exported once into a folder beside it (this needs the extra `export`), or an engine.
    device
        "cpu", "cuda:N" or the N of a GPU. Where ONNX Runtime for GPUs is not installed, a number runs on the CPU with
        a warning (the published default is 0); "cuda:N" raises.

    Raises
    ------
    InputError
        If a file is at fault, or the export fails.
    """

    def __init__(self, gene_voc_path: str | Path | None, model_weight_path: str | Path, device: int | str = 0) -> None:
        path = Path(model_weight_path)
        genes = Path(gene_voc_path) if gene_voc_path is not None else None
        engine = path if path.is_dir() else _exported_once(path, genes)
        self.engine = Engine.load(engine, device=_device(device))
        require_stpath(self.engine.path, self.engine.manifest, "STPathInference")
        if genes is not None and GeneVocabulary.read(genes).ensembl_ids != self.engine.vocabulary.ensembl_ids:
            raise VocabularyError(
                f"{genes}: other genes than those of the engine {engine}; give the vocabulary it was made with"
            )

    def inference(
        self,
        coords: npt.NDArray[Any],
        img_features: npt.NDArray[Any],
        context_ids: npt.NDArray[Any] | None = None,
        context_gene_exps: Any = None,
        context_gene_names: Sequence[str] | None = None,
        organ_type: str | None = None,
        tech_type: str | None = None,
        save_gene_names: Sequence[str] | None = None,
    ) -> AnnData:
        """Predict a slide.

        Parameters
        ----------
        coords
            [N, 2].
        img_features
            [N, F].
        context_ids, context_gene_exps, context_gene_names
            Positions [C], raw counts [C, P] and gene names [P] of context spots; all three or none.
        organ_type, tech_type
            Names; None means Others and unknown.
        save_gene_names
            Genes to return; None means all, named by Ensembl id.

        Returns
        -------
        AnnData
            N spots: X, log1p of raw counts; var_names the genes; `obsm["coordinates"]` the normalised ones.
        """
        organ = _PUBLISHED_ORGANS.get(organ_type, organ_type) if organ_type is not None else None
        slide = Slide(coords, img_features, organ=organ, technology=tech_type)
        context = None
        if context_ids is not None and context_gene_exps is not None and context_gene_names is not None:
            context = Context(np.asarray(context_ids), context_gene_exps, context_gene_names)
        elif not (context_ids is None and context_gene_exps is None and context_gene_names is None):
            raise ContextError("give all three of context_ids, context_gene_exps and context_gene_names, or none")
        adata = self.engine.predict(slide, genes=save_gene_names, context=context)
        if save_gene_names is None:
            adata.var_names = adata.var["gene_ids"].astype(object).to_numpy()
        adata.obsm["coordinates"] = slide.normalized_coords()
        return adata


def _exported_once(checkpoint: Path, genes: Path | None) -> Path:
    """The engine of a checkpoint, in a folder beside it that is named after the hashes of checkpoint and vocabulary."""
    for path in (checkpoint, genes):
        if path is not None and not path.is_file():
            raise FileError(f"{path}: no such file")
    sources = sha256(checkpoint) + (sha256(genes) if genes is not None else "")
    engine = checkpoint.with_name(f"{checkpoint.name}.engine-{hashlib.sha256(sources.encode()).hexdigest()[:16]}")
    if engine.is_dir():
        return engine
    # A process of its own: this package never imports torch.
    command = [sys.executable, "-m", "stpath_runtime", "export", str(checkpoint), "--out", str(engine)]
    command += ["--genes", str(genes)] if genes is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and not engine.is_dir():  # another process may have exported it meanwhile
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"{checkpoint}: the export failed: {lines[-1]}")
    return engine


def _device(device: int | str) -> str:
    if not str(device).isdigit():
        return str(device)
    name = f"cuda:{device}"
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except ImportError:
        return name  # loading the engine says what to install
    if "CUDAExecutionProvider" in providers:
        return name
    warn(
        f"device {device}: ONNX Runtime for GPUs is not installed, this runs on the CPU; give device='cpu' to say "
        "so, or install stpath-engine[gpu]"
    )
    return "cpu"
