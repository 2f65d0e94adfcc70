"""Golden cases, small models and small files that the tests share."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData

from stpath_runtime.backends.openvino import process_core
from stpath_runtime.manifest import FlowConfig, Manifest, ModelConfig
from stpath_runtime.slides.context import Context
from stpath_runtime.slides.slide import Slide
from stpath_runtime.slides.vocabulary import ORGANS, TECHNOLOGIES, GeneVocabulary
from stpath_train.checkpoint import seeded_checkpoint
from stpath_train.model import STPath
from stpath_train.stflow import STFlow
from stpath_train.store import Record, Store, highly_variable, measured

GOLDEN = Path(__file__).parent / "golden"
FLOW_SIZES = FlowConfig(n_genes=50, d_model=32, d_edge=16, n_layers=2, n_heads=4, n_features=24)
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

    @property
    def embedded(self) -> np.ndarray:
        """Spots whose embedding the case holds: all, or every fourth."""
        spots = len(self.prediction)
        return np.arange(0, spots, spots // len(self.arrays["embedding"]))

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
    """The vocabulary as a symbol2ensembl.json, aliases included."""
    genes = zip(vocabulary.symbols, vocabulary.aliases, vocabulary.ensembl_ids, strict=True)
    path.write_text(json.dumps({name: gene for symbol, aliases, gene in genes for name in (symbol, *aliases)}))
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


@dataclass(frozen=True)
class FlowGolden:
    """A golden case of STFlow: the model, its inputs, and what the published code gave."""

    model: STFlow  # in float64
    arrays: dict[str, np.ndarray]

    @property
    def steps(self) -> int:
        return int(self.arrays["steps"])

    @property
    def slide(self) -> Slide:
        return Slide(self.arrays["coords"], self.arrays["features"].astype(np.float32), name="golden")


FLOW_CASES = ("random_small", "random_small_steps2", "relu", "duplicates", "hex_exact", "n1", "n8", "n9")


def load_flow_golden(case: str) -> FlowGolden:
    with np.load(GOLDEN / "stflow.npz") as file:
        arrays = {key.removeprefix(f"{case}/"): file[key] for key in file.files if key.startswith(f"{case}/")}
        activation = str(arrays["activation"])
        of_model = {key: file[key] for key in file.files if key.startswith(f"weights of {activation}/")}
    weights = {
        key.removeprefix(f"weights of {activation}/"): torch.from_numpy(value) for key, value in of_model.items()
    }
    model = STFlow(replace(FLOW_SIZES, activation=activation)).double()
    model.load_state_dict(weights)
    return FlowGolden(model.requires_grad_(False).eval(), arrays)


def write_flow_checkpoint(model: STFlow, folder: Path, **changed) -> tuple[Path, Path, Path]:
    """Weights, config.json and genes.json, as a training run of the published code leaves them."""
    c = model.config
    run = {"n_genes": c.n_genes, "hidden_dim": c.d_model, "pairwise_hidden_dim": c.d_edge, "n_layers": c.n_layers}
    run |= {"n_heads": c.n_heads, "feature_dim": c.n_features, "n_neighbors": c.neighbors, "n_sample_steps": c.steps}
    run |= {"prior_sampler": c.start, "activation": c.activation, "zinb_logits": 0.1, "zinb_total_count": 1}
    run |= {"zinb_zi_logits": 0, "feature_encoder": "uni_v1_official", "normalize_method": "log1p", "lr": 5e-4}
    genes = [f"GENE{i}" for i in range(c.n_genes)]
    torch.save(model.state_dict(), folder / "flow.pth")
    (folder / "config.json").write_text(json.dumps(run | changed))
    (folder / "genes.json").write_text(json.dumps({"genes": genes}))
    return folder / "flow.pth", folder / "config.json", folder / "genes.json"


def relative_l2(found, exact) -> float:
    found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def write_slide(slide: Slide, path: Path) -> Path:
    """The slide as a features file of HEST."""
    with h5py.File(path, "w") as file:
        file["embeddings"], file["coords"] = slide.features, slide.coords
        file["barcodes"] = np.array([[barcode.encode()] for barcode in slide.barcodes])
    return path


def write_context(context: Context, path: Path) -> Path:
    """The context as an h5ad of raw counts."""
    obs, var = (pd.DataFrame(index=pd.Index(list(names), dtype=object)) for names in (context.ids, context.genes))
    AnnData(X=np.asarray(context.counts, np.float32), obs=obs, var=var).write_h5ad(path)
    return path


def an_adata(vocabulary, spots: int = 130, genes: int = 12, features: int = 6, seed: int = 0) -> AnnData:
    """A slide of random counts: each spot's first feature is its number."""
    rng = np.random.default_rng(seed)
    names = rng.choice(np.array(vocabulary.symbols), genes, replace=False)
    adata = measured(rng.poisson(2, (spots, genes)), names, vocabulary, "made up")
    adata.obs_names = [f"spot{i}" for i in range(spots)]
    adata.obsm["spatial"] = rng.integers(0, 5000, (spots, 2))
    adata.obsm["features"] = rng.standard_normal((spots, features)).astype(np.float32)
    adata.obsm["features"][:, 0] = np.arange(spots)
    adata.var["highly_variable"] = highly_variable(adata, 4, adata.X.log1p())
    return adata


def copy_with_knn(engine: Path, to: Path) -> Path:
    """A copy of an engine whose model was trained to attend to 8 neighbours, it says: its graphs are the same."""
    shutil.copytree(engine, to)
    manifest = Manifest.read(to)
    model = dataclasses.replace(manifest.model, attention="knn", neighbors=8)
    dataclasses.replace(manifest, model=model).write(to)
    return to


def texts(*words: str | bytes) -> np.ndarray:
    """Strings as Triton takes and gives them: bytes in an array of objects."""
    return np.array([word.encode() if isinstance(word, str) else word for word in words], dtype=object)


def a_store(path: Path, slides: int = 4, spots: int = 130) -> Store:
    """A store of random slides S0, S1, ..., each of a patient of its own, over 38 genes."""
    store = Store.create(path, made_up_vocabulary(40))
    for i in range(slides):
        store.add(Record(f"S{i}", "Breast", "Visium", patient=f"p{i}"), an_adata(store.vocabulary, spots, seed=i))
    return store


def without_coverage() -> dict[str, str]:
    """The environment for a process that is interrupted: a signal while coverage holds its lock would hang it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}


def require_bf16() -> None:
    """Skip the test on a CPU on which OpenVINO has no bfloat16."""
    if "BF16" not in process_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        pytest.skip("this CPU has no bfloat16")


CROP = Path(__file__).parents[1] / "stpath_runtime" / "data" / "CMU-1-Small-Region-crop.svs"
GIGAPATH = ("vit_giant_patch14_dinov2", {"patch_size": 16, "init_values": 1e-5, "mlp_ratio": 5.33334})
SMALL = {"img_size": 224, "embed_dim": 96, "depth": 2, "num_heads": 4}


def write_encoder(folder: Path, architecture: str = GIGAPATH[0], more: dict | None = None, **layers) -> Path:
    """A tile encoder as the Hub has it, small, of random weights from a seed: every norm, scale and bias matters."""
    import timm
    from safetensors.torch import save_file

    arguments = {**SMALL, **(GIGAPATH[1] if more is None else more)}
    torch.manual_seed(0)
    model = timm.create_model(architecture, pretrained=False, num_classes=0, **arguments, **layers).eval()
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "gamma" in name or ("norm" in name and name.endswith("weight")):
                weights.uniform_(0.5, 1.5)  # 1e-5, as they begin, would make each block the identity
            elif weights.ndim == 2:
                weights.normal_(0, weights.shape[1] ** -0.5)
            elif name.endswith("bias"):
                weights.normal_(0, 0.1)
            elif "token" in name or "pos" in name:
                weights.normal_(0, 0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    facts = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "license": "apache-2.0"}
    config = {"architecture": architecture, "model_args": arguments, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_timm(folder: Path, tiles: np.ndarray, **layers) -> np.ndarray:
    """What timm's own model of such a folder gives for tiles uint8 [n, S, S, 3], in float64: [n, F] or [n, T, d]."""
    import timm
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], num_classes=0, **config["model_args"], **layers)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    facts = config["pretrained_cfg"]
    pixels = (tiles / 255 - np.array(facts["mean"])) / np.array(facts["std"])
    with torch.inference_mode():
        return model.eval().double()(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
