"""Golden cases, small models and small files that the tests share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from stpath_runtime.context import Context
from stpath_runtime.manifest import ModelConfig
from stpath_runtime.slide import Slide
from stpath_runtime.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary
from stpath_train.checkpoint import save_checkpoint, seeded_checkpoint
from stpath_train.model import STPath

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_CASES = ("tiny_masked", "tiny_context", "tiny_batch", "full_masked", "full_context")


@dataclass(frozen=True)
class Golden:
    """A golden case: the model and inputs by its recipe, and what the published code gave."""

    name: str
    model: STPath
    features: np.ndarray
    arrays: dict[str, np.ndarray]

    @property
    def vocabulary(self) -> GeneVocabulary:
        return made_up_vocabulary(self.model.config.n_tokens)

    @property
    def genes(self) -> list[str]:
        """Names of the genes of the prediction (the pad and mask columns have none)."""
        return self.vocabulary.names(self.gene_tokens)

    @property
    def gene_tokens(self) -> np.ndarray:
        tokens = self.arrays["output_token_ids"]
        return tokens[tokens >= 2]

    @property
    def prediction(self) -> np.ndarray:
        return self.arrays["prediction"][:, self.arrays["output_token_ids"] >= 2]

    def slides(self) -> list[tuple[np.ndarray, Slide, Context | None]]:
        """Each slide of the case: its spots in the case, itself, and its context."""
        a = self.arrays
        found = []
        for index in np.unique(a["slide_index"]):
            spots = np.flatnonzero(a["slide_index"] == index)
            barcodes = [f"{self.name}-{i}" for i in spots]
            organ = ORGANS[int(a["organ_id"])]
            technology = TECHNOLOGIES[int(a["tech_id"])] if a["tech_id"] else None
            slide = Slide(a["coords"][spots], self.features[spots], barcodes, organ, technology, f"{self.name}_{index}")
            context = None
            if "context_ids" in a:
                rows = np.isin(a["context_ids"], spots)
                names = self.vocabulary.names(a["context_gene_ids"])
                ids = [f"{self.name}-{i}" for i in a["context_ids"][rows]]
                context = Context(ids, a["context_counts"][rows], names)
            found.append((spots, slide, context))
        return found


def made_up_vocabulary(n_tokens: int) -> GeneVocabulary:
    genes = range(n_tokens - 2)
    return GeneVocabulary([f"ENSG{i:011d}" for i in genes], [f"GENE{i}" for i in genes], [[f"ALIAS{i}"] for i in genes])


def write_symbol_table(vocabulary: GeneVocabulary, path: Path) -> Path:
    """The vocabulary as a symbol2ensembl.json."""
    path.write_text(json.dumps(dict(zip(vocabulary.symbols, vocabulary.ensembl_ids, strict=True))))
    return path


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    sizes = json.loads(str(arrays["config"]))
    config = ModelConfig(
        d_model=sizes["d_model"],
        n_heads=sizes["n_heads"],
        n_layers=sizes["n_layers"],
        d_mlp=int(sizes["d_model"] * sizes["mlp_ratio"]),
        n_features=sizes["feature_dim"],
        n_tokens=sizes["n_genes"],
        n_organs=25,
        n_technologies=5,
    )
    rng = np.random.RandomState(int(arrays["feature_seed"]))
    features = rng.standard_normal((len(arrays["coords"]), sizes["feature_dim"])).astype(np.float32)
    return Golden(name, seeded_checkpoint(config, int(arrays["weight_seed"])), features, arrays)


@pytest.fixture(scope="session", params=GOLDEN_CASES)
def golden(request) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="session")
def tiny() -> Golden:
    """The smallest golden case with context."""
    return load_golden("tiny_context")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.pth"
    torch.save(tiny.model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def tiny_genes(tiny, tmp_path_factory) -> Path:
    return write_symbol_table(tiny.vocabulary, tmp_path_factory.mktemp("genes") / "symbol2ensembl.json")


@pytest.fixture(scope="session")
def tiny_engine(tiny_checkpoint, tiny_genes, tmp_path_factory) -> Path:
    """An engine directory of the tiny model, fp32, proven."""
    from stpath_export.exporter import export_engine

    out = tmp_path_factory.mktemp("engines") / "tiny"
    export_engine(tiny_checkpoint, out, tiny_genes)
    return out


@pytest.fixture(scope="session")
def golden_engine(golden, tmp_path_factory) -> Path:
    """An engine directory of a golden case's model, fp32, proven."""
    from stpath_export.exporter import export_engine

    folder = tmp_path_factory.mktemp(golden.name)
    save_checkpoint(golden.model, folder / "model.safetensors")
    genes = write_symbol_table(golden.vocabulary, folder / "symbol2ensembl.json")
    export_engine(folder / "model.safetensors", folder / "engine", genes)
    return folder / "engine"
